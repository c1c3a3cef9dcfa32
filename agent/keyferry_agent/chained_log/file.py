"""The file of the record: opened, continued, and appended to line by line. What it does may hang; `log` has a thread for it."""

import errno
import os
import select
import stat
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from .chain import BEGINNING, link

__all__ = ["Appended", "RecordFile"]

_NONE: Final = -1
_ROOT: Final = 0
_OBJECT: Final = b"{"
"""How each line begins."""
_TAIL: Final = 65_536
"""Bytes at a file's end in which its last line is."""
_READER_PATIENCE: Final = 1_500
"""Milliseconds to wait for the reader of a pipe: less than anybody waits for this file, so that the reason is told."""
_MAX_WAITING: Final = 8
"""Announcements that wait while the file takes nothing. Then the second one is dropped: the first is that of the start."""


class Appended(NamedTuple):
    """How many lines were written, and why not the rest."""

    lines: int
    error: OSError | None = None


class RecordFile:
    """A file of mode 0600, or standard error; and the chain so far. For one thread, but for `announce`."""

    def __init__(self, path: str) -> None:
        """Open the file. Raises OSError."""
        self._path = path
        self._descriptor = _NONE
        self._patience = _READER_PATIENCE
        self._previous = BEGINNING
        self._waiting: deque[list[str]] = deque()
        self._cut_off = 0
        """Bytes at the file's end that belong to lines which could not be written whole."""
        self.identity: tuple[int, int] | None = None
        """Device and inode of the file; None where there is none, or where nobody could move it away."""
        self._readable = False
        self._open()
        self.chain = "stream" if not self._readable else "new" if self._previous == BEGINNING else "continued"
        """How the chain begins: `continued` behind the file's last line, `new` in an empty file, or `stream`.

        In a stream (standard error, a pipe, a device) every start begins a chain: nothing that was written can be read back.
        """

    def reopen(self) -> None:
        """Open the file again, after it was moved away, and go on with the chain in the new one. Raises OSError."""
        if self._path != "stderr":
            with suppress(OSError):  # what stays cut off is at the end of a file that nobody writes to any more
                self._take_back()
            old, self._descriptor, self.identity, self._cut_off = self._descriptor, _NONE, None, 0
            if old != _NONE:
                with suppress(OSError):  # what could not be written long ago: the descriptor is gone all the same
                    os.close(old)
            self._open()

    def append(self, records: Sequence[str]) -> Appended:
        """Write a line for each record, a JSON object not closed yet, in their order, and at once where that is possible.

        What was announced before is written before.
        """
        while self._waiting:
            announced = self._waiting.popleft()
            written, error = self._append(announced)
            if error is not None:
                self._waiting.appendleft(announced[written:])
                return Appended(0, error)
        return self._append(records) if records else Appended(0)

    def sync(self) -> None:
        """Have all appended lines on the disk. Raises OSError."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close a file that nothing more is appended to. Raises OSError."""
        os.close(self._descriptor)

    def announce(self, records: list[str]) -> None:
        """Have records written before the next ones. For any thread: whether the file takes anything or not."""
        self._waiting.append(records)
        if len(self._waiting) > _MAX_WAITING:
            with suppress(IndexError):  # they are being written
                del self._waiting[1]

    def _append(self, records: Sequence[str]) -> Appended:
        lines, previous = [], self._previous
        for record in records:
            line = f'{record}, "previous": "{previous}"}}'.encode()
            previous = link(line)
            lines.append(line + b"\n")
        if self._waits:  # a pipe takes one line whole, or not at all; more than that it may take in part
            return self._one_by_one(lines)
        try:
            self._write(b"".join(lines))
        except OSError as error:
            return Appended(0, error)
        self._previous = previous
        return Appended(len(lines))

    def _one_by_one(self, lines: list[bytes]) -> Appended:
        assert self._waits is not None
        for count, line in enumerate(lines):
            ready = self._waits.poll(self._patience)
            self._patience = _READER_PATIENCE if ready else 0  # until it reads again, nobody waits
            if not ready:
                return Appended(count, OSError(errno.EAGAIN, "nobody reads the pipe that it goes to"))
            try:
                self._write(line)
            except OSError as error:
                return Appended(count, error)
            self._previous = link(line[:-1])
        return Appended(len(lines))

    def _write(self, packed: bytes) -> None:
        self._take_back()
        written = os.write(self._descriptor, packed)
        if written != len(packed):
            self._cut_off = written
            with suppress(OSError):  # else before the next line
                self._take_back()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _take_back(self) -> None:
        """Remove what would run into the next line; from a pipe nothing can be removed. Raises OSError."""
        if self._cut_off and self._waits is None:
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - self._cut_off)
        self._cut_off = 0

    def _open(self) -> None:
        if self._path == "stderr":
            self._descriptor = sys.stderr.fileno()
        else:
            self._descriptor = _open_to_append(self._path)
        status = os.fstat(self._descriptor)
        self._waits: select.poll | None = None
        if stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode):
            self._waits = select.poll()
            self._waits.register(self._descriptor, select.POLLOUT)
        elif stat.S_ISREG(status.st_mode) and self._path != "stderr":
            self._continue(status.st_size)
            self._readable = True
        self.identity = status.st_dev, status.st_ino

    def _continue(self, size: int) -> None:
        """Take the chain up where the file's last line left it."""
        tail = os.pread(self._descriptor, _TAIL, max(0, size - _TAIL))
        whole = tail.rfind(b"\n") + 1
        last = tail[:whole].splitlines()[-1] if whole else tail
        if last and not last.startswith(_OBJECT):  # whoever can rename the file may have put another one there
            raise OSError(errno.EINVAL, "its last line is not an audit entry; name another file", self._path)
        if whole != len(tail):  # cut off by a crash: no answer left after it
            os.ftruncate(self._descriptor, size - (len(tail) - whole))
        if whole:
            self._previous = link(tail[:whole].splitlines()[-1])


def _open_to_append(path: str) -> int:
    """Open the file, or make it. Follows a symbolic link only if root or this user made it. Raises OSError."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        owner = os.lstat(path).st_uid
        if owner not in (_ROOT, os.geteuid()):
            raise OSError(errno.ELOOP, f"a symbolic link that user {owner} made; remove it", path) from None
        return os.open(path, flags, 0o600)
