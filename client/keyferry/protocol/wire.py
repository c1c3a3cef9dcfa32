"""MessagePack-RPC, without any I/O: bytes in, messages out, and the other way round. Both ends use it.

The one promise: whatever bytes are fed, `Decoder` gives messages or raises `ProtocolError`. Anything else is a bug.

The msgpack library is only ever shown one whole message that is known to be small: its structure was followed first, by the
library without making anything of it, or by `headers`, which knows every limit and why a message breaks it.
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
    """`[0, msgid, method, [params]]`, whole and well formed; whether the operation exists is for others to say."""

    msgid: int
    method: str
    params: dict[str, Any]


class PackedRequest(NamedTuple):
    """A whole message that begins as a request does, before it is parsed. Equal requests have equal bodies."""

    msgid: int
    body: bytes
    """The bytes behind the msgid."""

    def parse(self, max_array: int = MAX_ARRAY) -> "Request | InvalidRequest":
        """Return the request. Raises `ProtocolError`; then the stream that it came in cannot be trusted any more."""
        packed = bytearray((_ARRAY_OF_FOUR, 0))
        packed += msgpack.Packer(**_SMALL).pack(self.msgid)  # never longer than it was
        packed += self.body
        parsed = _parse_plain(packed, max_array)
        if parsed is None:
            if not HeaderScanner(max_array).follow(packed):
                raise ProtocolError("a message ends before its last value")
            parsed = _unpack(packed)
        message = _message(parsed)
        assert isinstance(message, Request | InvalidRequest)  # it begins with 0 and a msgid
        return message


class Response(NamedTuple):
    """`[1, msgid, error, result]`: exactly one of the two is None. msgid is None when the request could not be read."""

    msgid: int | None
    error: dict[str, Any] | None
    result: dict[str, Any] | None


class Notification(NamedTuple):
    """`[2, method, params]`: gets no answer and has no effect."""


class InvalidRequest(NamedTuple):
    """Well-formed msgpack with a message ID to answer to, but no request. Unlike a `ProtocolError`, the stream goes on."""

    msgid: int
    why: str
    method: str = ""


Message: TypeAlias = Request | Response | Notification | InvalidRequest


class Decoder:
    """Turns a stream of bytes into messages. `feed` it what was received, then take `messages` until there are none.

    `max_array` is `MAX_ARRAY`, or more for a client, whose answers may hold a page of a list. After a `ProtocolError` the
    stream cannot be trusted any more: the decoder refuses to go on.
    """

    __slots__ = ("_broken", "_buffer", "_max_array", "_walk")

    def __init__(self, *, max_array: int = MAX_ARRAY) -> None:
        self._max_array = max_array
        self._buffer = bytearray()
        self._broken: ProtocolError | None = None
        self._walk: HeaderScanner | None = None
        """Through a message that came in pieces: what was looked at is not looked at again."""

    @property
    def incomplete(self) -> bool:
        """Whether part of a message was received: the peer owes the rest of it."""
        return bool(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes as they were received, in pieces of any size."""
        self._buffer += data

    def messages(self) -> Iterator[Message]:
        """Yield each whole message received so far. Raises `ProtocolError`, for good, at the first that is none."""
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
        """Yield the same, but leave what begins as a request for the caller to parse.

        After `PackedRequest.parse` has raised `ProtocolError`, the caller takes no further message.
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
        """Return all that was received as one request, without following its structure; None where it begins otherwise.

        It is one request only if its body is equal to that of a request which `messages` or `packed_messages` has yielded, and
        which was well formed. In that case, and in no other, the caller takes it by `skip`.
        """
        size = len(self._buffer)
        return (
            _split(self._buffer, size) if self._walk is None and self._broken is None and size <= MAX_MESSAGE else None
        )

    def skip(self) -> None:
        """Drop all that was received."""
        self._forget(len(self._buffer))

    def _whole(self) -> Iterator[PackedRequest | Message]:
        """The messages at the beginning of the buffer that are there whole, by msgpack's own parser.

        It is three times as fast as the walk, and knows less: at whatever is out of the ordinary it leaves off, and the walk
        finds out what that is. What it may allocate for what a header claims is bounded by its limits.
        """
        unpacker = msgpack.Unpacker(max_buffer_size=0, read_size=_RECEIVE_LEAST)
        unpacker.feed(self._buffer)
        begin = 0
        while True:
            try:
                unpacker.skip()
                end = unpacker.tell()
            except Exception:  # whatever it is: the walk knows
                return
            message = self._first(end - begin)
            if message is None:
                return
            self._forget(end - begin)
            begin = end
            yield message

    def _first(self, size: int) -> PackedRequest | Message | None:
        """The message of `size` bytes at the beginning of the buffer; None where the walk has to look at it."""
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
        self._buffer[:size] = bytes(size)  # a request can hold a plaintext
        del self._buffer[:size]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ProtocolError("a map has the same key twice")
    return made


_MAP_AT_ONCE: Final = 64
"""Entries of a map that msgpack's parser is left to: it makes room for all that a header claims, a thousand headers deep."""
_RECEIVE_LEAST: Final = 1_024
"""Bytes of buffer that msgpack's parser begins with."""
# A string that is not UTF-8 (neovim sends raw bytes as strings) keeps its bytes as lone surrogates: whoever needs text refuses
# them by the parameter's name, instead of the whole connection.
_UNICODE_ERRORS: Final = "surrogateescape"


# msgpack interns the keys of maps. The first releases of Python 3.12 keep what is interned as long as the process
# lives: whoever sends ever new keys would fill the memory. There, values are read one by one.
_INTERNED_FOR_EVER: Final = sys.getrefcount(sys.intern(f"{__name__} {id(object())}")) > 2**16


def _unpack(packed: bytearray, **limits: int) -> Any:
    if _INTERNED_FOR_EVER:
        unpacker = msgpack.Unpacker(max_buffer_size=0, read_size=_RECEIVE_LEAST, unicode_errors=_UNICODE_ERRORS)
        unpacker.feed(packed)
        return _one_by_one(unpacker, packed)
    return msgpack.unpackb(packed, unicode_errors=_UNICODE_ERRORS, object_pairs_hook=_unique, **limits)


def _parse_plain(packed: bytearray, max_array: int) -> Any:
    """What msgpack's own parser makes of one message; None where that is not quite in the protocol."""
    if _INTERNED_FOR_EVER:
        return None
    try:
        body = _unpack(packed, max_array_len=max_array, max_map_len=_MAP_AT_ONCE, max_ext_len=0)
    except Exception:  # whatever it is: the walk knows
        return None
    return body if _is_plain(body) else None


def _split(buffer: bytearray, size: int) -> PackedRequest | None:
    """The request that the first `size` bytes are, if they begin as one; None for all other messages."""
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
"""Bytes of a request whose msgid takes five."""
_BEHIND_MSGID: Final = {0xCC: 4, 0xCD: 5, 0xCE: 7}
"""Where the bytes behind a msgid begin, by its first byte. One in 64 bits, which no client sends, is parsed as a whole."""


def _one_by_one(unpacker: Any, packed: bytearray) -> Any:
    kind = container(packed[unpacker.tell()])
    if kind is list:
        return [_one_by_one(unpacker, packed) for _ in range(unpacker.read_array_header())]
    if kind is dict:
        size = unpacker.read_map_header()
        return _unique([(unpacker.unpack(), _one_by_one(unpacker, packed)) for _ in range(size)])
    return unpacker.unpack()


def _is_plain(value: Any, depth: int = 1) -> bool:
    """Whether what msgpack's parser took is in the protocol, too. `depth`: containers that it is in, itself included."""
    kind, values = type(value), value
    if kind is dict:
        if not _TEXT.issuperset(map(type, value)):
            return False
        values = value.values()
    elif kind is not list:
        return kind in _SENDABLE
    if depth > MAX_DEPTH:
        return False
    # As a set, as far as that says all: a loop would take as long as the parsing.
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
    if kind == 2:  # whatever follows: nobody would be answered
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
    """Refuse a parameter's value that no peer would read: floats, map keys that are no strings, containers over a limit.

    `depth` is how many containers it is in. Raises `ProtocolError`.
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


# packb's own buffer of 256 KiB costs more than packing, where freed memory is cleared. Older packers have no such option.
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
    """Pack an answer: exactly one of `error` and `result` is None. Raises `ProtocolError` if it is too long."""
    return _pack([1, msgid, error, result])


def encode_notification(method: str, params: dict[str, Any]) -> bytes:
    """Pack a notification, which nobody answers."""
    return _pack([2, method, [params]])
