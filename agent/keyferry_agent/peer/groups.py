"""The groups of a peer: up to 65,536, read from the kernel and stored in four bytes each."""

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Final, Protocol

__all__ = ["LACKING", "SO_PEERGROUPS", "Groups", "PeerSocket", "peer_groups"]

LACKING: Final = (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOPROTOOPT, errno.EOPNOTSUPP)
"""Errors of a kernel, or of a seccomp profile, that does not provide a call: evidence of this kind is never available."""

SO_PEERGROUPS: Final = 59  # Linux 4.13
_MAX_PYTHON_BYTES: Final = 1_024
"""Most bytes of a socket option that Python's getsockopt can return."""
_SIZE: Final = 4
_MAX_BYTES: Final = 4 * 65_536  # NGROUPS_MAX of Linux

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.getsockopt.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


class PeerSocket(Protocol):
    """A socket of the standard library, or trio's."""

    def fileno(self) -> int: ...

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


class Groups(AbstractSet[int]):
    """An immutable set of group numbers in the kernel's packed form, so that the event loop does not make 65,536 objects.

    A set of Python's would take 90 bytes for each number, and 20 ms to build.
    """

    __slots__ = ("_excluded_gid", "_packed")

    def __init__(self, numbers: Iterable[int] = (), *, packed: bytes = b"", excluded_gid: int | None = None) -> None:
        """`packed`: further numbers, 4 bytes each in the host's byte order; `excluded_gid`: a number to exclude."""
        gid_list = list(numbers)
        self._packed = struct.pack(f"{len(gid_list)}I", *gid_list) + packed
        self._excluded_gid = excluded_gid

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int) or not 0 <= number < 2**32 or number == self._excluded_gid:
            return False
        packed_number, position = struct.pack("I", number), -1
        while (position := self._packed.find(packed_number, position + 1)) >= 0:
            if position % _SIZE == 0:
                return True
        return False

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers in packed order; a number can occur twice."""
        return (number for (number,) in struct.iter_unpack("I", self._packed) if number != self._excluded_gid)

    def __len__(self) -> int:
        return len(set(self))

    @property
    def size(self) -> int:
        """Return the size of the packed numbers in bytes."""
        return len(self._packed)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Groups) and (self._packed, self._excluded_gid) == (other._packed, other._excluded_gid):
            return True
        return set(self) == set(other) if isinstance(other, AbstractSet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._packed)

    def __repr__(self) -> str:
        return f"Groups({sorted(set(self))})"


def peer_groups(connection: PeerSocket) -> bytes:
    """Return the packed supplementary groups that a peer had when it connected; no bytes if the kernel cannot report them.

    Raises OSError.
    """
    try:
        return connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _MAX_PYTHON_BYTES)
    except OSError as error:
        if error.errno in LACKING:
            return b""
        if error.errno == errno.ERANGE:
            return _all_groups(connection.fileno())
        raise


def _all_groups(descriptor: int) -> bytes:
    buffer, size = ctypes.create_string_buffer(_MAX_BYTES), ctypes.c_uint(_MAX_BYTES)
    if _libc.getsockopt(descriptor, socket.SOL_SOCKET, SO_PEERGROUPS, buffer, ctypes.byref(size)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw[: size.value]
