"""The codec: any bytes are messages or ProtocolError, in any pieces."""

import sys
import tracemalloc
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyferry.errors import ProtocolError
from keyferry.protocol import fast_reader, wire

REQUEST = wire.encode_request(7, "DescribeKey", {"KeyId": "alias/dev", "n": 32, "blob": b"\0\xff", "no": None})
DECODED = wire.Request(7, "DescribeKey", {"KeyId": "alias/dev", "n": 32, "blob": b"\0\xff", "no": None})

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | text | st.binary(max_size=40)
shallow = scalars | st.lists(scalars, max_size=5) | st.dictionaries(text, scalars, max_size=5)
values = st.recursive(
    scalars | st.floats(), lambda inner: st.lists(inner, max_size=5) | st.dictionaries(text, inner, max_size=5)
)


def decode(data: bytes, step: int | None = None) -> list[wire.Message]:
    """All messages of some bytes, fed whole or in pieces of `step`."""
    decoder = wire.Decoder()
    messages: list[wire.Message] = []
    for start in range(0, len(data), step or len(data) or 1):
        decoder.feed(data[start : start + (step or len(data))])
        messages += decoder.messages()
    return messages


def test_message_decodes_however_the_stream_is_cut() -> None:
    """A message decodes whole, byte by byte, and with following bytes."""
    assert decode(REQUEST) == [DECODED]
    assert decode(REQUEST, step=1) == [DECODED]
    assert decode(REQUEST * 3) == [DECODED] * 3
    for step in range(1, len(REQUEST) + 2):
        assert decode(REQUEST * 3, step=step) == [DECODED] * 3


def test_truncated_message_is_incomplete() -> None:
    """Half a message is neither a message nor an error."""
    for end in range(1, len(REQUEST)):
        decoder = wire.Decoder()
        decoder.feed(REQUEST[:end])
        assert list(decoder.messages()) == []
        assert decoder.incomplete
    decoder.feed(REQUEST[-1:])
    assert list(decoder.messages()) == [DECODED]
    assert not decoder.incomplete


@given(st.integers(0, 2**32 - 1), text, st.dictionaries(text, shallow, max_size=5))
def test_encoded_request_decodes_to_itself(msgid: int, method: str, params: dict[str, object]) -> None:
    """A request is equal to its decoded encoding."""
    packed = wire.encode_request(msgid, method, params)
    assert decode(packed) == [wire.Request(msgid, method, params)]


@given(
    st.lists(st.binary(max_size=30) | st.sampled_from([REQUEST, REQUEST[:5], b"\x94\0\x01", b"\xdd\xff\xff\xff\xff"]))
)
def test_any_bytes_are_messages_or_a_protocol_error(pieces: list[bytes]) -> None:
    """The codec raises no other exception, however the bytes are cut."""
    data = b"".join(pieces)
    outcomes = []
    for step in (None, 1, 3):
        decoder = wire.Decoder()
        got: list[object] = []
        try:
            for start in range(0, len(data), step or len(data) or 1):
                decoder.feed(data[start : start + (step or len(data))])
                got += decoder.messages()
        except ProtocolError as error:
            got.append(str(error))
        outcomes.append(got)
    assert outcomes[0] == outcomes[1] == outcomes[2]


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1]), st.sampled_from("abc")),
        min_size=1,
    ),
    st.integers(1, 40),
)
def test_equal_requests_have_equal_bodies_however_they_are_cut(asked: list[tuple[int, str]], step: int) -> None:
    """The decision cache recognises a repeated request by its body; the message ID is separate."""
    data = b"".join(wire.encode_request(msgid, method, {"k": method * 9}) for msgid, method in asked)
    known: dict[bytes, wire.Request | wire.InvalidRequest] = {}
    decoder = wire.Decoder()
    got = []
    for start in range(0, len(data), step):
        decoder.feed(data[start : start + step])
        for message in decoder.packed_messages():
            assert isinstance(message, wire.PackedRequest)
            request = message.parse()
            assert known.setdefault(message.body, request)[1:] == request[1:]
            got.append((message.msgid, request.method))
    assert got == asked
    assert len(known) == len({method for _, method in asked})


def test_only_requests_are_left_packed() -> None:
    """A response, a notification, an array of three and one that begins with true have no body to compare."""
    decoder = wire.Decoder()
    bodies: list[list[object]] = [[1, 5, None, {}], [2, "m", [{}]], [0, 5, "m"], [True, 5, "m", [{}]]]
    for body in bodies:
        decoder.feed(msgpack.packb(body))
    got = [*decoder.packed_messages()]
    assert len(got) == 4
    assert not [message for message in got if isinstance(message, wire.PackedRequest)]


def test_decoder_peeks_at_a_request_and_skips_it() -> None:
    """A known body needs no parsing; other received bytes are not shown as a request."""
    decoder = wire.Decoder()
    assert decoder.peek() is None
    decoder.feed(REQUEST)
    packed = decoder.peek()
    assert [packed] == [*decoder.packed_messages()]
    decoder.feed(REQUEST)
    decoder.skip()
    assert not decoder.incomplete
    decoder.feed(wire.encode_notification("m", {}))
    assert decoder.peek() is None
    assert decode(REQUEST) == [packed.parse()] if packed else False


def test_partly_parsed_request_is_not_peeked_at() -> None:
    """The decoder is in the middle of the request."""
    decoder = wire.Decoder()
    decoder.feed(REQUEST[:-1])
    assert [*decoder.packed_messages()] == []
    decoder.feed(REQUEST[-1:])
    assert decoder.peek() is None
    assert len([*decoder.messages()]) == 1


@given(values)
def test_any_well_formed_message_decodes_or_is_refused(body: object) -> None:
    """The codec raises no exception but ProtocolError for valid MessagePack."""
    with suppress(ProtocolError):
        assert len(decode(msgpack.packb(body))) == 1


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xc1", "0xC1"),
        (b"\xca\0\0\0\0", "floats"),
        (b"\x94\0\x01\xa1x\x91\x81\xa1k\xcb" + bytes(8), "floats"),
        (b"\xd4\x05\0", "extension"),
        (b"\xd6\xff\0\0\0\0", "extension"),  # a timestamp
        (b"\xc7\0\x05", "extension"),
        (b"\x94\0\x01\xa1x\x91\x81\x01\x02", "map key"),
        (b"\x94\0\x01\xa1x\x91\x81\xc4\x01k\x02", "map key"),
        (b"\x94\0\x01\xa1x\x91\x81\xc0\x02", "map key"),
        (b"\x94\0\x01\xa1x\x91\x82\xa1k\x01\xa1k\x02", "twice"),
        (b"\xdd\xff\xff\xff\xff", "entries"),
        (b"\xdc\x00\x41", "entries"),
        (b"\xdf\xff\xff\xff\xff", "entries"),
        (b"\xde\x04\x01", "entries"),
        (b"\xdb\xff\xff\xff\xff", "longer"),
        (b"\xc6\x00\x01\x00\x00", "longer"),
        (b"\x91" * 9, "nested"),
        (b"\x2a", "array"),
        (b"\x80", "array"),
        (b"\x90", "array"),
        (b"\x94\0\xa1x\xa1x\x90", "msgid"),
        (b"\x94\0\xff\xa1x\x90", "msgid"),
        (b"\x94\0\xcf\0\0\0\x01\0\0\0\0\xa1x\x90", "msgid"),
        (b"\x94\0\xc3\xa1x\x90", "msgid"),
        (b"\x94\0\xc0\xa1x\x90", "msgid"),
    ],
)
def test_invalid_message_is_refused_with_the_reason(data: bytes, why: str) -> None:
    """Limits and refused types are noticed at the header, before the announced bytes, in pieces of any size."""
    for step in (None, 1):
        with pytest.raises(ProtocolError, match=why):
            decode(data, step)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x94\0\x05\x2a\x91\x80", wire.InvalidRequest(5, "the method is not a string")),
        (b"\x94\0\x05\xa1x\x80", wire.InvalidRequest(5, "the parameters are not an array of one map", "x")),
        (b"\x94\0\x05\xa1x\x90", wire.InvalidRequest(5, "the parameters are not an array of one map", "x")),
        (b"\x94\0\x05\xa1x\x91\xc0", wire.InvalidRequest(5, "the parameters are not an array of one map", "x")),
        (b"\x94\0\x05\xa1x\x92\x80\x80", wire.InvalidRequest(5, "the parameters are not an array of one map", "x")),
        (b"\x93\0\x05\xa1x", wire.InvalidRequest(5, "a request is an array of four: [0, msgid, method, [params]]")),
        (b"\x94\x09\x05\xa1x\x90", wire.InvalidRequest(5, "a request begins with 0: [0, msgid, method, [params]]")),
        (b"\x94\xc2\x05\xa1x\x90", wire.InvalidRequest(5, "a request begins with 0: [0, msgid, method, [params]]")),
        (b"\x94\x01\x05\xc0\xc0", wire.InvalidRequest(5, "a request begins with 0: [0, msgid, method, [params]]")),
        (b"\x94\x01\x05\x80\xc0", wire.Response(5, {}, None)),
        (b"\x94\x01\xc0\x80\xc0", wire.Response(None, {}, None)),
        (b"\x93\x02\xa1x\x90", wire.Notification()),
        (b"\x92\x02\xa1x", wire.Notification()),
        (b"\x91\x02", wire.Notification()),
        (b"\x94\x02\xa1x\x91\x80\x05", wire.Notification()),
    ],
)
def test_well_formed_messages_are_classified(data: bytes, message: wire.Message) -> None:
    """A message with a usable msgid can be answered, and the stream goes on."""
    assert decode(data + REQUEST) == [message, DECODED]


def test_without_fast_reader_map_keys_are_not_interned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client chooses the keys. Where interned strings are immortal, each key would stay as long as the process lives."""
    monkeypatch.setattr(fast_reader, "_IS_ENABLED", False)
    for step in (None, 1):
        (message,) = decode(wire.encode_request(1, "x", {"a": {f"nobody has {1}": [{"": "b"}, 5]}}), step)
        assert message == wire.Request(1, "x", {"a": {"nobody has 1": [{"": "b"}, 5]}})
        assert isinstance(message, wire.Request)
        (key,) = message.params["a"]
        same = key[:3] + key[3:]
        assert sys.intern(same) is not key
        with pytest.raises(ProtocolError, match="twice"):
            decode(b"\x94\0\x01\xa1x\x91\x82\xa1k\x01\xa1k\x02", step)


def test_fast_reader_is_used_where_map_keys_are_released() -> None:
    """An immortal string has a reference count of billions, and a key that was parsed has one of a few."""
    (key,) = msgpack.unpackb(msgpack.packb({f"something new {id(sys)}": 0}))
    assert (sys.getrefcount(key) < 10_000) is fast_reader._IS_ENABLED


def test_largest_allowed_values_are_accepted() -> None:
    """The largest map, array, nesting and message are decoded."""
    nested: object = {}
    for _ in range(4):
        nested = [nested]
    for params in (
        {f"k{i}": i for i in range(wire.MAX_MAP)},
        {"a": list(range(wire.MAX_ARRAY))},
        {"deep": nested},
        {"long": "x" * (wire.MAX_MESSAGE - 15)},
    ):
        data = wire.encode_request(1, "x", params)
        assert decode(data) == [wire.Request(1, "x", params)]
        assert decode(data, step=1000) == [wire.Request(1, "x", params)]
    assert len(data) == wire.MAX_MESSAGE


@pytest.mark.parametrize("claim", [b"\xde\x04\x00\xa0", b"\xdc\x00\x40", b"\x8f\xa0", b"\x9f"])
def test_claimed_sizes_of_nested_headers_are_not_allocated(claim: bytes) -> None:
    """Each sent byte takes a few hundred bytes at most, which is as much as the smallest values take."""
    sent = claim * 1_000
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="nested"):
            decode(sent)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 256 * len(sent) + 65_536


def test_overlong_message_is_refused_before_its_end() -> None:
    """The limit applies to the whole message, wherever its bytes are."""
    long = msgpack.packb([0, 1, "x", [{"long": "x" * (wire.MAX_MESSAGE - 14)}]])
    assert len(long) == wire.MAX_MESSAGE + 1
    for received in (long[:100], long, REQUEST + long):
        with pytest.raises(ProtocolError, match="longer"):
            decode(received)
    many = msgpack.packb([0, 1, "x", [{str(i): "y" * 200 for i in range(400)}]])
    with pytest.raises(ProtocolError, match="longer"):
        decode(many, step=1000)


def test_messages_before_an_error_are_returned() -> None:
    """An error ends the stream, and does not affect the messages before it."""
    decoder = wire.Decoder()
    decoder.feed(REQUEST + b"\xc1" + REQUEST)
    received = decoder.messages()
    assert next(received) == DECODED
    for _ in range(2):
        with pytest.raises(ProtocolError, match="0xC1"):
            next(decoder.messages())


def test_string_that_is_not_utf_8_keeps_its_bytes() -> None:
    """Neovim sends raw bytes as strings, so the parameter is refused and the connection stays."""
    (message,) = decode(b"\x94\0\x01\xa1x\x91\x81\xa1k\xa2\xff\xfe")
    assert message == wire.Request(1, "x", {"k": "\udcff\udcfe"})


def test_an_answer_that_is_too_long_is_not_sent() -> None:
    """The limit on messages holds in both directions."""
    with pytest.raises(ProtocolError, match="longer"):
        wire.encode_response(1, None, {"x": "y" * wire.MAX_MESSAGE})


def test_notification_is_encoded_with_type_2() -> None:
    """A notification is an array of type 2, method and params."""
    assert msgpack.unpackb(wire.encode_notification("x", {})) == [2, "x", [{}]]


def nested(depth: int) -> Any:
    """Return lists within lists: `depth` of them."""
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("largest", "too_large"),
    [
        ([0] * wire.MAX_ARRAY, [0] * (wire.MAX_ARRAY + 1)),
        ({str(n): 0 for n in range(wire.MAX_MAP)}, {str(n): 0 for n in range(wire.MAX_MAP + 1)}),
        (nested(wire.MAX_DEPTH - 3), nested(wire.MAX_DEPTH - 2)),
        ({"a": b"b"}, {"a": 1.0}),
        ({"a": None}, {1: None}),
        ((1, bytearray(1)), {"a": {1: "b"}}),
    ],
    ids=["array", "map", "depth", "type", "key", "inner key"],
)
def test_sender_refuses_what_a_peer_would_refuse(largest: Any, too_large: Any) -> None:
    """Parameters at the limits of a message are sent, and those above them raise before anything is sent."""
    wire.check_sendable({"parameter": largest})
    with pytest.raises(ProtocolError):
        wire.check_sendable({"parameter": too_large})


def test_protocol_has_version_1() -> None:
    """GetAgentStatus returns this number, and PROTOCOL.md describes it."""
    assert wire.PROTOCOL_VERSION == 1
