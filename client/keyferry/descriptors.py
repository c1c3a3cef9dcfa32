"""Paths that lead to open descriptors: /dev/stdout, /dev/fd/N, /proc/self/fd/N and symlinks to them.

Such a path is not a place in a folder. The file behind it may be a log that a shell keeps writing to, and replacing the file
would lose the log. Opening the path would be wrong too, because the new descriptor would have its own offset. So the commands
use the descriptor itself, as for `-`.
"""

import errno
import fcntl
import os
import re
import stat
from contextlib import suppress
from typing import BinaryIO, Final

from .streams import reader

__all__ = ["allows_reading", "allows_writing", "find", "find_output", "open_to_read"]

_MAX_LINKS: Final = 40
_OUTPUTS: Final = (1, 2)
_DESCRIPTORS: Final = re.compile(r"/proc/[0-9]+(/task/[0-9]+)?/fd")
_ANY_LINK_MODE: Final = 0o777
"""The mode of a symlink in a folder. The kernel's links to descriptors have the mode in which those are open."""


def find(path: str | os.PathLike[str]) -> int | None:
    """Return the descriptor of this process that a path leads to, and None for any other path.

    Raises OSError for a path to a descriptor that is not open, or to one of another process.
    """
    link = _descriptor_link(os.fspath(path))
    if link is None:
        return None
    descriptor = int(os.path.basename(link))
    with suppress(OSError):
        if _is_same(os.stat(link), descriptor):
            return descriptor
    # The path leads to a descriptor of another process. A shell's descriptor (/proc/$$/fd/1) was often inherited from it.
    with suppress(OSError):
        status = os.stat(link)
        for standard_descriptor in (0, *_OUTPUTS):
            if _is_same(status, standard_descriptor):
                return standard_descriptor
    raise OSError(errno.EBADF, "not an open descriptor of this process", os.fspath(path))


def find_output(path: str | os.PathLike[str]) -> int | None:
    """Return the descriptor that an output path leads to, or standard output or error if the path names the same file.

    Returns None for a place in a folder. Raises OSError for a descriptor of another process, or one that cannot be written to.
    """
    descriptor = find(path)
    if descriptor is None:
        try:
            status = os.stat(os.path.realpath(path))
        except OSError:
            return None
        descriptor = next((output for output in _OUTPUTS if _is_same(status, output) and allows_writing(output)), None)
    elif not allows_writing(descriptor):
        raise OSError(errno.EBADF, "this descriptor is not open for writing", os.fspath(path))
    return descriptor


def open_to_read(path: str | os.PathLike[str], *, buffering: int = -1) -> BinaryIO:
    """Open a file to read. A path to a descriptor is read from that descriptor's offset. Raises OSError."""
    descriptor = find(path)
    if descriptor is None:
        return open(path, "rb", buffering=buffering)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:  # memory that a parent process wrote, and did not rewind
        with suppress(OSError):
            return open(path, "rb", buffering=buffering)
    if not allows_reading(descriptor):
        raise OSError(errno.EBADF, "this descriptor is not open for reading", os.fspath(path))
    return reader(descriptor, buffering=buffering)


def _descriptor_link(path: str) -> str | None:
    """Return the kernel's link to a descriptor at which a path ends, and None for a path that ends elsewhere."""
    for _ in range(_MAX_LINKS):
        folder, name = os.path.split(path)
        try:
            folder = os.path.realpath(folder or ".")
            path = os.path.join(folder, name)
            if name.isdecimal() and _DESCRIPTORS.fullmatch(folder):
                return path
            mode = os.lstat(path).st_mode
            if not stat.S_ISLNK(mode):
                return None
            if name.isdecimal() and os.path.basename(folder) == "fd" and stat.S_IMODE(mode) != _ANY_LINK_MODE:
                return path
            path = os.path.join(folder, os.readlink(path))
        except OSError:
            return None
    return None


def _is_same(status: os.stat_result, descriptor: int) -> bool:
    try:
        return os.path.samestat(status, os.fstat(descriptor))
    except OSError:
        return False


def allows_reading(descriptor: int) -> bool:
    """Return whether a descriptor is open for reading."""
    return _mode(descriptor) in (os.O_RDONLY, os.O_RDWR)


def allows_writing(descriptor: int) -> bool:
    """Return whether a descriptor is open for writing."""
    return _mode(descriptor) in (os.O_WRONLY, os.O_RDWR)


def _mode(descriptor: int) -> int | None:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return None
