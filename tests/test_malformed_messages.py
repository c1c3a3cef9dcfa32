"""Messages that mean harm, to a real agent, between good ones: each is answered, or refused with its reason."""

from collections.abc import Iterator

import msgpack
import pytest
from support.calls import error, result
from support.stress import PING, AgentUnderTest, agent_under_stress, scale, until_closed

from keyferry.protocol import wire

STATUS, DESCRIBE, ENCRYPT = b"\xaeGetAgentStatus", b"\xabDescribeKey", b"\xa7Encrypt"
KEY_ID = b"\xa5KeyId"
MOST = 2**32 - 1


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentUnderTest]:
    """One agent for all of them, which has to be as it was after the last."""
    with agent_under_stress(tmp_path_factory.mktemp("messages")) as target:
        yield target


@pytest.fixture
def target(agent: AgentUnderTest) -> Iterator[AgentUnderTest]:
    """Yield the agent, and serve another client after each test."""
    yield agent
    agent.background.wait_served(2)


def request(msgid: bytes = b"\x05", method: bytes = STATUS, params: bytes = b"\x80") -> bytes:
    """A request of parts that are msgpack already."""
    return b"\x94\0" + msgid + method + b"\x91" + params


def describe(key_id: bytes) -> bytes:
    """DescribeKey of anything."""
    return request(method=DESCRIBE, params=b"\x81" + KEY_ID + key_id)


def encrypt(context: bytes) -> bytes:
    """Encrypt under any context."""
    named = b"\x83" + KEY_ID + b"\xa9alias/dev" + b"\xa9Plaintext\xa4AAAA" + b"\xb1EncryptionContext"
    return request(method=ENCRYPT, params=named + context)


def nested(depth: int) -> bytes:
    """Arrays in arrays in a request's parameter, which is the fourth container."""
    return describe(b"\x91" * (depth - 3) + b"\xc0")


INVALID = "InvalidParameter"
ANSWERED = {
    "msgid 0": (request(b"\0"), ""),
    "the largest msgid": (request(b"\xce\xff\xff\xff\xff"), ""),
    "a msgid in eight bytes": (request(b"\xcf" + bytes(7) + b"\x05"), ""),
    "a method of bytes": (request(method=b"\xc4\x01x"), INVALID),
    "a method that is nil": (request(method=b"\xc0"), INVALID),
    "a method that is not UTF-8": (request(method=b"\xa2\xff\xfe"), "InvalidAction.NotFound"),
    "a method without a name": (request(method=b"\xa0"), "InvalidAction.NotFound"),
    "a method of 60,000 characters": (request(method=b"\xda\xea\x60" + b"\n" * 60_000), "InvalidAction.NotFound"),
    "no parameters": (b"\x94\0\x05" + STATUS + b"\x90", INVALID),
    "two maps": (b"\x94\0\x05" + STATUS + b"\x92\x80\x80", INVALID),
    "five parts": (b"\x95\0\x05" + STATUS + b"\x91\x80\xc0", INVALID),
    "a kind of 3": (b"\x94\x03\x05" + STATUS + b"\x91\x80", INVALID),
    "a negative kind": (b"\x94\xff\x05" + STATUS + b"\x91\x80", INVALID),
    "a kind that is true": (b"\x94\xc3\x05" + STATUS + b"\x91\x80", INVALID),
    "a kind that is text": (b"\x94\xa10\x05" + STATUS + b"\x91\x80", INVALID),
    "a key ID of bytes": (describe(b"\xc4\x09alias/dev"), INVALID),
    "a key ID that is not UTF-8": (describe(b"\xa2\xc3\x28"), INVALID),
    "a key ID with a lone surrogate": (describe(b"\xa3\xed\xa0\x80"), INVALID),
    "a key ID that is a number": (describe(b"\xcf" + b"\xff" * 8), INVALID),
    "a key ID that is a map of itself": (describe(b"\x81" + KEY_ID + b"\x81" + KEY_ID + b"\x80"), INVALID),
    "a parameter without a name": (request(params=b"\x81\xa0\xc0"), INVALID),
    "a parameter whose name is not UTF-8": (request(params=b"\x81\xa1\xff\xc3"), INVALID),
    "containers at the limit": (nested(8), INVALID),
    "a context whose key is not UTF-8": (encrypt(b"\x81\xa1\xff\xa1v"), INVALID),
    "a context whose value is bytes": (encrypt(b"\x81\xa1k\xc4\x01v"), INVALID),
    "a context of maps": (encrypt(b"\x81\xa1k\x80"), INVALID),
    "a context of JSON in JSON": (encrypt(b"\xda\x1f\x40" + b"[" * 8_000), INVALID),
    "a context of a number that is too large": (encrypt(b"\xda\x1f\x40" + b"9" * 8_000), INVALID),
    "a context with a key twice in JSON": (encrypt(b'\xb1{"a":"1","a":"2"}'), INVALID),
    "a page before the first": (
        request(method=b"\xa8ListKeys", params=b"\x81\xaaPageNumber\xd3\x80" + bytes(7)),
        INVALID,
    ),
    "a page that is true": (request(method=b"\xa8ListKeys", params=b"\x81\xaaPageNumber\xc3"), INVALID),
    "a blob of 60,000 zeros": (
        request(method=b"\xa7Decrypt", params=b"\x81\xaeCiphertextBlob\xc5\xea\x60" + bytes(60_000)),
        INVALID,
    ),
    "a blob of nothing": (request(method=b"\xa7Decrypt", params=b"\x81\xaeCiphertextBlob\xc4\0"), INVALID),
    "a key that is no key": (
        request(
            method=b"\xadExportDataKey",
            params=b"\x84\xaeCiphertextBlob\xc4\x01x\xadPublicKeyBlob\xc5\xc3\x50"
            + b"\x30\x84\xff\xff\xff\xff" * 8_333
            + b"\x30\0\xafWrappingKeySpec\xa8RSA_2048\xb1WrappingAlgorithm\xb2RSAES_OAEP_SHA_256",
        ),
        INVALID,
    ),
}

REFUSED = {
    "a float": describe(b"\xca\0\0\0\0"),
    "not a number": describe(b"\xcb\x7f\xf8" + bytes(6)),
    "an extension": describe(b"\xd4\x05x"),
    "a timestamp": describe(b"\xd6\xff\0\0\0\0"),
    "an extension that claims 4 GiB": describe(b"\xc9\xff\xff\xff\xff\x05"),
    "text that claims 4 GiB": describe(b"\xdb\xff\xff\xff\xff"),
    "bytes that claim 4 GiB": describe(b"\xc6\xff\xff\xff\xff"),
    "an array that claims 4 billion": describe(b"\xdd\xff\xff\xff\xff"),
    "a map that claims 4 billion": describe(b"\xdf\xff\xff\xff\xff"),
    "a message that claims 4 billion": b"\xdd\xff\xff\xff\xff",
    "a message of 65 parts": b"\xdc\0\x41",
    "a map of 1,025 parameters": request(params=b"\xde\x04\x01"),
    "the byte that begins nothing": b"\xc1",
    "containers over the limit": nested(9),
    "a thousand containers": b"\x91" * 1_000,
    "thousands of maps in maps": describe(b"\xde\x04\0\xa1k" * 10_000),
    "a negative msgid": request(b"\xff"),
    "a msgid of 33 bits": request(b"\xcf" + bytes(3) + b"\1" + bytes(4)),
    "a msgid that is true": request(b"\xc3"),
    "a msgid that is nil": request(b"\xc0"),
    "a msgid that is text": request(b"\xa11"),
    "a result": b"\x94\x01\x05\xc0\x80",
    "an error": b"\x94\x01\x05\x80\xc0",
    "an answer to nobody": b"\x94\x01\xc0\x80\xc0",
    "a message of nothing": b"\x90",
    "nil": b"\xc0",
    "a number": b"\x2a",
    "text": b"\xa5hello",
    "a map": b"\x80",
    "a parameter twice": request(params=b"\x82" + KEY_ID + b"\xa1a" + KEY_ID + b"\xa1b"),
    "a context's key twice": encrypt(b"\x82\xa1k\xa11\xa1k\xa12"),
    "a key of bytes": request(params=b"\x81\xc4\x05KeyId\xa1a"),
    "a key that is a number": request(params=b"\x81\x01\xa1a"),
    "a key that is nil": request(params=b"\x81\xc0\xa1a"),
    "a key that is a map": request(params=b"\x81\x80\xa1a"),
    "one byte too many": request(method=b"\xdb\0\x01\0\0" + b"x" * 65_536),
    "another protocol": b"GET / HTTP/1.1\r\nHost: keyferry\r\n\r\n",
    "a handshake": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(500),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_answerable_message_is_refused_and_the_connection_stays(target: AgentUnderTest, name: str) -> None:
    """The refusal has the message's msgid and the documented code."""
    message, code = ANSWERED[name]
    with target.connect() as connection:
        connection.send(PING + message + PING)
        first, answer, last = (connection.answer() for _ in range(3))
    result(first)
    assert answer.msgid in (0, 5, MOST)
    assert (answer.error["Code"] if answer.error else "") == code
    result(last)


@pytest.mark.parametrize("name", REFUSED)
def test_unanswerable_message_ends_the_connection_with_a_reason(target: AgentUnderTest, name: str) -> None:
    """Earlier requests are answered first, and the log has the same reason."""
    with target.connect() as connection:
        connection.send(PING + REFUSED[name] + PING)
        first, refusal = until_closed(connection)
    assert first.error is None
    assert refusal.msgid is None
    assert error(refusal)["Code"] == "ProtocolError"
    why = error(refusal)["Message"].removesuffix(".")
    assert len(why) > 10
    assert target.agent.has_logged("connection.protocol_error", why=why)


def test_repeated_message_ids_are_answered_each_time(target: AgentUnderTest) -> None:
    """Message IDs are chosen by the client."""
    with target.connect() as connection:
        connection.send(PING * 100)
        answers = [connection.response() for _ in range(100)]
    assert {answer.msgid for answer in answers if answer} == {1}
    assert len({answer.result["RequestId"] for answer in answers if answer and answer.result}) == 100


def test_thousands_of_invalid_requests_are_each_recorded(target: AgentUnderTest) -> None:
    """Invalid requests neither use up memory nor delay other clients."""
    mix = [message for message, code in ANSWERED.values() if code and len(message) < 200]
    rounds = scale(5_000, 1_000_000) // len(mix)
    before = target.count_audited()
    mine = 0
    with target.connect() as connection:
        for done in range(0, rounds, 20):
            connection.send(b"".join(mix) * 20)
            for _ in range(20 * len(mix)):
                error(connection.response())
                mine += 1
            if done % 1_000 == 0:
                target.background.wait_served(1)
    assert mine >= rounds * len(mix)
    assert target.count_audited() >= before + mine


def test_cases_of_malformed_messages_are_distinct() -> None:
    """Messages with an answer are well-formed MessagePack, and no two messages are the same."""
    for message, _ in ANSWERED.values():
        assert isinstance(msgpack.unpackb(message, unicode_errors="surrogateescape"), list)
    assert len({message for message, _ in ANSWERED.values()} | {*REFUSED.values()}) == len(ANSWERED) + len(REFUSED)


def test_message_of_single_bytes_is_refused_at_the_limit(target: AgentUnderTest) -> None:
    """Of an announced MiB, 64 KiB are inspected and nothing is kept."""
    text = b"\xd9\xff" + b"x" * 255
    endless = request(method=DESCRIBE, params=b"\xde\x04\0" + b"".join(b"\xa4%04d" % i + text for i in range(1_024)))
    assert len(endless) > 4 * wire.MAX_MESSAGE
    with target.connect() as connection:
        for place in range(wire.MAX_MESSAGE + 300):
            connection.send(endless[place : place + 1])
        refusals = until_closed(connection)
    assert [refusal.error["Message"] for refusal in refusals if refusal.error] == [
        "a message is longer than 65536 bytes."
    ]
