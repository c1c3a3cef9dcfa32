"""The MessagePack-RPC codec, without I/O: bytes to messages, and messages to bytes. The agent and both clients use it.

The codec makes one promise: for any bytes, `Decoder` yields messages or raises `ProtocolError`. Any other outcome is a bug.

The msgpack library parses only one complete message, whose size was checked first. Either the library skipped the message
without building objects, or `HeaderScanner` followed its headers. The scanner applies every limit and names the broken one.
"""

import sys
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack

from ..errors import ProtocolError
from .msgpack_scanner import MAX_ARRAY, MAX_DEPTH, MAX_MAP, MAX_MESSAGE, HeaderScanner, container

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
    """A complete message that begins like a request, not yet parsed. Equal requests have equal bodies."""

    msgid: int
    body: bytes
    """The bytes after the msgid."""

    def parse(self, max_array: int = MAX_ARRAY) -> "Request | InvalidRequest":
        """Return the request. Raises `ProtocolError`; after that, the rest of the stream cannot be trusted."""
        packed = bytearray((_ARRAY_OF_FOUR, 0))
        packed += msgpack.Packer(**_SMALL).pack(self.msgid)  # never longer than the msgid was when received
        packed += self.body
        parsed = _parse_plain(packed, max_array)
        if parsed is None:
            if not HeaderScanner(max_array).follow(packed):
                raise ProtocolError("a message ends before its last value")
            parsed = _unpack(packed)
        message = _message(parsed)
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

    __slots__ = ("_broken", "_buffer", "_max_array", "_walk")

    def __init__(self, *, max_array: int = MAX_ARRAY) -> None:
        self._max_array = max_array
        self._buffer = bytearray()
        self._broken: ProtocolError | None = None
        self._walk: HeaderScanner | None = None
        """The scanner of a message that arrives in pieces. It keeps its position, so no header is scanned twice."""

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
                self._broken = error
                raise
            yield request

    def packed_messages(self) -> Iterator[PackedRequest | Message]:
        """Yield the same messages as `messages`, but requests unparsed, as `PackedRequest`, for the caller to parse.

        After `PackedRequest.parse` has raised `ProtocolError`, the caller must not take further messages.
        """
        while self._buffer:
            if self._broken:
                raise self._broken
            if self._walk is None:
                yield from self._whole()
                if self._buffer:
                    self._walk = HeaderScanner(self._max_array)
                continue
            try:
                if not self._walk.follow(self._buffer):
                    return
                size, self._walk = self._walk.position, None
                message = _split(self._buffer, size) or _message(_unpack(self._buffer[:size]))
            except ProtocolError as error:
                self._broken = error
                raise
            self._forget(size)
            yield message

    def peek(self) -> PackedRequest | None:
        """Return the whole buffer as one request, without checking its structure; None if it does not begin like a request.

        The buffer is one request only if its body equals that of a well-formed request which `messages` or `packed_messages`
        has yielded. Only in that case may the caller consume the buffer by `skip`.
        """
        size = len(self._buffer)
        return (
            _split(self._buffer, size) if self._walk is None and self._broken is None and size <= MAX_MESSAGE else None
        )

    def skip(self) -> None:
        """Overwrite the buffer and empty it."""
        self._forget(len(self._buffer))

    def _whole(self) -> Iterator[PackedRequest | Message]:
        """Yield the complete messages at the beginning of the buffer, found by msgpack's own parser.

        The parser is three times as fast as `HeaderScanner`, but has fewer limits. At anything unusual this generator ends, and
        the scanner names the fault. The parser's limits bound the memory that it allocates for the sizes in headers.
        """
        unpacker = msgpack.Unpacker(max_buffer_size=0, read_size=_RECEIVE_LEAST)
        unpacker.feed(self._buffer)
        begin = 0
        while True:
            try:
                unpacker.skip()
                end = unpacker.tell()
            except Exception:  # for any fault: the scanner finds out which
                return
            message = self._first(end - begin)
            if message is None:
                return
            self._forget(end - begin)
            begin = end
            yield message

    def _first(self, size: int) -> PackedRequest | Message | None:
        """Return the message in the first `size` bytes of the buffer; None if `HeaderScanner` has to check it."""
        if size > MAX_MESSAGE:
            return None
        request = _split(self._buffer, size)
        if request is not None:
            return request
        body = _parse_plain(self._buffer[:size], self._max_array)
        if body is None:
            return None
        try:
            return _message(body)
        except ProtocolError as error:
            self._broken = error
            raise

    def _forget(self, size: int) -> None:
        self._buffer[:size] = bytes(size)  # overwrite first: a request can hold a plaintext
        del self._buffer[:size]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ProtocolError("a map has the same key twice")
    return made


_MAP_AT_ONCE: Final = 64
"""Largest map passed to msgpack's fast path, which preallocates for the sizes that headers claim, up to 1,000 levels deep."""
_RECEIVE_LEAST: Final = 1_024
"""Initial size of the msgpack parser's buffer, in bytes."""
# A string that is not UTF-8 (neovim sends raw bytes as strings) keeps its bytes as lone surrogates. The check of a text
# parameter then refuses that parameter by name, and the connection survives.
_UNICODE_ERRORS: Final = "surrogateescape"


# msgpack interns the keys of maps. The first releases of Python 3.12 keep interned strings as long as the process
# lives, so a client that sends ever new keys would fill the memory. On these releases, values are read one by one.
_INTERNED_FOR_EVER: Final = sys.getrefcount(sys.intern(f"{__name__} {id(object())}")) > 2**16


def _unpack(packed: bytearray, **limits: int) -> Any:
    if _INTERNED_FOR_EVER:
        unpacker = msgpack.Unpacker(max_buffer_size=0, read_size=_RECEIVE_LEAST, unicode_errors=_UNICODE_ERRORS)
        unpacker.feed(packed)
        return _one_by_one(unpacker, packed)
    return msgpack.unpackb(packed, unicode_errors=_UNICODE_ERRORS, object_pairs_hook=_unique, **limits)


def _parse_plain(packed: bytearray, max_array: int) -> Any:
    """Return one message as msgpack's own parser decodes it; None where the message may break a rule of the protocol."""
    if _INTERNED_FOR_EVER:
        return None
    try:
        body = _unpack(packed, max_array_len=max_array, max_map_len=_MAP_AT_ONCE, max_ext_len=0)
    except Exception:  # for any fault: the scanner finds out which
        return None
    return body if _is_plain(body) else None


def _split(buffer: bytearray, size: int) -> PackedRequest | None:
    """Return the first `size` bytes as a `PackedRequest` if they begin like a request, and None for any other message."""
    if size < _SHORTEST or buffer[0] != _ARRAY_OF_FOUR or buffer[1] != 0:
        return None
    first = buffer[2]
    end = _BEHIND_MSGID.get(first, 3)
    if end == 3 and first > _LAST_FIXINT:
        return None
    return PackedRequest(first if end == 3 else int.from_bytes(buffer[3:end], "big"), bytes(buffer[end:size]))


_ARRAY_OF_FOUR: Final = 0x94
_LAST_FIXINT: Final = 0x7F
_SHORTEST: Final = 8
"""Least bytes of a message to split: the first two, a msgid of up to five, and one more."""
_BEHIND_MSGID: Final = {0xCC: 4, 0xCD: 5, 0xCE: 7}
"""Offset of the bytes after a msgid, by the msgid's first byte.

A msgid of 64 bits is not listed: clients do not send it, and such a message is parsed as a whole.
"""


def _one_by_one(unpacker: Any, packed: bytearray) -> Any:
    kind = container(packed[unpacker.tell()])
    if kind is list:
        return [_one_by_one(unpacker, packed) for _ in range(unpacker.read_array_header())]
    if kind is dict:
        size = unpacker.read_map_header()
        return _unique([(unpacker.unpack(), _one_by_one(unpacker, packed)) for _ in range(size)])
    return unpacker.unpack()


def _is_plain(value: Any, depth: int = 1) -> bool:
    """Return whether a value that msgpack's parser accepted is also valid in the protocol.

    `depth` is the nesting depth of the value, including itself.
    """
    kind, values = type(value), value
    if kind is dict:
        if not _TEXT.issuperset(map(type, value)):
            return False
        values = value.values()
    elif kind is not list:
        return kind in _SENDABLE
    if depth > MAX_DEPTH:
        return False
    # Compare the types as a set where that decides: a loop would take as long as the parsing.
    if _SENDABLE.issuperset(map(type, values)):
        return True
    for each in values:  # noqa: SIM110 - a generator is a function that is made each time
        if type(each) not in _SENDABLE and not _is_plain(each, depth + 1):
            return False
    return True


def _message(body: Any) -> Message:
    if not isinstance(body, list) or not body:
        raise ProtocolError("a message is an array: [0, msgid, method, [params]]")
    kind = None if isinstance(body[0], bool) else body[0]  # to Python, true and 1 are equal
    if kind == 2:  # do not check the other elements: a notification has no answer that could report an error
        return Notification()
    msgid = body[1] if len(body) > 1 else None
    if isinstance(msgid, bool) or not isinstance(msgid, int | None) or not 0 <= (msgid or 0) <= MAX_MSGID:
        raise ProtocolError("msgid is not an unsigned 32-bit integer")
    if kind == 1 and len(body) == 4:
        error, result = body[2], body[3]
        if isinstance(error, dict | None) and isinstance(result, dict | None) and (error is None) != (result is None):
            return Response(msgid, error, result)
    if msgid is None:
        raise ProtocolError("a message has no msgid to answer to")
    if kind != 0:
        return InvalidRequest(msgid, "a request begins with 0: [0, msgid, method, [params]]")
    return _request(msgid, body[2:])


def _request(msgid: int, rest: list[Any]) -> Message:
    if len(rest) != 2:
        return InvalidRequest(msgid, "a request is an array of four: [0, msgid, method, [params]]")
    method, params = rest
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
        if kind in _SENDABLE or isinstance(value, str | int | bytes | bytearray | memoryview):
            return
        raise ProtocolError(f"{kind.__name__} is not part of the protocol")
    if len(value) > (MAX_MAP if kind is dict else MAX_ARRAY) or depth > MAX_DEPTH:
        raise ProtocolError("a container has too many entries, or is nested too deep")
    if kind is dict:
        if not _TEXT.issuperset(map(type, value)) and not all(isinstance(key, str) for key in value):
            raise ProtocolError("a map key is not a string")
        value = value.values()
    if not _SENDABLE.issuperset(map(type, value)):
        for each in value:
            if type(each) not in _SENDABLE:
                check_sendable(each, depth + 1)


_SENDABLE: Final = frozenset({str, int, bool, bytes, type(None)})
_TEXT: Final = frozenset({str})


# Where freed memory is overwritten, packb's own buffer of 256 KiB costs more time than the packing. msgpack before 1.1 does not
# have this option.
_SMALL: Final[dict[str, int]] = {"buf_size": 1_000} if msgpack.version >= (1, 1) else {}


def _pack(body: list[Any]) -> bytes:
    packed: bytes = msgpack.Packer(**_SMALL).pack(body)
    if len(packed) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(packed)} bytes is longer than {MAX_MESSAGE}")
    return packed


def encode_request(msgid: int, method: str, params: dict[str, Any]) -> bytes:
    """Pack a request. Raises `ProtocolError` if it is longer than `MAX_MESSAGE`."""
    return _pack([0, msgid, method, [params]])


def encode_response(msgid: int | None, error: dict[str, Any] | None, result: dict[str, Any] | None) -> bytes:
    """Pack a response: exactly one of `error` and `result` is None. Raises `ProtocolError` if it exceeds `MAX_MESSAGE`."""
    return _pack([1, msgid, error, result])


def encode_notification(method: str, params: dict[str, Any]) -> bytes:
    """Pack a notification, which has no answer."""
    return _pack([2, method, [params]])
