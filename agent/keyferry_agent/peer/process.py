"""The peer's process, held by a pidfd: its systemd unit and its Kubernetes pod.

Users of this module keep one rule. Data from /proc/PID belongs to the process only if the process is alive *after* the data was
read; otherwise the number may already be another process's. SO_PEERPIDFD returns a handle even of a process that is dead.
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
"""Errors that are not about the peer's process: the agent lacks descriptors or memory."""
_HIERARCHIES: Final = re.compile(r"^0::(/.+)$", re.MULTILINE), re.compile(r"^\d+:name=systemd:(/.+)$", re.MULTILINE)
"""The lines with a unit's path: of the unified hierarchy, or of systemd's own hierarchy in version 1."""
_UNITS: Final = (".service", ".scope")
_POD: Final = re.compile(
    r"^/kubepods(?:\.slice)?/.*?pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})(?:\.slice)?(?:/|$)"
)


class Process:
    """A process that connected. The caller closes the object."""

    __slots__ = ("_poll", "fd", "pid")

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    @classmethod
    def of(cls, connection: PeerSocket, pid: int | None) -> "Process | None":
        """Return the process of SO_PEERCRED; None if its pid namespace is not visible from here, or the kernel has no pidfds.

        Raises ProcessLookupError if the process has ended, or OSError.
        """
        if pid is None:
            return None
        try:
            (fd,) = _INT.unpack(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, _INT.size))
        except OSError as error:
            if error.errno == errno.EINVAL:  # the error of Linux before 6.16 if the process has ended
                raise ProcessLookupError from None
            if error.errno not in LACKING:
                raise
            try:
                fd = os.pidfd_open(pid)  # an older kernel: another process may have got the number since connect(2)
            except OSError as failure:
                if failure.errno in LACKING:
                    return None
                raise
        return cls(pid, fd)

    def close(self) -> None:
        """Close the pidfd."""
        os.close(self.fd)

    def alive(self) -> bool:
        """Return True if the process has not ended."""
        return not self._poll.poll(0)

    def cgroups(self) -> str:
        """Return the text of /proc/PID/cgroup; an empty text if it may not be read.

        Raises OSError if the agent lacks descriptors or memory. The owner of a control group chooses its name, of any bytes
        except "/" and a newline.
        """
        try:
            with open(f"/proc/{self.pid}/cgroup", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                return file.read()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise
            return ""


def unit_of(cgroups: str) -> str | None:
    """Return the systemd unit in the text of /proc/PID/cgroup: the first part that is not a slice, or None.

    The unit itself controls all parts below: a user's service manager may give its own unit the name of a system unit.
    """
    match = next(filter(None, (hierarchy.search(cgroups) for hierarchy in _HIERARCHIES)), None)
    parts = match[1].split("/")[1:] if match else []
    unit = next((part for part in parts if not part.endswith(".slice")), "")
    return unit if unit.endswith(_UNITS) else None


def pod_of(cgroups: str) -> str | None:
    """Return the UID of the Kubernetes pod in the text of /proc/PID/cgroup, or None. Only `kubepods` at the root counts."""
    for line in cgroups.split("\n"):
        match = _POD.match(line.split(":", 2)[-1])
        if match:
            return match[1].replace("_", "-")
    return None
