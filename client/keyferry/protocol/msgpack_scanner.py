"""Scans the headers of a msgpack message: finds its length and checks limits, without building objects.

Every limit is applied as the headers arrive. A peer can claim a map of four billion entries, or nest arrays a thousand deep,
but the agent stores only the bytes that the peer really sent.
"""

from typing import Any, Final, NamedTuple

from ..errors import ProtocolError

__all__ = ["MAX_ARRAY", "MAX_DEPTH", "MAX_MAP", "MAX_MESSAGE", "HeaderScanner", "container"]

MAX_MESSAGE: Final = 65_536
"""Bytes in one message. The largest legitimate request (6,144 bytes to encrypt, 8,192 characters of EncryptionContext) takes a
third of them."""
MAX_MAP: Final = 1_024
"""Entries in one map. An EncryptionContext of 8,192 characters as JSON holds at most 1,365 of the shortest pairs."""
MAX_ARRAY: Final = 64
"""Entries in one array. A message has four, and its array of parameters one; a parameter is never a list."""
MAX_DEPTH: Final = 8
"""Nesting depth of containers. A request with an EncryptionContext needs four."""

# The kinds of value that a first byte can begin (the msgpack specification, "Formats").

_SCALAR, _STRING, _BINARY, _ARRAY, _MAP, _REFUSED = range(6)


class _Format(NamedTuple):
    kind: int
    length_bytes: int = 0  # number of length bytes after the first byte
    size: int = 0  # if length_bytes is 0: number of bytes that follow, or of entries of a container
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


class HeaderScanner:
    """Scans one message at the beginning of a buffer. Continues from its position when more bytes have arrived."""

    __slots__ = ("_containers", "_left", "_map", "_max_array", "position")

    def __init__(self, max_array: int) -> None:
        self._max_array = max_array
        self.position = 0
        """Bytes scanned so far; each header is scanned once, in pieces of any size. At the end, the size of the message."""
        self._left = 1  # entries still to come in the innermost container; keys and values of a map count separately
        self._map = False  # whether the innermost container is a map
        self._containers: list[tuple[int, bool]] = []  # (left, map) of each enclosing container

    def follow(self, buffer: bytearray) -> bool:  # noqa: C901, PLR0912 - one loop, once for each byte's worth: calls would double its time
        """Scan to the end of the message. Returns False if the end is not in the buffer yet. Raises `ProtocolError`."""
        position, left, in_map, containers = self.position, self._left, self._map, self._containers
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
                self.position = position
                return True
        if received > MAX_MESSAGE:
            raise ProtocolError(f"a message is longer than {MAX_MESSAGE} bytes")
        self.position, self._left, self._map = position, left, in_map
        return False


def container(first: int) -> type[Any] | None:
    """Return list or dict if a first byte begins an array or a map, and None for any other value."""
    return {_ARRAY: list, _MAP: dict}.get(_FORMATS[first].kind)
