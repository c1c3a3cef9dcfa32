"""MessagePack-RPC, without any I/O: bytes in, messages out, and the other way round. Both ends use it.

The one promise: whatever bytes are fed, `Decoder` gives messages or raises `ProtocolError`. Anything else is a bug.

Every limit is applied to the *headers*, as they arrive, before an object is made of them: a peer can claim a map of four
billion entries, or nest arrays a thousand deep, and costs nobody more than the bytes it really sent. That is why the
structure is walked here first, and the msgpack library is only ever shown one whole message that is known to be small.
"""

import sys
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import msgpack

from .errors import ProtocolError

__all__ = [
    "MAX_ARRAY",
    "MAX_DEPTH",
    "MAX_MAP",
    "MAX_MESSAGE",
    "Decoder",
    "Message",
    "Notification",
    "Request",
    "Response",
    "Unservable",
    "check_sendable",
    "encode_notification",
    "encode_request",
    "encode_response",
]

PROTOCOL_VERSION: Final = 1

MAX_MESSAGE: Final = 65_536
"""Bytes in one message. The largest legitimate request (6,144 bytes to encrypt, 8,192 characters of context) is a third."""
MAX_MAP: Final = 1_024
"""Entries in one map. A context of 8,192 characters as JSON cannot hold more than 1,365 of the shortest pairs."""
MAX_ARRAY: Final = 64
"""Entries in one array. A message has four, its parameters one; no parameter is a list."""
MAX_DEPTH: Final = 8
"""Containers in containers. A request with a context needs four."""
MAX_MSGID: Final = 2**32 - 1


class Request(NamedTuple):
    """`[0, msgid, method, [params]]`, whole and well formed; whether the operation exists is for others to say."""

    msgid: int
    method: str
    params: dict[str, Any]


class Response(NamedTuple):
    """`[1, msgid, error, result]`: exactly one of the two is None. msgid is None when the request could not be read."""

    msgid: int | None
    error: dict[str, Any] | None
    result: dict[str, Any] | None


class Notification(NamedTuple):
    """`[2, method, params]`: gets no answer and has no effect."""


class Unservable(NamedTuple):
    """Well-formed msgpack with a message ID to answer to, but no request. Unlike a `ProtocolError`, the stream goes on."""

    msgid: int
    why: str
    method: str = ""


Message: TypeAlias = Request | Response | Notification | Unservable


# --- the walk over headers -------------------------------------------------------------------------------------------
# What each first byte begins (the msgpack specification, "Formats").

_SCALAR, _STRING, _BINARY, _ARRAY, _MAP, _REFUSED = range(6)


class _Format(NamedTuple):
    kind: int
    length_bytes: int = 0  # how many bytes of length follow the first
    size: int = 0  # without them: the bytes that follow, or the entries of a container
    why: str = ""


def _formats() -> list[_Format]:
    formats = [_Format(_SCALAR)] * 256  # nil, booleans, and the integers that are their own first byte
    for first in range(0x10):
        formats[0x80 + first] = _Format(_MAP, size=first)
        formats[0x90 + first] = _Format(_ARRAY, size=first)
    for first in range(0x20):
        formats[0xA0 + first] = _Format(_STRING, size=first)
    for first, kind, width in (
        *zip(range(0xC4, 0xC7), [_BINARY] * 3, (1, 2, 4), strict=True),
        *zip(range(0xD9, 0xDC), [_STRING] * 3, (1, 2, 4), strict=True),
        *zip(range(0xDC, 0xDE), [_ARRAY] * 2, (2, 4), strict=True),
        *zip(range(0xDE, 0xE0), [_MAP] * 2, (2, 4), strict=True),
    ):
        formats[first] = _Format(kind, length_bytes=width)
    for first in range(4):
        formats[0xCC + first] = formats[0xD0 + first] = _Format(_SCALAR, size=2**first)
    for first in (0xCA, 0xCB):
        formats[first] = _Format(_REFUSED, why="floats are not part of the protocol")
    for first in (*range(0xC7, 0xCA), *range(0xD4, 0xD9)):
        formats[first] = _Format(_REFUSED, why="extension types are not part of the protocol")
    formats[0xC1] = _Format(_REFUSED, why="byte 0xC1 begins nothing in msgpack")
    return formats


_FORMATS: Final = _formats()


class Decoder:
    """Turns a stream of bytes into messages. `feed` it what was received, then take `messages` until there are none.

    `max_array` is `MAX_ARRAY`, or more for a client, whose answers may hold a page of a list. After a `ProtocolError` the
    stream cannot be trusted any more: the decoder refuses to go on.
    """

    __slots__ = ("_broken", "_buffer", "_containers", "_left", "_map", "_max_array", "_position")

    def __init__(self, *, max_array: int = MAX_ARRAY) -> None:
        self._max_array = max_array
        self._buffer = bytearray()
        self._broken: ProtocolError | None = None
        # Where the walk through the first message stands, so that each byte is looked at once however it arrives.
        self._position = 0
        self._left = 1  # entries still to come in the container around the position; in a map, keys and values each
        self._map = False  # whether that container is a map
        self._containers: list[tuple[int, bool]] = []  # the same two for the containers around that one

    @property
    def incomplete(self) -> bool:
        """Whether part of a message was received: the peer owes the rest of it."""
        return bool(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes as they were received, in pieces of any size."""
        self._buffer += data

    def messages(self) -> Iterator[Message]:
        """Yield each whole message received so far. Raises `ProtocolError`, for good, at the first that is none."""
        # A message that came in pieces: what was looked at is not looked at again.
        walking = self._position > 0 or _INTERNED_FOR_EVER
        while self._buffer:
            if self._broken:
                raise self._broken
            if not walking:
                yield from self._whole()
                walking = True
                continue
            try:
                if not self._walk():
                    return
                message = _message(_unpack(self._buffer[: self._position]))
            except ProtocolError as error:
                self._broken = error
                raise
            self._forget(self._position)
            walking, self._position, self._left = _INTERNED_FOR_EVER, 0, 1
            yield message

    def _whole(self) -> Iterator[Message]:
        """The messages at the beginning of the buffer that are there whole, by msgpack's own parser.

        It is three times as fast as the walk, and knows less: at whatever is out of the ordinary it leaves off, and the walk
        finds out what that is. What it may allocate for what a header claims is bounded by its limits.
        """
        unpacker = msgpack.Unpacker(
            max_buffer_size=0,  # what is in the buffer was bounded by whoever has received it
            read_size=_RECEIVE_LEAST,
            max_array_len=self._max_array,
            max_map_len=_MAP_AT_ONCE,
            max_ext_len=0,
            unicode_errors=_UNICODE_ERRORS,
            object_pairs_hook=_unique,
        )
        unpacker.feed(self._buffer)
        begin = 0
        while True:
            try:
                body = unpacker.unpack()
                end = unpacker.tell()
            except Exception:  # whatever it is: the walk knows
                return
            if end - begin > MAX_MESSAGE or not _is_plain(body):
                return
            try:
                message = _message(body)
            except ProtocolError as error:
                self._broken = error
                raise
            self._forget(end - begin)
            begin = end
            yield message

    def _forget(self, size: int) -> None:
        self._buffer[:size] = bytes(size)  # a request can hold a plaintext
        del self._buffer[:size]

    def _walk(self) -> bool:  # noqa: C901, PLR0912 - one loop, once for each byte's worth: calls would double its time
        """Follow the headers to the end of the first message; False if that has not been received yet."""
        buffer, position, left, in_map, containers = (
            self._buffer,
            self._position,
            self._left,
            self._map,
            self._containers,
        )
        received = len(buffer)
        while position < received:
            kind, length_bytes, size, why = _FORMATS[buffer[position]]
            if kind == _REFUSED:
                raise ProtocolError(why)
            if in_map and kind != _STRING and not left & 1:
                raise ProtocolError("a map key is not a string")
            after = position + 1
            if length_bytes:
                after += length_bytes
                if after > received:
                    break
                size = int.from_bytes(buffer[position + 1 : after], "big")
            if kind < _ARRAY:
                after += size
            if after > MAX_MESSAGE:
                raise ProtocolError(f"a message is longer than {MAX_MESSAGE} bytes")
            if after > received:
                break
            position = after
            left -= 1
            if kind >= _ARRAY:
                if size > (MAX_MAP if kind == _MAP else self._max_array):
                    raise ProtocolError(
                        f"a map of {size} entries; at most {MAX_MAP} are allowed"
                        if kind == _MAP
                        else f"an array of {size} entries; at most {self._max_array} are allowed"
                    )
                if len(containers) == MAX_DEPTH:
                    raise ProtocolError(f"containers are nested more than {MAX_DEPTH} deep")
                containers.append((left, in_map))
                in_map = kind == _MAP
                left = 2 * size if in_map else size
            while not left and containers:
                left, in_map = containers.pop()
            if not left:
                self._position, self._map = position, False
                return True
        if received > MAX_MESSAGE:
            raise ProtocolError(f"a message is longer than {MAX_MESSAGE} bytes")
        self._position, self._left, self._map = position, left, in_map
        return False


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


def _unpack(packed: bytearray) -> Any:
    if _INTERNED_FOR_EVER:
        unpacker = msgpack.Unpacker(max_buffer_size=0, read_size=_RECEIVE_LEAST, unicode_errors=_UNICODE_ERRORS)
        unpacker.feed(packed)
        return _one_by_one(unpacker, packed)
    return msgpack.unpackb(packed, unicode_errors=_UNICODE_ERRORS, object_pairs_hook=_unique)


def _one_by_one(unpacker: Any, packed: bytearray) -> Any:
    kind = _FORMATS[packed[unpacker.tell()]].kind
    if kind == _ARRAY:
        return [_one_by_one(unpacker, packed) for _ in range(unpacker.read_array_header())]
    if kind == _MAP:
        size = unpacker.read_map_header()
        return _unique([(unpacker.unpack(), _one_by_one(unpacker, packed)) for _ in range(size)])
    return unpacker.unpack()


def _is_plain(value: Any, depth: int = 1) -> bool:
    """Whether what msgpack's parser took is in the protocol, too. `depth`: containers that it is in, itself included."""
    values: Any = value
    if type(value) is dict:
        if not _TEXT.issuperset(map(type, value)):
            return False
        values = value.values()
    elif type(value) is not list:
        return type(value) in _SENDABLE
    if depth > MAX_DEPTH:
        return False
    # Types as a set, as far as that says all: a loop in Python would take as long as the parsing.
    return _SENDABLE.issuperset(map(type, values)) or all(
        type(each) in _SENDABLE or _is_plain(each, depth + 1) for each in values
    )


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
        return Unservable(msgid, "a request begins with 0: [0, msgid, method, [params]]")
    return _request(msgid, body[2:])


def _request(msgid: int, rest: list[Any]) -> Message:
    if len(rest) != 2:
        return Unservable(msgid, "a request is an array of four: [0, msgid, method, [params]]")
    method, params = rest
    if not isinstance(method, str):
        return Unservable(msgid, "the method is not a string")
    if not isinstance(params, list) or len(params) != 1 or not isinstance(params[0], dict):
        return Unservable(msgid, "the parameters are not an array of one map", method)
    return Request(msgid, method, params[0])


def check_sendable(value: Any, depth: int = 3) -> None:
    """Refuse a parameter's value that no peer would read: floats, map keys that are no strings, containers over a limit.

    `depth` is how many containers it is in. Raises `ProtocolError`.
    """
    kind = type(value)
    if kind in _SENDABLE or isinstance(value, str | int | bytes | bytearray | memoryview):
        return
    if kind not in (dict, list, tuple):
        raise ProtocolError(f"{kind.__name__} is not part of the protocol")
    if len(value) > (MAX_MAP if kind is dict else MAX_ARRAY) or depth > MAX_DEPTH:
        raise ProtocolError("a container has too many entries, or is nested too deep")
    if kind is dict:
        if not _TEXT.issuperset(map(type, value)) and not all(isinstance(key, str) for key in value):
            raise ProtocolError("a map key is not a string")
        value = value.values()
    if not _SENDABLE.issuperset(map(type, value)):
        for each in value:
            check_sendable(each, depth + 1)


_SENDABLE: Final = frozenset({str, int, bool, bytes, type(None)})
_TEXT: Final = frozenset({str})


# packb's own buffer of 256 KiB costs more than packing, where freed memory is cleared. Older packers have no such option.
_SMALL: Final[dict[str, int]] = {"buf_size": 2_048} if msgpack.version >= (1, 1) else {}


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
