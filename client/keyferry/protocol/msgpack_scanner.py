"""The structure of a msgpack message, followed by its headers alone: how long it is, and that it keeps within limits.

Every limit is applied as the headers arrive, before an object is made of them: a peer can claim a map of four billion entries,
or nest arrays a thousand deep, and costs nobody more than the bytes it really sent.
"""

from typing import Any, Final, NamedTuple

from ..errors import ProtocolError

__all__ = ["MAX_ARRAY", "MAX_DEPTH", "MAX_MAP", "MAX_MESSAGE", "HeaderScanner", "container"]

MAX_MESSAGE: Final = 65_536
"""Bytes in one message. The largest legitimate request (6,144 bytes to encrypt, 8,192 characters of context) is a third."""
MAX_MAP: Final = 1_024
"""Entries in one map. A context of 8,192 characters as JSON cannot hold more than 1,365 of the shortest pairs."""
MAX_ARRAY: Final = 64
"""Entries in one array. A message has four, its parameters one; no parameter is a list."""
MAX_DEPTH: Final = 8
"""Containers in containers. A request with a context needs four."""

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


class HeaderScanner:
    """Follows one message at the beginning of a buffer, from where it stood when more of it has come."""

    __slots__ = ("_containers", "_left", "_map", "_max_array", "position")

    def __init__(self, max_array: int) -> None:
        self._max_array = max_array
        self.position = 0
        """How far it has come: each byte is looked at once, however it arrives. After a whole message: its size."""
        self._left = 1  # entries still to come in the container around the position; in a map, keys and values each
        self._map = False  # whether that container is a map
        self._containers: list[tuple[int, bool]] = []  # the same two for the containers around that one

    def follow(self, buffer: bytearray) -> bool:  # noqa: C901, PLR0912 - one loop, once for each byte's worth: calls would double its time
        """Follow the headers to the end of the message; False if that is not in the buffer yet. Raises `ProtocolError`."""
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
    """What a byte begins, where that holds other values: list, or dict."""
    return {_ARRAY: list, _MAP: dict}.get(_FORMATS[first].kind)
