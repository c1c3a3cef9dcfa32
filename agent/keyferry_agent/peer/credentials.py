"""What the kernel says of the other end of a connection, taken once, before a byte is read.

Nothing here touches a file of the peer's: those may be on a file system that never answers (`program`).
"""

import socket
import struct
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final, NamedTuple

from .groups import Groups, PeerSocket, peer_groups
from .process import Process, pod_of, unit_of

__all__ = ["OVERFLOW_GID", "OVERFLOW_UID", "Peer", "evidence"]

_UCRED: Final = struct.Struct("iII")

_OVERFLOW: Final = Path("/proc/sys/kernel")


def _overflow(name: str) -> int:
    try:
        return int((_OVERFLOW / name).read_text())
    except (OSError, ValueError):
        return 65_534


OVERFLOW_UID: Final = _overflow("overflowuid")
OVERFLOW_GID: Final = _overflow("overflowgid")


class Peer(NamedTuple):
    """The evidence about a caller. None, or an empty set, is evidence that cannot be had: it matches no grant.

    `uid` and `gids` are those at the time of connect(2). The kernel shows a user of another user namespace as the overflow
    uid, which says nothing about who it is; and a process of another pid namespace as pid 0: then there is no `unit`, `pod`,
    `exe` or `sha256` either. `exe` and `sha256` are missing until the program was inspected, which only some grants ask for.
    """

    uid: int | None
    gids: AbstractSet[int]
    pid: int | None
    listener: str
    unit: str | None = None
    pod: str | None = None
    exe: str | None = None
    sha256: str | None = None


def evidence(connection: PeerSocket, listener: str) -> tuple[Peer, Process | None]:
    """Ask the kernel who connected, and hold the process, if it can be seen. Never blocks.

    Raises ProcessLookupError when it has ended, and OSError when this is not a Unix socket, or the agent lacks descriptors.
    """
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    gids = Groups([gid], packed=peer_groups(connection), without=OVERFLOW_GID)
    peer = Peer(uid=None if uid == OVERFLOW_UID else uid, gids=gids, pid=pid or None, listener=listener)
    process = Process.of(connection, peer.pid)
    if process is not None:
        try:
            cgroups = process.cgroups()
            if process.alive():  # after everything was read
                peer = peer._replace(unit=unit_of(cgroups), pod=pod_of(cgroups))
        except BaseException:
            process.close()
            raise
    return peer, process
