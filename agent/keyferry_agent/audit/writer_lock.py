"""The lock that keeps a second agent from writing to the same audit log: two writers would fork its chain."""

import errno
import os
import stat
from pathlib import Path
from typing import Final

import structlog

from ..locking import Lock, LockError, lock_file_of

__all__ = ["lock"]

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")

LOCK_SECONDS: Final = 2.0
"""Seconds to wait for the lock. After a restart, the previous agent may need a moment to release it."""
_NO_LOCK_FILE: Final = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
"""Errors after which a lock file cannot be created in a folder."""
_NO_LOCKS: Final = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""Errors of a file system without locks."""


def lock(path: str) -> Lock | None:
    """Lock an audit log for the life of an agent, beside the file that symbolic links lead to.

    Returns None if there is nothing to lock: for "stderr", a device, or a pipe without a name in a folder. Returns None, and
    logs a warning, if the folder cannot contain a lock file. Blocks for `LOCK_SECONDS` at most. Raises `LockError`.
    """
    real_path = Path(os.path.realpath(path))
    if path == "stderr" or not _is_lockable(path, real_path):
        return None
    try:
        return Lock(real_path, seconds=LOCK_SECONDS)
    except LockError as error:
        number = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
        has_lock_file = os.path.lexists(lock_file_of(real_path))
        if number in _NO_LOCKS or (number in _NO_LOCK_FILE and not has_lock_file):
            log.warning("startup.limited", what=f"a second agent could write to the same audit log: {error}")
            return None
        raise LockError(f"{path}: another agent may be writing to this audit log: {error}") from None


def _is_lockable(path: str, real_path: Path) -> bool:
    """Return whether a path leads to a file or pipe in a folder, or to a file that the agent has still to create."""
    try:
        status = os.stat(path)
    except OSError:
        return real_path.parent.is_dir()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
        return False
    try:
        return os.path.samestat(status, real_path.lstat())
    except OSError:  # for example, /dev/stdout that is a pipe
        return False
