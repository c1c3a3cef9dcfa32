"""The kernel's evidence about the peer of a connection, collected once, before the agent reads a byte from it.

This module opens no file of the peer: such a file may be on a file system that never answers (`program`).
"""

import socket
import struct
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final, NamedTuple

from .groups import Groups, PeerSocket, peer_groups
from .process import Process, pod_of, unit_of

__all__ = ["OVERFLOW_GID", "OVERFLOW_UID", "HttpOrigin", "Peer", "evidence"]

_UCRED: Final = struct.Struct("iII")

_OVERFLOW: Final = Path("/proc/sys/kernel")


def _overflow(name: str) -> int:
    try:
        return int((_OVERFLOW / name).read_text())
    except (OSError, ValueError):
        return 65_534


OVERFLOW_UID: Final = _overflow("overflowuid")
OVERFLOW_GID: Final = _overflow("overflowgid")


class HttpOrigin(NamedTuple):
    """How a request came through a gateway, for its audit entry. Grants never depend on it.

    `scheme`: that of the signature, V1 or ACS3; empty for a request without one. `remote`: address and port, empty on a Unix
    socket. `claimed_access_key`: the ID that an unverified request names.
    """

    scheme: str
    remote: str
    tls: bool
    user_agent: str
    claimed_access_key: str = ""


class Peer(NamedTuple):
    """The evidence about a caller. None, or an empty set, stands for unavailable evidence, which matches no grant.

    `uid` and `gids` are those at the time of connect(2). The kernel reports a user of another user namespace as the overflow
    uid, which does not identify the user. It reports a process of another pid namespace as pid 0; then `unit`, `pod`, `exe`
    and `sha256` are unavailable too. `exe` and `sha256` are None until the program was inspected, which only some grants need.

    `access_key` is not the kernel's evidence: a gateway verified that the caller signed the request with the secret of the
    access key with this ID. It is empty on sockets without signatures. A caller over TCP has no other evidence.
    """

    uid: int | None
    gids: AbstractSet[int]
    pid: int | None
    listener: str
    unit: str | None = None
    pod: str | None = None
    exe: str | None = None
    sha256: str | None = None
    access_key: str = ""
    http: HttpOrigin | None = None


def evidence(connection: PeerSocket, listener: str) -> tuple[Peer, Process | None]:
    """Return the kernel's evidence about the peer, and a handle to its process, or None if that is invisible. Never blocks.

    Raises ProcessLookupError if the process has ended, and OSError if this is not a Unix socket, or the agent lacks
    descriptors.
    """
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    gids = Groups([gid], packed=peer_groups(connection), excluded_gid=OVERFLOW_GID)
    peer = Peer(uid=None if uid == OVERFLOW_UID else uid, gids=gids, pid=pid or None, listener=listener)
    process = Process.of(connection, peer.pid)
    if process is not None:
        try:
            cgroups = process.cgroups()
            if process.alive():  # checked after all of its evidence was read
                peer = peer._replace(unit=unit_of(cgroups), pod=pod_of(cgroups))
        except BaseException:
            process.close()
            raise
    return peer, process
