"""The Python client: its methods, errors, threads, forks and reconnections, against real agents."""

import base64
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.agent import RawConnection, RunningAgent, dev_agent
from support.fake_server import client_of, respond_in_reverse, send_bytes
from support.keys import ALGORITHMS, recipient

import keyferry
from keyferry import (
    AccessDenied,
    AgentUnavailable,
    Client,
    DryRun,
    InternalFailure,
    InvalidRequest,
    KeyferryError,
    KeyUnusable,
    KmsError,
    NotFound,
    ProtocolError,
    ServiceUnavailable,
    Throttled,
    declaration,
    operations,
)
from keyferry.errors import CODES, kms_error
from keyferry.parameters import encode_base64
from keyferry.protocol import wire
from keyferry.protocol.rpc import MAX_LOST_CONNECTIONS, default_socket, pem_to_der, why_unreachable

RSA = recipient("RSAES_OAEP_SHA_256")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_operation_has_a_method_with_the_same_names(agent: RunningAgent, algorithm: str) -> None:
    """The client's methods do the main job, and results are frozen."""
    to = recipient(algorithm)
    with agent.client() as kms:
        made = kms.generate_and_export_data_key(
            key_id="alias/dev", number_of_bytes=24, encryption_context={"a": "b"}, **to.arguments
        )
        key = to.unwrap(made.exported_data_key)
        opened = kms.decrypt(ciphertext_blob=made.ciphertext_blob, encryption_context={"a": "b"})
        exported = kms.export_data_key(
            ciphertext_blob=made.ciphertext_blob, encryption_context='{"a":"b"}', **to.arguments
        )
        described = kms.describe_key(key_id=made.key_id)
        status = kms.get_agent_status()
    assert len(key) == 24
    assert base64.b64decode(opened.plaintext) == to.unwrap(exported.exported_data_key) == key
    assert described.key_metadata.key_id == made.key_id
    assert described.key_metadata.primary_key_version == made.key_version_id
    assert status.state == "Serving"
    assert status.counters is not None
    assert len({made.request_id, opened.request_id, exported.request_id, described.request_id, status.request_id}) == 5
    with pytest.raises(AttributeError):
        made.key_id = "x"  # type: ignore[misc]


def test_methods_match_the_declarations() -> None:
    """Each operation has one documented method with keyword arguments only."""
    client = Client("/nowhere")
    for operation in operations.OPERATIONS.values():
        name = "".join("_" + c.lower() if c.isupper() else c for c in operation.name).removeprefix("_")
        method = getattr(client, name)
        assert method.__doc__ == operation.doc
        assert callable(method)
    with pytest.raises(TypeError, match="keyword"):
        client.describe_key("alias/dev")
    with pytest.raises(TypeError):
        client.describe_key()  # type: ignore[call-arg]
    assert repr(Client.decrypt) == "Operation(Decrypt)"
    assert repr(client) == "Client('/nowhere')"


def test_a_public_key_is_taken_as_base64_der_and_pem(agent: RunningAgent) -> None:
    """Base64, DER and PEM of one key name the same recipient."""
    text = encode_base64(RSA.der)
    pem = f"-----BEGIN PUBLIC KEY-----\n{text[:64]}\n{text[64:]}\n-----END PUBLIC KEY-----\n".encode()
    with agent.client() as kms:
        for form in (text, RSA.der, pem):
            made = kms.generate_and_export_data_key(
                key_id="alias/dev",
                public_key_blob=form,
                wrapping_key_spec="RSA_2048",
                wrapping_algorithm="RSAES_OAEP_SHA_256",
            )
            assert len(RSA.unwrap(made.exported_data_key)) == 32
    for wrong in (
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----",
        b"-----BEGIN PUBLIC KEY-----\n*\n-----END PUBLIC KEY-----",
    ):
        with pytest.raises(ValueError, match=r"PUBLIC KEY|base64"):
            pem_to_der(wrong)


def test_refusals_are_exceptions_with_all_four_fields(agent: RunningAgent) -> None:
    """Subclasses of the exception name the side that can act."""
    with agent.client() as kms:
        with pytest.raises(NotFound) as caught:
            kms.describe_key(key_id="alias/none")
        error = caught.value
        assert (error.code, error.http_status) == ("Forbidden.AliasNotFound", 404)
        assert error.message == "The specified Alias is not found."
        assert error.request_id in str(error)
        with pytest.raises(InvalidRequest, match="EncryptionContext"):
            kms.decrypt(ciphertext_blob="AAAA")
        with pytest.raises(DryRun, match="DryRunOperationError"):
            kms.generate_and_export_data_key(key_id="alias/dev", dry_run=True, **RSA.arguments)
        assert kms.get_agent_status().state == "Serving"


def test_every_code_has_its_exception() -> None:
    """A code that this version does not know raises a plain KmsError."""
    retryable: set[type[KmsError]] = {Throttled, ServiceUnavailable, InternalFailure}
    children: set[type[KmsError]] = {AccessDenied, NotFound, InvalidRequest, KeyUnusable, DryRun, *retryable}
    assert {type(kms_error(code)) for code in CODES} == children
    others: tuple[type[KeyferryError], ...] = (KmsError, KeyferryError, ProtocolError)
    assert {child for child in (*children, *others) if child.retryable} == retryable
    assert type(kms_error("Brand.New", message="m", http_status=418)) is KmsError
    assert kms_error("Brand.New", message="m").http_status == 0
    for child in (*children, KmsError, AgentUnavailable, ProtocolError):
        assert issubclass(child, KeyferryError)


def test_threads_share_a_client(agent: RunningAgent) -> None:
    """Threads that share a client get their own answers."""
    with agent.client() as kms, ThreadPoolExecutor(8) as pool:

        def size(number: int) -> int:
            made = kms.generate_and_export_data_key(key_id="alias/dev", number_of_bytes=number, **RSA.arguments)
            return len(RSA.unwrap(made.exported_data_key))

        assert list(pool.map(size, range(1, 101))) == list(range(1, 101))


def test_a_forked_child_and_its_parent_both_go_on(agent: RunningAgent) -> None:
    """The child reconnects, even if a thread of the parent was in a call during the fork."""
    with agent.client() as kms:
        kms.get_agent_status()
        with kms._lock:  # as if another thread were calling
            child = os.fork()
            if child == 0:
                try:
                    assert kms._connection is None  # the parent's is the parent's
                    os._exit(0 if kms.get_agent_status().state == "Serving" else 1)
                except BaseException:
                    os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert kms.get_agent_status().state == "Serving"


def test_a_call_after_a_restart_is_sent_to_the_new_agent(socket_path: Path) -> None:
    """A client whose agent restarted reconnects by itself."""
    with dev_agent(socket_path) as first:
        kms = first.client()
        before = kms.get_agent_status()
        first.stop()
    with pytest.raises(AgentUnavailable):
        kms.get_agent_status()
    with dev_agent(socket_path), kms:
        assert kms.get_agent_status().request_id != before.request_id
    kms.close()


def test_timeout_includes_the_wait_for_other_threads(agent: RunningAgent) -> None:
    """Waiting for the connection is a part of the call."""
    with (
        Client(agent.socket, timeout=0.05) as kms,
        kms._lock,
        ThreadPoolExecutor(1) as pool,
        pytest.raises(AgentUnavailable, match="other threads"),
    ):
        pool.submit(kms.get_agent_status).result()


def test_client_waits_for_a_full_connection_queue(socket_path: Path) -> None:
    """An agent with a full queue is busy, not absent."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(socket_path))
        listening.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(8)]
        try:
            for connection in waiting:
                connection.setblocking(False)
                with suppress(BlockingIOError):
                    connection.connect(str(socket_path))
            with Client(socket_path, timeout=0.1) as kms, pytest.raises(AgentUnavailable, match="within"):
                kms.get_agent_status()
        finally:
            for connection in waiting:
                connection.close()


def test_zero_is_sent_and_false_is_not() -> None:
    """The agent has to refuse a length of 0, so the client sends it; DryRun=False is the default, and left out."""
    request = operations.GenerateAndExportDataKey("k", "p", "s", "a", number_of_bytes=0, dry_run=False)
    assert declaration.request_to_wire(request)["NumberOfBytes"] == 0
    assert "DryRun" not in declaration.request_to_wire(request)


def test_a_client_can_be_closed_and_used_again(agent: RunningAgent) -> None:
    """A closed client reconnects at its next call."""
    kms = agent.client()
    for _ in range(2):
        assert kms.get_agent_status()
        kms.close()


def test_an_agent_that_does_not_answer_in_time_is_unavailable(agent: RunningAgent, socket_path: Path) -> None:
    """The timeout bounds the whole call, and the next call starts a new one."""
    with dev_agent(socket_path) as stopped, Client(socket_path, timeout=0.1) as kms:
        stopped.signal(signal.SIGSTOP)
        with pytest.raises(AgentUnavailable, match=r"within 0\.1 s"):
            kms.get_agent_status()
        stopped.signal(signal.SIGCONT)
    with Client(agent.socket, timeout=0) as late, pytest.raises(AgentUnavailable):
        late.get_agent_status()


def test_signals_do_not_extend_a_timeout(socket_path: Path) -> None:
    """Each signal interrupts the wait, which continues with the remaining time."""
    signals: list[int] = []

    def counted(number: int, _frame: object) -> None:
        signals.append(number)
        if len(signals) == 300:
            signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, counted)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(socket_path))
        deaf.listen()
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
            with Client(socket_path, timeout=0.2) as kms, pytest.raises(AgentUnavailable, match="within"):
                kms.get_agent_status()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert 0 < len(signals) < 300


def test_broken_new_connections_are_retried_a_few_times(socket_path: Path) -> None:
    """One can meet an agent that goes, another its crash; more of them are a fault."""
    with client_of(socket_path, *[send_bytes(b"")] * MAX_LOST_CONNECTIONS) as client, pytest.raises(AgentUnavailable):
        client.call("GetAgentStatus", {})


def test_a_fresh_connection_that_breaks_is_not_the_end(socket_path: Path) -> None:
    """The next one meets an agent that answers."""
    with client_of(socket_path, *[send_bytes(b"")] * (MAX_LOST_CONNECTIONS - 1), respond_in_reverse(1)) as client:
        assert client.call("GetAgentStatus", {}) == {"RequestId": "GetAgentStatus"}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "array"),
        (wire.encode_request(1, "x", {}), "not a response"),
        (wire.encode_response(99, None, {}), "not that of an unanswered request"),
        (wire.encode_response(1, {"Code": 5}, None), "without a Code"),
        (wire.encode_response(None, {"Code": "ProtocolError", "Message": "floats"}, None), "floats"),
    ],
)
def test_peer_that_is_not_an_agent_is_a_protocol_error(socket_path: Path, data: bytes, why: str) -> None:
    """Any bytes that are not the expected answer raise ProtocolError."""
    with client_of(socket_path, send_bytes(data)) as client, pytest.raises(ProtocolError, match=why):
        client.call("GetAgentStatus", {})


def test_an_answer_without_its_fields_is_a_protocol_error(socket_path: Path) -> None:
    """A missing field raises ProtocolError instead of leaving the result incomplete."""
    empty = wire.encode_response(1, None, {"RequestId": "r"})
    with client_of(socket_path, send_bytes(empty)) as client, pytest.raises(ProtocolError, match="KeyMetadata"):
        client.describe_key(key_id="alias/dev")


def test_agent_at_its_connection_limit_raises_throttling(socket_path: Path) -> None:
    """The agent's refusal of a connection has no msgid, and is accepted as the answer."""
    refusal = {"Code": "Rejected.Throttling", "Message": "QPS Limit Exceeded", "RequestId": "r", "HttpStatus": 429}
    with (
        client_of(socket_path, send_bytes(wire.encode_response(None, refusal, None))) as client,
        pytest.raises(Throttled),
    ):
        client.call("GetAgentStatus", {})


def test_a_request_that_is_too_long_is_not_sent(agent: RunningAgent) -> None:
    """The client knows the agent's limit on messages."""
    with agent.client() as kms, pytest.raises(InvalidRequest, match="longer"):
        kms.decrypt(ciphertext_blob="A" * 70_000)


def test_unusable_socket_is_named(tmp_path: Path) -> None:
    """The error names a socket that the user may not open, and a path that is too long for a socket."""
    with pytest.raises(AgentUnavailable, match="too long"):
        Client("/" + "x" * 200).get_agent_status()

    assert "may not open" in why_unreachable("/run/x", PermissionError(13, "Permission denied"))


def test_the_socket_comes_from_the_environment_or_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument wins over the environment and the default."""
    monkeypatch.delenv("KEYFERRY_SOCKET", raising=False)
    assert default_socket() == "/run/keyferry/agent.sock"
    monkeypatch.setenv("KEYFERRY_SOCKET", "/tmp/x.sock")
    assert repr(Client()) == "Client('/tmp/x.sock')"
    assert repr(Client("/y")) == "Client('/y')"


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), None, "soon"])
def test_invalid_timeout_is_refused_by_the_constructor(wrong: Any) -> None:
    """A wrong timeout does not wait for the first call."""
    with pytest.raises((ValueError, TypeError)):
        Client("/nowhere", timeout=wrong)


def test_two_clients_have_two_connections(agent: RunningAgent) -> None:
    with agent.client() as one, agent.client() as two, RawConnection(agent.socket):
        one.get_agent_status()
        counters = two.get_agent_status().counters
        assert counters is not None
        assert counters.connections >= 3


def test_the_package_has_one_version() -> None:
    """The client and the agent are released together."""
    import keyferry_agent  # noqa: PLC0415

    assert keyferry.__version__ == keyferry_agent.__version__
