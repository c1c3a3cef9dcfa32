"""The codec: its two ways through a stream, and a second reader, agree on every stream, however it is cut."""

import functools
from collections.abc import Iterator
from itertools import cycle
from typing import Any
from unittest.mock import patch

from reference import wire_decoder

from keyferry.errors import ProtocolError
from keyferry.protocol import fast_reader, wire

from ..memory_bound import assert_memory_bounded

_MOST_STEPS = 256
_CLIENT = 100
"""Entries that a client takes in an array: a page of a list."""


def codec(data: bytes) -> None:
    """Check a stream, which the first two bytes cut into received pieces."""
    cuts, stream = data[:2], data[2:]
    for most in (wire.MAX_ARRAY, _CLIENT):
        whole = assert_memory_bounded(functools.partial(_whole, stream, most), len(stream), times=256)
        step = 1 + len(stream) // _MOST_STEPS
        stepwise = _decoded((stream[at : at + step] for at in range(0, len(stream), step)), most)
        assert stepwise == whole
        assert _decoded(_cut(stream, cuts), most) == whole
        assert _packed(iter([stream, stream]), most)[0][: len(whole[0])] == whole[0]
        assert _packed(_cut(stream, cuts), most) == whole
        with patch.object(fast_reader, "_IS_ENABLED", not fast_reader._IS_ENABLED):
            assert _whole(stream, most) == whole
        messages, error = whole
        second = wire_decoder.read(stream, most_entries=most)
        assert ([_plain(message) for message in messages], bool(error)) == second
    for message in messages:
        _goes_round(message)


def _whole(stream: bytes, most: int) -> tuple[list[wire.Message], str]:
    return _decoded(iter([stream]), most)


def _decoded(pieces: Iterator[bytes], most: int) -> tuple[list[wire.Message], str]:
    decoder = wire.Decoder(max_array=most)
    messages: list[wire.Message] = []
    try:
        for piece in pieces:
            decoder.feed(piece)
            messages += decoder.messages()
    except ProtocolError as error:
        _refuses_for_good(decoder, str(error))
        return messages, str(error)
    return messages, ""


def _packed(pieces: Iterator[bytes], most: int) -> tuple[list[wire.Message], str]:
    """The same by a reader that parses no request twice."""
    known: dict[bytes, wire.Request | wire.InvalidRequest] = {}
    decoder = wire.Decoder(max_array=most)
    messages: list[wire.Message] = []
    try:
        for piece in pieces:
            decoder.feed(piece)
            alone = decoder.peek()
            if alone is not None and alone.body in known:
                decoder.skip()
                messages.append(known[alone.body]._replace(msgid=alone.msgid))
            for message in decoder.packed_messages():
                if isinstance(message, wire.PackedRequest):
                    request = known.get(message.body) or known.setdefault(message.body, message.parse(most))
                    messages.append(request._replace(msgid=message.msgid))
                else:
                    messages.append(message)
    except ProtocolError as error:
        return messages, str(error)
    return messages, ""


def _refuses_for_good(decoder: wire.Decoder, why: str) -> None:
    decoder.feed(wire.encode_request(1, "x", {}))
    try:
        after = list(decoder.messages())
    except ProtocolError as again:
        assert str(again) == why
    else:
        raise AssertionError(f"after an error it gave {after}")


def _cut(stream: bytes, sizes: bytes) -> Iterator[bytes]:
    begin = 0
    for size in cycle(byte * byte + 1 for byte in sizes or b"\x10"):
        if begin >= len(stream):
            return
        yield stream[begin : begin + size]
        begin += size


def _plain(message: wire.Message) -> tuple[Any, ...]:
    match message:
        case wire.Request(msgid, method, params):
            return ("request", msgid, method, params)
        case wire.Response(answered, error, result):
            return ("response", answered, error, result)
        case wire.InvalidRequest(msgid):
            return ("unservable", msgid)
    return ("notification",)


def _goes_round(message: wire.Message) -> None:
    """Check that a message is encoded and read back the same, except for bytes in strings that are not UTF-8."""
    try:
        if isinstance(message, wire.Request):
            packed = wire.encode_request(*message[:3])
        elif isinstance(message, wire.Response):
            packed = wire.encode_response(*message)
        else:
            return
    except UnicodeEncodeError:
        return
    assert _decoded(iter([packed]), _CLIENT) == ([message], "")
