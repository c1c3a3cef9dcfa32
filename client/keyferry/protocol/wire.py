"""The MessagePack-RPC codec, without I/O: bytes to messages, and messages to bytes. The agent and both clients use it.

The codec makes one promise: for any bytes, `Decoder` yields messages or raises `ProtocolError`. Any other outcome is a bug.

The msgpack library parses only one complete message, whose size was checked first. Three readers work in this order:

1. msgpack's parser skips over the complete messages in the buffer. It builds no objects, and finds their ends three times as
   fast as the strict reader. A message that begins like a request is yielded packed: its caller may not need to parse it.
2. The fast reader (`fast_reader`) parses the others, and a request whose parameters are needed. msgpack's parser does that,
   with limits that bound its memory; then the rules that it lacks are checked. This reader only accepts messages: at a fault
   it returns None.
3. The strict reader (`msgpack_scanner`) decides about the rest: a fault, a large map, a message that arrives in pieces. It
   follows the headers, applies every limit and names the broken one, and then reads the message value by value.

So the first two only save time. A stream has the same messages and the same error however it is cut.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack

from ..errors import ProtocolError
from .fast_reader import SENDABLE, TEXT, parse_fast
from .msgpack_scanner import (
    MAX_ARRAY,
    MAX_DEPTH,
    MAX_MAP,
    MAX_MESSAGE,
    UNPACKER_BUFFER_BYTES,
    HeaderScanner,
    parse_strictly,
)

__all__ = [
    "MAX_ARRAY",
    "MAX_DEPTH",
    "MAX_MAP",
    "MAX_MESSAGE",
    "Decoder",
    "InvalidRequest",
    "Message",
    "Notification",
    "PackedRequest",
    "Request",
    "Response",
    "check_sendable",
    "encode_notification",
    "encode_request",
    "encode_response",
]

PROTOCOL_VERSION: Final = 1

MAX_MSGID: Final = 2**32 - 1


class Request(NamedTuple):
    """`[0, msgid, method, [params]]`, complete and well formed. The codec does not check that the operation exists."""

    msgid: int
    method: str
    params: dict[str, Any]


class PackedRequest(NamedTuple):
    """A complete message that begins like a request, not yet parsed.

    Equal requests have equal bodies, so a caller may remember what it did for a body. The codec itself remembers nothing.
    """

    msgid: int
    body: bytes
    """The bytes after the msgid."""

    def parse(self, max_array: int = MAX_ARRAY) -> "Request | InvalidRequest":
        """Return the request. Raises `ProtocolError`; after that, the rest of the stream cannot be trusted."""
        buffer = bytearray((_ARRAY_OF_FOUR, 0))
        buffer += msgpack.Packer(**_PACKER_OPTIONS).pack(self.msgid)  # never longer than the msgid was when received
        buffer += self.body
        elements = parse_fast(buffer, max_array)
        if elements is None:
            if not HeaderScanner(max_array).scan(buffer):
                raise ProtocolError("a message ends before its last value")
            elements = parse_strictly(buffer)
        message = _to_message(elements)
        assert isinstance(message, Request | InvalidRequest)  # the message begins with 0 and a msgid
        return message


class Response(NamedTuple):
    """`[1, msgid, error, result]`: exactly one of error and result is None.

    msgid is None when the agent could not read the request.
    """

    msgid: int | None
    error: dict[str, Any] | None
    result: dict[str, Any] | None


class Notification(NamedTuple):
    """`[2, method, params]`: has no effect, and the agent does not answer it."""


class InvalidRequest(NamedTuple):
    """Well-formed msgpack with a message ID to answer to, which is not a valid request.

    Unlike after a `ProtocolError`, the stream stays usable.
    """

    msgid: int
    why: str
    method: str = ""


Message: TypeAlias = Request | Response | Notification | InvalidRequest


class Decoder:
    """Turns a stream of bytes into messages: pass received bytes to `feed`, then iterate over `messages`.

    `max_array` is `MAX_ARRAY`, or more for a client, whose answers may hold a page of a list. After a `ProtocolError` the
    stream cannot be trusted, so the decoder raises the same error on every later call.
    """

    __slots__ = ("_buffer", "_error", "_max_array", "_scanner")

    def __init__(self, *, max_array: int = MAX_ARRAY) -> None:
        self._max_array = max_array
        self._buffer = bytearray()
        self._error: ProtocolError | None = None
        self._scanner: HeaderScanner | None = None
        """The scanner of the buffer's first message. It keeps its position, so no header is scanned twice."""

    @property
    def incomplete(self) -> bool:
        """Return whether a part of a message was received, whose end the peer has not sent yet."""
        return bool(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append received bytes to the buffer, in pieces of any size."""
        self._buffer += data

    def messages(self) -> Iterator[Message]:
        """Yield each complete message. Raises `ProtocolError` at the first invalid one, and again on every later call."""
        for message in self.packed_messages():
            if not isinstance(message, PackedRequest):
                yield message
                continue
            try:
                request = message.parse(self._max_array)
            except ProtocolError as error:
                self._error = error
                raise
            yield request

    def packed_messages(self) -> Iterator[PackedRequest | Message]:
        """Yield the same messages as `messages`, but requests unparsed, as `PackedRequest`, for the caller to parse.

        After `PackedRequest.parse` has raised `ProtocolError`, the caller must not take further messages.
        """
        while self._buffer:
            if self._error:
                raise self._error
            try:
                if self._scanner is None:
                    yield from self._skipped_messages()
                    if self._buffer:
                        self._scanner = HeaderScanner(self._max_array)
                    continue
                message = self._scanned_message()
            except ProtocolError as error:
                self._error = error
                raise
            if message is None:
                return
            yield message

    def peek(self) -> PackedRequest | None:
        """Return the whole buffer as one request, without checking its structure; None if it does not begin like a request.

        The codec does not know which bodies it has yielded before; the caller has to. The buffer is one request only if its
        body equals that of a well-formed request which `messages` or `packed_messages` has yielded. Only in that case may the
        caller consume the buffer by `skip`.
        """
        size = len(self._buffer)
        if self._scanner is not None or self._error is not None or size > MAX_MESSAGE:
            return None
        return _split_request(self._buffer, size)

    def skip(self) -> None:
        """Overwrite the buffer and empty it."""
        self._discard(len(self._buffer))

    def _skipped_messages(self) -> Iterator[PackedRequest | Message]:
        """Yield the complete messages at the beginning of the buffer, up to the first one that needs the scanner."""
        unpacker = msgpack.Unpacker(max_buffer_size=0, read_size=UNPACKER_BUFFER_BYTES)
        unpacker.feed(self._buffer)
        start = 0
        while True:
            try:
                unpacker.skip()
            except Exception:  # for any fault: the scanner finds out which
                return
            size = unpacker.tell() - start
            message = self._fast_message(size)
            if message is None:
                return
            self._discard(size)
            start += size
            yield message

    def _fast_message(self, size: int) -> PackedRequest | Message | None:
        """Return the message in the first `size` bytes of the buffer; None if it needs the scanner."""
        if size > MAX_MESSAGE:
            return None
        request = _split_request(self._buffer, size)
        if request is not None:
            return request
        elements = parse_fast(self._buffer[:size], self._max_array)
        return None if elements is None else _to_message(elements)

    def _scanned_message(self) -> PackedRequest | Message | None:
        """Return the first message in the buffer, checked by the scanner; None if its end has not been received."""
        assert self._scanner is not None
        if not self._scanner.scan(self._buffer):
            return None
        size, self._scanner = self._scanner.position, None
        message = _split_request(self._buffer, size) or _to_message(parse_strictly(self._buffer[:size]))
        self._discard(size)
        return message

    def _discard(self, size: int) -> None:
        self._buffer[:size] = bytes(size)  # overwrite first: a request can hold a plaintext
        del self._buffer[:size]


def _split_request(buffer: bytearray, size: int) -> PackedRequest | None:
    """Return the first `size` bytes as a `PackedRequest` if they begin like a request, and None for any other message."""
    if size < _MIN_SPLIT_BYTES or buffer[0] != _ARRAY_OF_FOUR or buffer[1] != 0:
        return None
    first_byte = buffer[2]
    if first_byte <= _MAX_FIXINT:
        return PackedRequest(first_byte, bytes(buffer[3:size]))
    offset = _BODY_OFFSETS.get(first_byte)
    return (
        None if offset is None else PackedRequest(int.from_bytes(buffer[3:offset], "big"), bytes(buffer[offset:size]))
    )


_ARRAY_OF_FOUR: Final = 0x94
_MAX_FIXINT: Final = 0x7F
"""Largest msgid that is its own first byte."""
_MIN_SPLIT_BYTES: Final = 8
"""Least bytes of a message to split: the first two, a msgid of up to five, and one more."""
_BODY_OFFSETS: Final = {0xCC: 4, 0xCD: 5, 0xCE: 7}
"""Offset of the bytes after a msgid of 8, 16 or 32 bits, by the msgid's first byte.

A msgid of 64 bits is not listed: clients do not send it, and such a message is parsed as a whole.
"""


def _to_message(elements: Any) -> Message:
    if not isinstance(elements, list) or not elements:
        raise ProtocolError("a message is an array: [0, msgid, method, [params]]")
    kind = None if isinstance(elements[0], bool) else elements[0]  # to Python, true and 1 are equal
    if kind == 2:  # do not check the other elements: a notification has no answer that could report an error
        return Notification()
    msgid = elements[1] if len(elements) > 1 else None
    if isinstance(msgid, bool) or not isinstance(msgid, int | None) or not 0 <= (msgid or 0) <= MAX_MSGID:
        raise ProtocolError("msgid is not an unsigned 32-bit integer")
    if kind == 1 and len(elements) == 4:
        error, result = elements[2:]
        if isinstance(error, dict | None) and isinstance(result, dict | None) and (error is None) != (result is None):
            return Response(msgid, error, result)
    if msgid is None:
        raise ProtocolError("a message has no msgid to answer to")
    if kind != 0:
        return InvalidRequest(msgid, "a request begins with 0: [0, msgid, method, [params]]")
    return _to_request(msgid, elements[2:])


def _to_request(msgid: int, elements: list[Any]) -> Message:
    if len(elements) != 2:
        return InvalidRequest(msgid, "a request is an array of four: [0, msgid, method, [params]]")
    method, params = elements
    if not isinstance(method, str):
        return InvalidRequest(msgid, "the method is not a string")
    if not isinstance(params, list) or len(params) != 1 or not isinstance(params[0], dict):
        return InvalidRequest(msgid, "the parameters are not an array of one map", method)
    return Request(msgid, method, params[0])


def check_sendable(value: Any, depth: int = 3) -> None:
    """Raise `ProtocolError` for values that a peer would refuse: floats, keys that are not strings, containers over a limit.

    `depth` is the nesting depth of `value`, including itself: 3 for a request's map of parameters.
    """
    kind = type(value)
    if kind not in (dict, list, tuple):
        if kind in SENDABLE or isinstance(value, str | int | bytes | bytearray | memoryview):
            return
        raise ProtocolError(f"{kind.__name__} is not part of the protocol")
    if len(value) > (MAX_MAP if kind is dict else MAX_ARRAY) or depth > MAX_DEPTH:
        raise ProtocolError("a container has too many entries, or is nested too deep")
    if kind is dict:
        if not TEXT.issuperset(map(type, value)) and not all(isinstance(key, str) for key in value):
            raise ProtocolError("a map key is not a string")
        value = value.values()
    if not SENDABLE.issuperset(map(type, value)):
        for member in value:
            if type(member) not in SENDABLE:
                check_sendable(member, depth + 1)


# Where freed memory is overwritten, packb's own buffer of 256 KiB costs more time than the packing. msgpack before 1.1 does not
# have this option.
_PACKER_OPTIONS: Final[dict[str, int]] = {"buf_size": 1_000} if msgpack.version >= (1, 1) else {}


def _pack(elements: list[Any]) -> bytes:
    message: bytes = msgpack.Packer(**_PACKER_OPTIONS).pack(elements)
    if len(message) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(message)} bytes is longer than {MAX_MESSAGE}")
    return message


def encode_request(msgid: int, method: str, params: dict[str, Any]) -> bytes:
    """Pack a request. Raises `ProtocolError` if it is longer than `MAX_MESSAGE`."""
    return _pack([0, msgid, method, [params]])


def encode_response(msgid: int | None, error: dict[str, Any] | None, result: dict[str, Any] | None) -> bytes:
    """Pack a response: exactly one of `error` and `result` is None. Raises `ProtocolError` if it exceeds `MAX_MESSAGE`."""
    return _pack([1, msgid, error, result])


def encode_notification(method: str, params: dict[str, Any]) -> bytes:
    """Pack a notification, which has no answer."""
    return _pack([2, method, [params]])
