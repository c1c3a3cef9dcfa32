"""The strict reader: scans the headers of a msgpack message for its length and the limits, then parses it value by value.

Every limit is applied as the headers arrive, without building objects. A peer can claim a map of four billion entries, or nest
arrays a thousand deep, but the agent stores only the bytes that the peer really sent.
"""

from typing import Any, Final, NamedTuple

import msgpack

from ..errors import ProtocolError

__all__ = [
    "MAX_ARRAY",
    "MAX_DEPTH",
    "MAX_MAP",
    "MAX_MESSAGE",
    "UNICODE_ERRORS",
    "UNPACKER_BUFFER_BYTES",
    "HeaderScanner",
    "parse_strictly",
    "unique_keys",
]

MAX_MESSAGE: Final = 65_536
"""Bytes in one message. The largest legitimate request (6,144 bytes to encrypt, 8,192 characters of EncryptionContext) takes a
third of them."""
MAX_MAP: Final = 1_024
"""Entries in one map. An EncryptionContext of 8,192 characters as JSON holds at most 1,365 of the shortest pairs."""
MAX_ARRAY: Final = 64
"""Entries in one array. A message has four, and its array of parameters one; a parameter is never a list."""
MAX_DEPTH: Final = 8
"""Nesting depth of containers. A request with an EncryptionContext needs four."""
UNPACKER_BUFFER_BYTES: Final = 1_024
"""Initial size of the buffer of msgpack's parser."""
UNICODE_ERRORS: Final = "surrogateescape"
"""A string that is not UTF-8 (neovim sends raw bytes as strings) keeps its bytes as lone surrogates. The check of a text
parameter then refuses that parameter by name, and the connection survives."""

# The kinds of value that a first byte can begin (the msgpack specification, "Formats").

_SCALAR, _STRING, _BINARY, _ARRAY, _MAP, _REFUSED = range(6)


class _Format(NamedTuple):
    kind: int
    length_bytes: int = 0  # number of length bytes after the first byte
    size: int = 0  # if length_bytes is 0: number of bytes that follow, or of entries of a container
    why: str = ""


def _formats() -> list[_Format]:
    formats = [_Format(_SCALAR)] * 256  # nil, booleans, and the integers that are their own first byte
    for first_byte in range(0x10):
        formats[0x80 + first_byte] = _Format(_MAP, size=first_byte)
        formats[0x90 + first_byte] = _Format(_ARRAY, size=first_byte)
    for first_byte in range(0x20):
        formats[0xA0 + first_byte] = _Format(_STRING, size=first_byte)
    for first_byte, kind, width in (
        *zip(range(0xC4, 0xC7), [_BINARY] * 3, (1, 2, 4), strict=True),
        *zip(range(0xD9, 0xDC), [_STRING] * 3, (1, 2, 4), strict=True),
        *zip(range(0xDC, 0xDE), [_ARRAY] * 2, (2, 4), strict=True),
        *zip(range(0xDE, 0xE0), [_MAP] * 2, (2, 4), strict=True),
    ):
        formats[first_byte] = _Format(kind, length_bytes=width)
    for first_byte in range(4):
        formats[0xCC + first_byte] = formats[0xD0 + first_byte] = _Format(_SCALAR, size=2**first_byte)
    for first_byte in (0xCA, 0xCB):
        formats[first_byte] = _Format(_REFUSED, why="floats are not part of the protocol")
    for first_byte in (*range(0xC7, 0xCA), *range(0xD4, 0xD9)):
        formats[first_byte] = _Format(_REFUSED, why="extension types are not part of the protocol")
    formats[0xC1] = _Format(_REFUSED, why="byte 0xC1 is not part of msgpack")
    return formats


_FORMATS: Final = _formats()


class HeaderScanner:
    """Scans one message at the beginning of a buffer. Continues from its position when more bytes have arrived."""

    __slots__ = ("_containers", "_in_map", "_max_array", "_remaining", "position")

    def __init__(self, max_array: int) -> None:
        self._max_array = max_array
        self.position = 0
        """Bytes scanned so far; each header is scanned once, in pieces of any size. At the end, the size of the message."""
        # Entries still to come in the innermost container. Keys and values of a map count separately.
        self._remaining = 1
        self._in_map = False  # whether the innermost container is a map
        self._containers: list[tuple[int, bool]] = []  # (remaining, in_map) of each enclosing container

    def scan(self, buffer: bytearray) -> bool:  # noqa: C901, PLR0912 - one loop, once for each byte's worth: calls would double its time
        """Scan to the end of the message. Returns False if the end is not in the buffer yet. Raises `ProtocolError`."""
        position, remaining, in_map, containers = self.position, self._remaining, self._in_map, self._containers
        size_received = len(buffer)
        while position < size_received:
            kind, length_bytes, size, why = _FORMATS[buffer[position]]
            if kind == _REFUSED:
                raise ProtocolError(why)
            if in_map and kind != _STRING and not remaining & 1:
                raise ProtocolError("a map key is not a string")
            end = position + 1
            if length_bytes:
                end += length_bytes
                if end > size_received:
                    break
                size = int.from_bytes(buffer[position + 1 : end], "big")
            if kind < _ARRAY:
                end += size
            if end > MAX_MESSAGE:
                raise ProtocolError(f"a message is longer than {MAX_MESSAGE} bytes")
            if end > size_received:
                break
            position = end
            remaining -= 1
            if kind >= _ARRAY:
                if size > (MAX_MAP if kind == _MAP else self._max_array):
                    raise ProtocolError(
                        f"a map of {size} entries; at most {MAX_MAP} are allowed"
                        if kind == _MAP
                        else f"an array of {size} entries; at most {self._max_array} are allowed"
                    )
                if len(containers) == MAX_DEPTH:
                    raise ProtocolError(f"containers are nested more than {MAX_DEPTH} deep")
                containers.append((remaining, in_map))
                in_map = kind == _MAP
                remaining = 2 * size if in_map else size
            while not remaining and containers:
                remaining, in_map = containers.pop()
            if not remaining:
                self.position = position
                return True
        if size_received > MAX_MESSAGE:
            raise ProtocolError(f"a message is longer than {MAX_MESSAGE} bytes")
        self.position, self._remaining, self._in_map = position, remaining, in_map
        return False


def parse_strictly(message: bytearray) -> Any:
    """Return the value of one message that was scanned to its end. Raises `ProtocolError` for a repeated key.

    msgpack's `unpackb` would intern the keys of maps. This function interns nothing.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=0, read_size=UNPACKER_BUFFER_BYTES, unicode_errors=UNICODE_ERRORS)
    unpacker.feed(message)
    return _read_value(unpacker, message)


def _read_value(unpacker: Any, message: bytearray) -> Any:
    kind = _FORMATS[message[unpacker.tell()]].kind
    if kind == _ARRAY:
        return [_read_value(unpacker, message) for _ in range(unpacker.read_array_header())]
    if kind == _MAP:
        return unique_keys(
            [(unpacker.unpack(), _read_value(unpacker, message)) for _ in range(unpacker.read_map_header())]
        )
    return unpacker.unpack()


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a map as a dictionary. Raises `ProtocolError` for a repeated key."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ProtocolError("a map has the same key twice")
    return entries
