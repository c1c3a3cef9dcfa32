"""The file of a hash-chained log: opens it, continues its chain, and appends lines.

File operations may hang. The audit log runs them in a thread.
"""

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
"""The first byte of each line."""
_TAIL: Final = 65_536
"""Bytes to read at a file's end. They contain its last line."""
_READER_TIMEOUT_MS: Final = 1_500
"""Milliseconds to wait for the reader of a pipe. Shorter than the writer thread's timeout, so that the cause is reported."""
_MAX_WAITING: Final = 8
"""Announcements that wait while the file cannot be written. Past that, the second one is dropped: the first is the start's."""


class Appended(NamedTuple):
    """The number of lines that were written, and the error that prevented the others, if any."""

    lines: int
    error: OSError | None = None


class RecordFile:
    """A file of mode 0600, or standard error, with the state of its chain. Not thread-safe, except `announce`."""

    def __init__(self, path: str) -> None:
        """Open the file. Raises OSError."""
        self._path = path
        self._descriptor = _NONE
        self._patience = _READER_TIMEOUT_MS
        self._previous = BEGINNING
        self._waiting: deque[list[str]] = deque()
        self._cut_off = 0
        """Bytes at the file's end that belong to lines which could not be written whole."""
        self.identity: tuple[int, int] | None = None
        """Device and inode of the open file; None after `reopen` has failed."""
        self._readable = False
        self._open()
        self.chain = "stream" if not self._readable else "new" if self._previous == BEGINNING else "continued"
        """How the chain begins: `continued` after the file's last line, `new` in an empty file, or `stream`.

        In a stream (standard error, a pipe, a device) every start of an agent begins a chain, because the agent cannot read
        back the lines before.
        """

    def reopen(self) -> None:
        """Open the path again after its file was moved away, and continue the chain in the new file. Raises OSError."""
        if self._path != "stderr":
            with suppress(OSError):  # a partial line may stay at the end of the old file, which gets no more lines
                self._take_back()
            old_descriptor, self._descriptor, self.identity, self._cut_off = self._descriptor, _NONE, None, 0
            if old_descriptor != _NONE:
                with suppress(OSError):  # close(2) may report an earlier write error; it frees the descriptor anyway
                    os.close(old_descriptor)
            self._open()

    def append(self, records: Sequence[str]) -> Appended:
        """Write a line for each of `records`, in order and in one write(2) where that is possible. Announced lines come first.

        Each of `records` is a JSON object without its closing brace.
        """
        while self._waiting:
            announced = self._waiting.popleft()
            written_lines, error = self._append(announced)
            if error is not None:
                self._waiting.appendleft(announced[written_lines:])
                return Appended(0, error)
        return self._append(records) if records else Appended(0)

    def sync(self) -> None:
        """Flush all appended lines to the disk. Raises OSError."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file. Append nothing afterwards. Raises OSError."""
        os.close(self._descriptor)

    def announce(self, records: list[str]) -> None:
        """Queue `records` to be written before the lines of the next `append`. Does not block; callable from any thread."""
        self._waiting.append(records)
        if len(self._waiting) > _MAX_WAITING:
            with suppress(IndexError):  # the writer thread has taken them meanwhile
                del self._waiting[1]

    def _append(self, records: Sequence[str]) -> Appended:
        lines, previous_hash = [], self._previous
        for record in records:
            line = f'{record}, "previous": "{previous_hash}"}}'.encode()
            previous_hash = link(line)
            lines.append(line + b"\n")
        if self._waits:  # writes of at most PIPE_BUF (4,096) bytes are atomic: one line is, several may not be
            return self._one_by_one(lines)
        try:
            self._write(b"".join(lines))
        except OSError as error:
            return Appended(0, error)
        self._previous = previous_hash
        return Appended(len(lines))

    def _one_by_one(self, lines: list[bytes]) -> Appended:
        assert self._waits is not None
        for count, line in enumerate(lines):
            is_ready = self._waits.poll(self._patience)
            # After a timeout, do not wait again until the reader reads.
            self._patience = _READER_TIMEOUT_MS if is_ready else 0
            if not is_ready:
                return Appended(count, OSError(errno.EAGAIN, "the audit pipe has no reader, or its reader is stalled"))
            try:
                self._write(line)
            except OSError as error:
                return Appended(count, error)
            self._previous = link(line[:-1])
        return Appended(len(lines))

    def _write(self, data: bytes) -> None:
        self._take_back()
        written_bytes = os.write(self._descriptor, data)
        if written_bytes != len(data):
            self._cut_off = written_bytes
            with suppress(OSError):  # if this fails, the next `_write` tries again
                self._take_back()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _take_back(self) -> None:
        """Truncate the file to its last whole line, so that the next line starts afresh; not for a pipe. Raises OSError."""
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
        """Continue the chain after the file's last line, and remove a line without a newline. Raises OSError."""
        tail = os.pread(self._descriptor, _TAIL, max(0, size - _TAIL))
        whole_bytes = tail.rfind(b"\n") + 1
        last_line = tail[:whole_bytes].splitlines()[-1] if whole_bytes else tail
        if last_line and not last_line.startswith(_OBJECT):  # a user who can rename the file may have replaced it
            raise OSError(errno.EINVAL, "its last line is not an audit entry; name another file", self._path)
        if whole_bytes != len(tail):  # a crash cut this line off, so its answer was never sent
            os.ftruncate(self._descriptor, size - (len(tail) - whole_bytes))
        if whole_bytes:
            self._previous = link(tail[:whole_bytes].splitlines()[-1])


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
