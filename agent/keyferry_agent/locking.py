"""Exclusive locks between processes of one user, on lock files that no other user can open.

flock(2) takes a lock on any descriptor, also on a read-only one. So a lock on a folder, or on a file that others can read, is
a lock that others can take and keep. A lock file here belongs to the user who locks it, and has mode 0600.
"""

import errno
import fcntl
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

__all__ = ["Lock", "LockError", "lock_file_of"]

_RETRY_SECONDS: Final = 0.05
_MODE: Final = 0o600
_ROOT: Final = 0


class LockError(Exception):
    """The lock cannot be acquired. The message names the lock file and a remedy; the cause is the system's error, if any."""


def lock_file_of(path: Path) -> Path:
    """Return the path of the lock file beside `path`: hidden, so that patterns for rotated files do not match it."""
    return path.with_name(f".{path.name}.lock")


class Lock:
    """The lock on a path, held from the constructor until `release`, or for a `with` block.

    The constructor tries for `seconds` at most, and blocks as long. `with_owner`: the owner of `path` may use the same lock,
    also when root makes the lock file. Raises `LockError`, also for a lock file that another user made.
    """

    def __init__(self, path: Path, *, seconds: float, with_owner: bool = False) -> None:
        self._file = lock_file_of(path)
        deadline = time.monotonic() + seconds
        while True:
            descriptor = self._open(path, with_owner=with_owner)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is(descriptor):
                    self._descriptor = descriptor
                    return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise LockError(
                        f"{self._file}: another process holds this lock on {path}; end that process first"
                    ) from None
                time.sleep(_RETRY_SECONDS)
            except OSError as error:  # a file system without locks
                os.close(descriptor)
                raise LockError(f"{self._file}: cannot be locked: {error.strerror}") from error
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock and remove the lock file. May be called once."""
        # The file is removed while it is locked. A process that has opened it sees that the path no longer leads to it.
        with suppress(OSError):
            if self._is(self._descriptor):
                self._file.unlink()
        os.close(self._descriptor)

    def _is(self, descriptor: int) -> bool:
        """Return whether a descriptor refers to the lock file that is at the path now."""
        try:
            status = self._file.lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(status, os.fstat(descriptor))

    def _open(self, path: Path, *, with_owner: bool) -> int:
        """Open the lock file, or make it. Raises `LockError`."""
        try:
            owner = path.lstat() if with_owner else None
        except OSError:
            owner = None
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = self._make_or_find(flags, owner)
        except OSError as error:
            why = "a symbolic link; remove it" if error.errno == errno.ELOOP else error.strerror
            raise LockError(f"{self._file}: cannot be opened to lock {path}: {why}") from error
        status = os.fstat(descriptor)
        trusted_uids = {os.geteuid(), _ROOT, *([owner.st_uid] if owner else [])}
        if stat.S_ISREG(status.st_mode) and status.st_uid in trusted_uids and not status.st_mode & 0o077:
            return descriptor
        os.close(descriptor)
        raise LockError(
            f"{self._file}: not a lock file of this user (it belongs to user {status.st_uid}, with mode "
            f"{stat.S_IMODE(status.st_mode):04o}), so that others could keep it locked; remove it"
        )

    def _make_or_find(self, flags: int, owner: os.stat_result | None) -> int:
        while True:
            try:
                descriptor = os.open(self._file, flags | os.O_CREAT | os.O_EXCL, _MODE)
            except FileExistsError:
                with suppress(FileNotFoundError):  # the process that held the lock has removed the file
                    return os.open(self._file, flags)
            else:
                if owner is not None and os.geteuid() == _ROOT:
                    # Only a newly created file: an existing one may belong to another user.
                    os.fchown(descriptor, owner.st_uid, owner.st_gid)
                return descriptor
