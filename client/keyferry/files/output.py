"""Where a result goes: a file that appears whole, or not at all.

It is written without a name (`O_TMPFILE`), so that nothing of it is left when its writer is killed, and gets its name when
it is complete and on the disk. Where a file system has no such files it is written beside, under a name that says so.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO, Final

from .header import FileError

__all__ = ["replacing"]

_UNNAMED: Final = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
_NAMED: Final = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC


@contextlib.contextmanager
def replacing(path: str, *, source: BinaryIO | None = None, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Lend a file to write to; at the end of the block it is `path`, on the disk, in the place of what was there before.

    When the block raises, nothing has happened. `source` is what the block reads: it is never replaced by its own result.
    Raises `FileError` for a path that is no place for a file, OSError.
    """
    path = os.path.realpath(path)  # a rename would replace a symlink, not the file it names
    _check(path, source)
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        beside = f".keyferry-{secrets.token_hex(8)}.partial"
        unnamed, descriptor = _create(beside, mode, folder)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(descriptor)
                if unnamed:
                    _link(descriptor, beside, folder)
            os.replace(beside, os.path.basename(path), src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside, dir_fd=folder)
            raise
        os.fsync(folder)
    finally:
        os.close(folder)


def _check(path: str, source: BinaryIO | None) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path}: not a regular file; - is standard output")
    if source is not None and os.path.samestat(status, os.fstat(source.fileno())):
        raise FileError(f"{path}: that is the file to be read; a file is never replaced by its own result")


def _create(name: str, mode: int, folder: int) -> tuple[bool, int]:
    """A new file, and whether it has no name."""
    with contextlib.suppress(OSError):
        os.stat("/proc/self/fd")  # it is given a name through there
        return True, os.open(".", _UNNAMED, mode, dir_fd=folder)
    return False, os.open(name, _NAMED, mode, dir_fd=folder)


def _link(descriptor: int, name: str, folder: int) -> None:
    """Give a file without a name one: open(2) has the recipe, which needs linkat(2), and so a dir_fd."""
    os.link(f"/proc/self/fd/{descriptor}", name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
