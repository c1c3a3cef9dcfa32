"""Evidence about peers that this platform does not provide. Checked once, at the start, to name grants that can never match."""

import os
import socket
from collections.abc import Mapping
from typing import Final

from keyferry.hardening import has_capability

from .groups import LACKING, SO_PEERGROUPS
from .process import Process

__all__ = ["lacking"]

_CAP_SYS_PTRACE: Final = 19
_HEADER_BYTES: Final = 1_024


def lacking() -> Mapping[str, frozenset[str]]:
    """Return the reasons why evidence is unavailable here, each with the selectors that therefore match few or no callers."""
    names = {}
    own_end, other_end = socket.socketpair(socket.AF_UNIX)
    with own_end, other_end:
        if not _has_groups(own_end):
            names["the kernel does not report a peer's supplementary groups (SO_PEERGROUPS)"] = frozenset(
                {"gid", "group"}
            )
        if not _has_processes(own_end):
            why = (
                "the kernel, or a seccomp profile, does not provide pidfds, so the agent cannot hold a caller's process"
            )
            names[why] = frozenset({"unit", "pod", "exe", "sha256"})
            return names
    if not _control_groups_visible():
        names["/proc does not show other users' processes (hidepid)"] = frozenset({"unit", "pod", "exe", "sha256"})
    elif not has_capability(_CAP_SYS_PTRACE):
        names["without CAP_SYS_PTRACE, the agent cannot see other users' programs"] = frozenset({"exe", "sha256"})
    return names


def _has_groups(peer: socket.socket) -> bool:
    try:
        peer.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _HEADER_BYTES)
    except OSError as error:
        return error.errno not in LACKING
    return True


def _has_processes(peer: socket.socket) -> bool:
    try:
        process = Process.of(peer, os.getpid())
    except OSError:
        return True
    if process is None:
        return False
    process.close()
    return True


def _control_groups_visible() -> bool:
    try:
        with open("/proc/1/cgroup", "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False
