"""Creates new files that appear complete, or not at all, and that never replace a file.

A partly written key file would block the next attempt. So a file is written without a name (`O_TMPFILE`), is synced to the
disk, and gets its name last: after a full disk or SIGKILL, no file is left. On a file system without such files, the file is
written in the same folder, under a name that ends in `.partial`.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from typing import BinaryIO, Final

__all__ = [
    "UNNAMED",
    "beside_name",
    "create",
    "creating",
    "link",
    "naming",
    "open_beside",
    "opened_folder",
    "sync_folder",
]

UNNAMED: Final = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
_NAMED: Final = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
_FOLDER: Final = os.O_DIRECTORY | os.O_CLOEXEC
_UNSUPPORTED: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of link(2) on file systems without hard links."""
_NOT_SYNCED: Final = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP)
"""Errors for a folder that cannot be opened to be synced, or whose file system does not sync folders."""


def create(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a new file of mode 0600. Raises OSError, and FileExistsError for a file that exists."""
    with creating(path) as file:
        file.write(content)


@contextlib.contextmanager
def creating(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Lend a file to write to. At the end of the block it is the new file `path`, of mode 0600.

    When the block raises, there is no file. Raises OSError with the path, and FileExistsError for a file that exists.
    """
    path = os.fspath(path)
    parent, name = os.path.split(path)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    with contextlib.ExitStack() as stack:
        with naming(path):
            folder = stack.enter_context(opened_folder(parent or "."))
            beside = beside_name()
            unnamed, descriptor = open_beside(beside, 0o600, folder)
        try:
            with open(descriptor, "wb") as file:
                yield file
                with naming(path):
                    file.flush()
                    os.fsync(descriptor)
                    if unnamed:
                        link(descriptor, name, folder)
                    else:
                        _name(beside, name, folder)
        finally:
            if not unnamed:
                with contextlib.suppress(OSError):
                    os.unlink(beside, dir_fd=folder)
        with naming(path):
            sync_folder(folder)


@contextlib.contextmanager
def opened_folder(path: str) -> Iterator[int]:
    """Lend a descriptor of a folder, for use as dir_fd. It stays valid when the folder is moved."""
    folder = os.open(path, os.O_PATH | _FOLDER)
    try:
        yield folder
    finally:
        os.close(folder)


def beside_name() -> str:
    """Return a name for a file that is not complete."""
    return f".keyferry-{secrets.token_hex(8)}.partial"


def open_beside(name: str, mode: int, folder: int, *, unnamed: int = UNNAMED) -> tuple[bool, int]:
    """Open a new file in a folder. Returns whether the file has no name, and its descriptor. `name` is for a named file."""
    with contextlib.suppress(OSError):
        os.stat("/proc/self/fd")  # `link` needs this folder to name the file
        return True, os.open(".", unnamed, mode, dir_fd=folder)
    return False, os.open(name, _NAMED, mode, dir_fd=folder)


def link(descriptor: int, name: str, folder: int) -> None:
    """Name a file that has no name, as open(2) describes. A dir_fd makes Python call linkat(2). Replaces no file."""
    os.link(f"/proc/self/fd/{descriptor}", name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)


def sync_folder(folder: int) -> None:
    """Sync a folder's names to the disk, where the file system supports it. Raises OSError for a fault of the disk."""
    try:
        descriptor = os.open(".", os.O_RDONLY | _FOLDER, dir_fd=folder)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SYNCED:
            raise


def _name(beside: str, name: str, folder: int) -> None:
    """Move a complete file to a name that must not exist."""
    try:
        os.link(beside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        os.close(os.open(name, _NAMED, 0o600, dir_fd=folder))  # no hard links: claim the name, then take it
        os.replace(beside, name, src_dir_fd=folder, dst_dir_fd=folder)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Set the path in each OSError of the block, for a file that has no name yet, or a temporary name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), path) from None
