"""The process at the other end, held by a pidfd: its systemd unit, its Kubernetes pod, and the program that it runs.

The rule that users keep: what was read from /proc/PID belongs to the process only if it is alive *after* it was read; a number
alone may be another process's by then. SO_PEERPIDFD gives a handle even of a process that is dead.
"""

import errno
import hashlib
import os
import re
import select
import socket
import struct
from typing import Final, NamedTuple, Protocol

__all__ = ["PeerSocket", "Process", "Program", "pod_of", "processes_visible", "unit_of"]

_SO_PEERPIDFD: Final = 77  # Linux 6.5
_INT: Final = struct.Struct("i")
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What says nothing about a process, but that this one has no room to look."""
_REMEMBERED: Final = 1_024
_LARGEST: Final = 2**30
"""Bytes of a program that is hashed. A file with a hole behind it costs who makes it nothing, however long it is."""
_HIERARCHIES: Final = re.compile(r"^0::(/.+)$", re.MULTILINE), re.compile(r"^\d+:name=systemd:(/.+)$", re.MULTILINE)
"""Where a unit's path is: in the unified hierarchy, or in systemd's own of version 1."""
_UNITS: Final = (".service", ".scope")
_POD: Final = re.compile(
    r"^/kubepods(?:\.slice)?/.*?pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})(?:\.slice)?(?:/|$)"
)


class PeerSocket(Protocol):
    """A socket of the standard library, or trio's."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


class Program(NamedTuple):
    """An executable file: where it is, and which file that was. `path` is None where this agent sees another file there."""

    path: str | None
    identity: tuple[int, ...]


class Process:
    """A process that connected. To be closed."""

    __slots__ = ("_poll", "fd", "pid", "seen")

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.fd = fd
        self.seen: Program | None = None  # what it ran when it was asked first
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    @classmethod
    def of(cls, connection: PeerSocket, pid: int | None) -> "Process | None":
        """The process that SO_PEERCRED numbers; None for one in a pid namespace that is not seen from here.

        Raises ProcessLookupError for one that is gone, or OSError.
        """
        if pid is None:
            return None
        try:
            (fd,) = _INT.unpack(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, _INT.size))
        except OSError as error:
            if error.errno == errno.EINVAL:  # how Linux before 6.16 says that it is gone
                raise ProcessLookupError from None
            if error.errno != errno.ENOPROTOOPT:
                raise
            fd = os.pidfd_open(pid)  # an older kernel: between connect and here the number could have changed hands
        return cls(pid, fd)

    def close(self) -> None:
        """Let the process go."""
        os.close(self.fd)

    def alive(self) -> bool:
        """Whether it has not ended."""
        return not self._poll.poll(0)

    def cgroups(self) -> str:
        """Its control groups, as /proc has them; empty where they may not be read. Raises OSError where there is no room to."""
        try:
            with open(f"/proc/{self.pid}/cgroup") as file:
                return file.read()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise
            return ""

    def program(self) -> Program | None:
        """The program that it runs; None where that may not be seen (for another user's process it takes CAP_SYS_PTRACE)."""
        link = f"/proc/{self.pid}/exe"
        try:
            path, identity = os.readlink(link), _identity(link)
            return Program(path if _same_file(path, identity) else None, identity)
        except OSError:
            return None

    def changed(self) -> bool:
        """Whether it runs another program than the one that was seen."""
        return self.program() != self.seen

    def hash_program(self) -> str | None:
        """`sha256:` and the hash of the file that it runs, whatever is at its path; None for one that is huge or unreadable.

        Reads it all: not for the event loop.
        """
        try:
            with open(f"/proc/{self.pid}/exe", "rb", buffering=0) as file:
                identity = _identity(file.fileno())
                if os.fstat(file.fileno()).st_size > _LARGEST:
                    return None
                known = _hashes.get(identity)
                if known is None:
                    digest = hashlib.file_digest(file, "sha256")
                    if _identity(file.fileno()) != identity:
                        return None  # somebody writes to it
                    if len(_hashes) >= _REMEMBERED:
                        _hashes.clear()
                    known = _hashes[identity] = f"sha256:{digest.hexdigest()}"
                return known
        except OSError:
            return None


_hashes: dict[tuple[int, ...], str] = {}


def processes_visible() -> bool:
    """Whether the programs of other users' processes may be seen: with CAP_SYS_PTRACE, and without hidepid."""
    try:
        os.readlink("/proc/1/exe")
    except OSError:
        return False
    return True


def _identity(path: str | int) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _same_file(path: str, identity: tuple[int, ...]) -> bool:
    # A process in a mount namespace of its own can have any file at any path.
    try:
        return _identity(path) == identity
    except OSError:
        return False


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
    for line in cgroups.splitlines():
        found = _POD.match(line.split(":", 2)[-1])
        if found:
            return found[1].replace("_", "-")
    return None
