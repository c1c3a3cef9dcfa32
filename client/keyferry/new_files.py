"""Writes files that appear complete, or not at all: new files, which replace none (`creating`), and replacements (`replacing`).

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

__all__ = ["create", "creating", "naming", "replacing", "sync_folder"]

_UNNAMED: Final = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
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
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    with _written(path, path, 0o600, replaces=False) as descriptor, open(descriptor, "wb", closefd=False) as file:
        yield file
        with naming(path):
            file.flush()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mode: int = 0o600) -> Iterator[int]:
    """Lend the descriptor of a new file. At the end of the block it replaces the file at `path`, if there is one.

    The new file and its name are on the disk then. When the block raises, the file at `path` is unchanged. A symlink stays, and
    the file that it names is replaced. The new file has the `mode`, less the umask. The block can change its mode and owner
    through the descriptor. Raises OSError with the path.
    """
    path = os.fspath(path)
    with _written(path, os.path.realpath(path), mode, replaces=True) as descriptor:
        yield descriptor


@contextlib.contextmanager
def _written(path: str, real_path: str, mode: int, *, replaces: bool) -> Iterator[int]:
    """Lend the descriptor of a new file, which gets the name `real_path` at the end of the block. Errors have the `path`."""
    parent, name = os.path.split(real_path)
    with contextlib.ExitStack() as stack:
        with naming(path):
            folder = stack.enter_context(_opened(parent or ".", os.O_PATH | _FOLDER))
            temporary_name = f".keyferry-{secrets.token_hex(8)}.partial"
            has_no_name, descriptor = _open_beside(temporary_name, mode, folder)
            stack.callback(os.close, descriptor)
        try:
            yield descriptor
            with naming(path):
                os.fsync(descriptor)
                if has_no_name:
                    _link(descriptor, temporary_name if replaces else name, folder)
                if replaces:
                    os.replace(temporary_name, name, src_dir_fd=folder, dst_dir_fd=folder)
                elif not has_no_name:
                    _name(temporary_name, name, folder)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary_name, dir_fd=folder)
        with naming(path):
            sync_folder(".", folder)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], flags: int, folder: int | None = None) -> Iterator[int]:
    """Lend a descriptor. That of a folder, as a dir_fd, stays valid when the folder is moved."""
    descriptor = os.open(path, flags, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_beside(name: str, mode: int, folder: int) -> tuple[bool, int]:
    """Open a new file in a folder. Returns whether the file has no name, and its descriptor. `name` is for a named file."""
    with contextlib.suppress(OSError):
        os.stat("/proc/self/fd")  # `_link` needs this folder to name the file
        return True, os.open(".", _UNNAMED, mode, dir_fd=folder)
    return False, os.open(name, _NAMED, mode, dir_fd=folder)


def _link(descriptor: int, name: str, folder: int) -> None:
    """Name a file that has no name, as open(2) describes. A dir_fd makes Python call linkat(2). Replaces no file."""
    os.link(f"/proc/self/fd/{descriptor}", name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)


def sync_folder(path: str | os.PathLike[str], folder: int | None = None, *, tolerant: bool = True) -> None:
    """Sync the names in the folder at `path` to the disk. `folder`: the descriptor to which a relative path refers.

    If `tolerant`, the function ignores that a folder cannot be synced at all. Raises OSError.
    """
    try:
        with _opened(path, os.O_RDONLY | _FOLDER, folder) as descriptor:
            os.fsync(descriptor)
    except OSError as error:
        if not tolerant or error.errno not in _NOT_SYNCED:
            raise


def _name(temporary_name: str, name: str, folder: int) -> None:
    """Move a complete file to a name that must not exist."""
    try:
        os.link(temporary_name, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        os.close(os.open(name, _NAMED, 0o600, dir_fd=folder))  # no hard links: claim the name, then take it
        os.replace(temporary_name, name, src_dir_fd=folder, dst_dir_fd=folder)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Set the path in each OSError of the block, for a file that has no name yet, or a temporary name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), path) from None
