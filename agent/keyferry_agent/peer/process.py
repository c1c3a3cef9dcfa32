"""The process at the other end, held by a pidfd: its systemd unit and its Kubernetes pod.

The rule that users keep: what was read from /proc/PID belongs to the process only if it is alive *after* it was read; a number
alone may be another process's by then. SO_PEERPIDFD gives a handle even of a process that is dead.
"""

import errno
import os
import re
import select
import socket
import struct
from typing import Final

from .groups import LACKING, PeerSocket

__all__ = ["Process", "pod_of", "unit_of"]

_SO_PEERPIDFD: Final = 77  # Linux 6.5
_INT: Final = struct.Struct("i")
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What says nothing about a process, but that this one has no room to look."""
_HIERARCHIES: Final = re.compile(r"^0::(/.+)$", re.MULTILINE), re.compile(r"^\d+:name=systemd:(/.+)$", re.MULTILINE)
"""Where a unit's path is: in the unified hierarchy, or in systemd's own of version 1."""
_UNITS: Final = (".service", ".scope")
_POD: Final = re.compile(
    r"^/kubepods(?:\.slice)?/.*?pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})(?:\.slice)?(?:/|$)"
)


class Process:
    """A process that connected. To be closed."""

    __slots__ = ("_poll", "fd", "pid")

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    @classmethod
    def of(cls, connection: PeerSocket, pid: int | None) -> "Process | None":
        """The process that SO_PEERCRED numbers; None for one in a pid namespace that is not seen from here, or without pidfds.

        Raises ProcessLookupError for one that is gone, or OSError.
        """
        if pid is None:
            return None
        try:
            (fd,) = _INT.unpack(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, _INT.size))
        except OSError as error:
            if error.errno == errno.EINVAL:  # how Linux before 6.16 says that it is gone
                raise ProcessLookupError from None
            if error.errno not in LACKING:
                raise
            try:
                fd = os.pidfd_open(pid)  # an older kernel: between connect and here the number could have changed hands
            except OSError as refused:
                if refused.errno in LACKING:
                    return None
                raise
        return cls(pid, fd)

    def close(self) -> None:
        """Let the process go."""
        os.close(self.fd)

    def alive(self) -> bool:
        """Whether it has not ended."""
        return not self._poll.poll(0)

    def cgroups(self) -> str:
        """Its control groups, as /proc has them; empty where they may not be read. Raises OSError where there is no room to.

        The owner of a control group chooses its name, of any bytes but "/" and a newline.
        """
        try:
            with open(f"/proc/{self.pid}/cgroup", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                return file.read()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise
            return ""


def unit_of(cgroups: str) -> str | None:
    """The systemd unit in the text of /proc/PID/cgroup: the first that is not a slice.

    What is below it is the unit's own affair: a user's manager may call a unit of its own like one of the system's.
    """
    found = next(filter(None, (hierarchy.search(cgroups) for hierarchy in _HIERARCHIES)), None)
    parts = found[1].split("/")[1:] if found else []
    first = next((part for part in parts if not part.endswith(".slice")), "")
    return first if first.endswith(_UNITS) else None


def pod_of(cgroups: str) -> str | None:
    """The UID of the Kubernetes pod in the text of /proc/PID/cgroup: below the root's own `kubepods` only."""
    for line in cgroups.split("\n"):
        found = _POD.match(line.split(":", 2)[-1])
        if found:
            return found[1].replace("_", "-")
    return None
