"""The standard streams of a command, made usable before anything else runs.

A shell can start a command with closed descriptors (`>&-`). The next file that the command opened would then be its standard
output. A parent process can make a pipe non-blocking, and Python then fails where a write should block. A locale can have an
encoding without the characters of a name. `prepare` removes all three faults, so that no command has to handle them.
"""

import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, Final

__all__ = ["ESCAPE", "open_closed", "prepare", "reader", "writer"]

ESCAPE: Final = "backslashreplace"
"""Error handler for characters outside an encoding. In JSON, the escape of a lone surrogate is JSON's own."""

_OUTPUT: Final = 1
_ERROR: Final = 2
_STANDARD: Final = ((0, os.O_WRONLY), (_OUTPUT, os.O_RDONLY), (_ERROR, os.O_RDWR))
"""How a closed standard descriptor is opened: reading from 0 and writing to 1 still fail (EBADF), as while it was closed.

A message to a closed standard error is dropped.
"""


def prepare() -> None:
    """Open the closed ones of descriptors 0, 1 and 2, and replace `sys.stdout` and `sys.stderr`. For commands only."""
    open_closed()
    out, error = sys.stdout, sys.stderr
    sys.stdout = _text(_Descriptor(_OUTPUT, "wb", closefd=False), out, lines=os.isatty(_OUTPUT))
    sys.stderr = _text(_Messages(_ERROR, "wb", closefd=False), error, lines=True)


def open_closed() -> None:
    """Open the closed ones of descriptors 0, 1 and 2 on /dev/null, so that no other file becomes one of them."""
    for descriptor, flags in _STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            null_descriptor = _null(flags)
            if null_descriptor != descriptor:
                os.dup2(null_descriptor, descriptor)
                os.close(null_descriptor)
            os.set_inheritable(descriptor, True)  # the command is started over, and its child processes have it too


def reader(descriptor: int, *, buffering: int = -1) -> BinaryIO:
    """Return a binary file that reads from a descriptor and does not close it. Its reads block, also on a non-blocking one."""
    raw = _Descriptor(descriptor, "rb", closefd=False)
    return raw if buffering == 0 else io.BufferedReader(raw)


def writer(descriptor: int) -> BinaryIO:
    """Return a binary file that writes to a descriptor and does not close it. Its writes block, also on a non-blocking one."""
    return io.BufferedWriter(_Descriptor(descriptor, "wb", closefd=False))


class _Descriptor(io.FileIO):
    """An open descriptor whose reads and writes block."""

    def readinto(self, buffer: Any, /) -> int:
        return self._until_done(lambda: super(_Descriptor, self).readinto(buffer), select.POLLIN)

    def read(self, size: int | None = -1, /) -> bytes:
        while (data := super().read(-1 if size is None else size)) is None:
            self._wait(select.POLLIN)
        return data

    def write(self, data: Any, /) -> int:
        return self._until_done(lambda: super(_Descriptor, self).write(data), select.POLLOUT)

    def _until_done(self, act: Callable[[], int | None], event: int) -> int:
        while (count := act()) is None:
            self._wait(event)
        return count

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self.fileno(), event)
        poll.poll()


class _Messages(_Descriptor):
    """Standard error. A message that cannot be written is dropped: the exit code still reports the command's outcome."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _text(raw: io.FileIO, old_stream: Any, *, lines: bool) -> io.TextIOWrapper:
    """Return a text stream on a descriptor, in the encoding that the stream before had."""
    encoding = getattr(old_stream, "encoding", None) or "utf-8"
    if old_stream is not None:
        with suppress(OSError, ValueError):
            old_stream.flush()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=ESCAPE, line_buffering=lines)


def _null(flags: int) -> int:
    try:
        return os.open(os.devnull, flags)
    except OSError:  # a root directory without /dev: a descriptor that can be neither read from nor written to
        return os.open("/", os.O_PATH)
