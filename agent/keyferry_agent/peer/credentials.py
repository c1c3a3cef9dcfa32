"""What the kernel says of the other end of a connection, taken once, before a byte is read."""

import errno
import socket
import struct
from pathlib import Path
from typing import Final, NamedTuple

from .process import PeerSocket, Process, pod_of, unit_of

__all__ = ["OVERFLOW_UID", "Peer", "evidence"]

_UCRED: Final = struct.Struct("iII")
_SO_PEERGROUPS: Final = 59
_MANY_GROUPS: Final = 256
_MOST_GROUPS: Final = 65_536  # NGROUPS_MAX of Linux

_OVERFLOW: Final = Path("/proc/sys/kernel")


def _overflow(name: str) -> int:
    try:
        return int((_OVERFLOW / name).read_text())
    except (OSError, ValueError):
        return 65_534


OVERFLOW_UID: Final = _overflow("overflowuid")
_OVERFLOW_GID: Final = _overflow("overflowgid")


class Peer(NamedTuple):
    """The evidence about a caller. None, or an empty set, is evidence that cannot be had: it matches no grant.

    `uid` and `gids` are those at the time of connect(2). The kernel shows a user of another user namespace as the overflow
    uid, which says nothing about who it is; and a process of another pid namespace as pid 0: then there is no `unit`, `pod`,
    `exe` or `sha256` either. `sha256` is missing until somebody hashes the program.
    """

    uid: int | None
    gids: frozenset[int]
    pid: int | None
    listener: str
    unit: str | None = None
    pod: str | None = None
    exe: str | None = None
    sha256: str | None = None


def _groups(connection: PeerSocket) -> bytes:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MANY_GROUPS * 4)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * 4)


def evidence(connection: PeerSocket, listener: str) -> tuple[Peer, Process | None]:
    """Ask the kernel who connected, and hold the process, if it can be seen.

    Raises ProcessLookupError when it has ended, and OSError when this is no Unix socket, or there is no room to look.
    """
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    gids = {gid, *(group for (group,) in struct.iter_unpack("I", _groups(connection)))} - {_OVERFLOW_GID}
    peer = Peer(uid=None if uid == OVERFLOW_UID else uid, gids=frozenset(gids), pid=pid or None, listener=listener)
    process = Process.of(connection, peer.pid)
    if process is not None:
        try:
            cgroups, program = process.cgroups(), process.program()
        except OSError:
            process.close()
            raise
        process.seen = program
        if process.alive():  # after everything was read
            peer = peer._replace(unit=unit_of(cgroups), pod=pod_of(cgroups), exe=program.path if program else None)
    return peer, process
