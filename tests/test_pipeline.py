"""Many calls at once, over one connection, by the blocking client."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.agent import RunningAgent
from support.fake_server import client_of, respond_in_reverse, send_bytes
from support.keys import recipient

from keyferry import AgentUnavailable, Client, InvalidRequest, NotFound, ProtocolError, operations
from keyferry.parameters import decode_base64, encode_base64
from keyferry.protocol import wire
from keyferry.protocol.rpc import MAX_LOST_CONNECTIONS

RSA = recipient("RSAES_OAEP_SHA_256")
SM2 = recipient("SM2PKE")


def test_results_come_in_the_order_of_the_calls(agent: RunningAgent) -> None:
    """Slow calls among fast ones do not change the order."""
    sizes = range(1, 101)
    wanted = [
        operations.GenerateAndExportDataKey(
            key_id="alias/dev", number_of_bytes=size, **(SM2 if size % 10 == 0 else RSA).arguments
        )
        for size in sizes
    ]
    with agent.client() as kms:
        made = kms.pipeline(wanted)
        opened = kms.pipeline(operations.Decrypt(ciphertext_blob=each.ciphertext_blob) for each in made)
    assert [len(decode_base64(each.plaintext)) for each in opened] == list(sizes)
    assert all(isinstance(each, operations.DecryptResult) for each in opened)
    assert len({each.request_id for each in made + opened}) == 200


def test_a_refusal_takes_the_place_of_its_result(agent: RunningAgent) -> None:
    """Other calls of the pipeline are answered."""
    with agent.client() as kms:
        first, second, third = kms.pipeline(
            [
                operations.DescribeKey(key_id="alias/dev"),
                operations.DescribeKey(key_id="alias/none"),
                ("DescribeKey", {"KeyId": "alias/dev"}),
            ]
        )
    assert first.key_metadata.key_id == third["KeyMetadata"]["KeyId"]
    assert isinstance(second, NotFound)


def test_empty_pipeline_opens_no_connection() -> None:
    """An empty pipeline returns without a request."""
    with Client("/nowhere") as kms:
        assert kms.pipeline([]) == []


def test_invalid_request_is_refused_before_a_send() -> None:
    """The error names the type of the invalid argument."""
    with Client("/nowhere") as kms:
        for wrong in (5, "DescribeKey", ("DescribeKey", 5), operations.DecryptResult("", "", ""), object()):
            with pytest.raises(TypeError, match="request"):
                kms.pipeline([wrong])


def test_pipeline_of_megabytes_completes(agent: RunningAgent) -> None:
    """Requests and answers are each larger than any buffer between client and agent."""
    texts = [encode_base64(bytes([n % 256]) * 6_144) for n in range(300)]
    with agent.client() as kms:
        sealed = kms.pipeline(operations.Encrypt(key_id="alias/dev", plaintext=text) for text in texts)
        opened = kms.pipeline(operations.Decrypt(ciphertext_blob=each.ciphertext_blob) for each in sealed)
        listed = kms.pipeline([operations.ListKeys(page_size=100)] * 5_000)
    assert [each.plaintext for each in opened] == texts
    assert {each.total_count for each in listed} == {2}


def test_pipeline_chunks_over_the_socket_buffer_do_not_stall(agent: RunningAgent) -> None:
    """The agent stops reading while a client does not read its answers."""
    large = operations.Encrypt(key_id="alias/dev", plaintext="A" * 65_000)
    with agent.client() as kms:
        got = kms.pipeline(([operations.GetAgentStatus()] * 1_250 + [large]) * 2)
    assert sum(isinstance(each, InvalidRequest) for each in got) == 2


def test_field_of_another_type_is_a_protocol_error(socket_path: Path) -> None:
    """The client never returns a result with a number in place of a name."""
    wrong = {"KeyId": 5, "KeyVersionId": None, "Plaintext": [1], "RequestId": "r"}
    with client_of(socket_path, send_bytes(wire.encode_response(1, None, wrong))) as kms, pytest.raises(ProtocolError):
        kms.decrypt(ciphertext_blob="AAAA")


UNSENDABLE: list[Any] = [
    operations.Decrypt(ciphertext_blob="A" * 70_000),
    operations.GenerateDataKey(key_id="alias/dev", number_of_bytes=2**70),
    operations.GenerateDataKey(key_id="alias/dev", number_of_bytes=32.0),  # type: ignore[arg-type]
    operations.GenerateDataKey(key_id="alias/\udc80"),
    operations.GenerateDataKey(key_id="alias/dev", encryption_context={"n": 1.5}),  # type: ignore[dict-item]
    operations.GenerateDataKey(key_id="alias/dev", encryption_context={1: "x"}),  # type: ignore[dict-item]
    operations.GenerateDataKey(key_id="alias/dev", encryption_context={str(n): "" for n in range(1_025)}),
    operations.GenerateDataKey(key_id="alias/dev", encryption_context={"d": datetime.now(UTC)}),  # type: ignore[dict-item]
    ("Encrypt", {"KeyId": [[[[[[[[]]]]]]]]}),
]


@pytest.mark.parametrize("wrong", UNSENDABLE, ids=range(len(UNSENDABLE)))
def test_unencodable_request_is_refused_in_its_place(agent: RunningAgent, wrong: Any) -> None:
    """A request over the limits would end the connection, and with it the calls of other threads."""
    with agent.client() as kms:
        first, refused, last = kms.pipeline([operations.GetAgentStatus(), wrong, operations.GetAgentStatus()])
        assert first.counters.connections_total == last.counters.connections_total
        assert isinstance(refused, InvalidRequest)
        assert "not sent" in refused.message


def test_a_plaintext_may_be_bytes(agent: RunningAgent) -> None:
    """The client encodes bytes of a plaintext or public key as Base64."""
    with agent.client() as kms:
        sealed = kms.encrypt(key_id="alias/dev", plaintext=b"secret")
        assert decode_base64(kms.decrypt(ciphertext_blob=sealed.ciphertext_blob).plaintext) == b"secret"


def test_answers_in_any_order_find_their_calls(socket_path: Path) -> None:
    """Answers are matched to calls by msgid."""
    with client_of(socket_path, respond_in_reverse(5)) as kms:
        got = kms.pipeline((f"Method{n}", {}) for n in range(5))
    assert [each["RequestId"] for each in got] == [f"Method{n}" for n in range(5)]


def test_unanswered_requests_are_repeated_after_a_disconnect(socket_path: Path) -> None:
    """The client repeats them as long as each connection brings an answer."""
    with client_of(socket_path, respond_in_reverse(3), respond_in_reverse(3), respond_in_reverse(2)) as kms:
        got = kms.pipeline((f"Method{n}", {}) for n in range(8))
    assert [each["RequestId"] for each in got] == [f"Method{n}" for n in range(8)]


def test_silent_new_connection_ends_the_pipeline(socket_path: Path) -> None:
    """It would go on for ever."""
    with (
        client_of(socket_path, respond_in_reverse(1), *[send_bytes(b"")] * MAX_LOST_CONNECTIONS) as kms,
        pytest.raises(AgentUnavailable),
    ):
        kms.pipeline((f"Method{n}", {}) for n in range(8))


def test_invalid_answer_ends_the_pipeline(socket_path: Path) -> None:
    """A peer that sends invalid messages is not an agent."""
    with client_of(socket_path, send_bytes(b"\xc1")) as kms, pytest.raises(ProtocolError):
        kms.pipeline([("A", {}), ("B", {})])


def test_repr_of_a_request_hides_its_plaintext() -> None:
    """Applications may log requests and results."""
    shown = repr(operations.Encrypt(key_id="k", plaintext="c2VjcmV0")) + repr(
        operations.GenerateDataKeyResult("k", "v", "b", "c2VjcmV0")
    )
    assert "c2VjcmV0" not in shown
    assert "key_id='k'" in shown
