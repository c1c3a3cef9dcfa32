"""The groups of a peer: up to 65,536 of them, asked of the kernel and kept in four bytes each."""

import ctypes
import errno
import os
import socket
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Final, Protocol

__all__ = ["LACKING", "SO_PEERGROUPS", "Groups", "PeerSocket", "peer_groups"]

LACKING: Final = (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOPROTOOPT, errno.EOPNOTSUPP)
"""What a kernel, or a seccomp profile, answers that does not provide something: evidence of this kind cannot be had at all."""

SO_PEERGROUPS: Final = 59  # Linux 4.13
_PYTHON_MOST: Final = 1_024
"""Bytes of a socket option that Python's getsockopt takes at most."""
_MOST_BYTES: Final = 4 * 65_536  # NGROUPS_MAX of Linux

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.getsockopt.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


class PeerSocket(Protocol):
    """A socket of the standard library, or trio's."""

    def fileno(self) -> int: ...

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


class Groups(AbstractSet[int]):
    """An immutable set of group numbers, packed: a set of Python's would take 90 bytes for each."""

    __slots__ = ("_numbers", "_packed")

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        unique = sorted(set(numbers))
        self._packed = struct.pack(f"{len(unique)}I", *unique)
        self._numbers = memoryview(self._packed).cast("I")

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int):
            return False
        place = bisect_left(self._numbers, number)
        return place < len(self._numbers) and self._numbers[place] == number

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers in ascending order."""
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __eq__(self, other: object) -> bool:
        return self._packed == other._packed if isinstance(other, Groups) else super().__eq__(other)

    def __hash__(self) -> int:
        return hash(self._packed)

    def __repr__(self) -> str:
        return f"Groups({list(self)})"


def peer_groups(connection: PeerSocket) -> Iterator[int]:
    """Return the supplementary groups of a peer when it connected; none where the kernel does not tell. Raises OSError."""
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _PYTHON_MOST)
    except OSError as error:
        if error.errno in LACKING:
            packed = b""
        elif error.errno == errno.ERANGE:
            packed = _all_groups(connection.fileno())
        else:
            raise
    return (number for (number,) in struct.iter_unpack("I", packed))


def _all_groups(descriptor: int) -> bytes:
    buffer, size = ctypes.create_string_buffer(_MOST_BYTES), ctypes.c_uint(_MOST_BYTES)
    if _libc.getsockopt(descriptor, socket.SOL_SOCKET, SO_PEERGROUPS, buffer, ctypes.byref(size)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw[: size.value]
