"""The socket files: made with the right mode from the start, never taken from an agent that lives, gone at the end."""

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from .settings import Listener

__all__ = ["ListeningError", "is_own", "remove", "take"]

_BACKLOG: Final = 512


class ListeningError(Exception):
    """The socket cannot be had. The message says why, and what to do."""


def take(listener: Listener) -> socket.socket:
    """Make the socket file and listen on it; a stale one is replaced. Raises `ListeningError`."""
    path = listener.path
    _check_directory(path.parent)
    with _alone_in(path.parent):
        return _take(listener, path)


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    # Of two agents that start at once, one would take the other's socket, not yet listened on, for a stale one.
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ListeningError(f"{directory}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _take(listener: Listener, path: Path) -> socket.socket:
    _clear(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)  # nobody but the owner can connect before the mode is set
    try:
        made.bind(os.fspath(path))
        if listener.uid is not None or listener.gid is not None:
            os.chown(path, -1 if listener.uid is None else listener.uid, -1 if listener.gid is None else listener.gid)
        os.chmod(path, listener.mode)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise ListeningError(f"{path}: {error.strerror or error}") from None
    finally:
        os.umask(old)
    return made


def remove(path: Path, made: os.stat_result) -> None:
    """Remove a socket file at the end, if it is still the one that was made: another agent may have its own there."""
    if is_own(path, made):
        with suppress(OSError):
            path.unlink()


def is_own(path: Path, made: os.stat_result) -> bool:
    """Whether a socket file is still the one that was made."""
    try:
        now = path.lstat()
    except OSError:
        return False
    # The number of a removed file is soon another file's: its time tells them apart.
    return (now.st_dev, now.st_ino, now.st_mtime_ns) == (made.st_dev, made.st_ino, made.st_mtime_ns)


def _check_directory(directory: Path) -> None:
    try:
        status = directory.stat()
    except OSError as error:
        raise ListeningError(
            f"{directory}: {error.strerror}. Make it, owned by the agent's user, or name another socket with --socket"
        ) from None
    open_to_all = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
    if open_to_all:
        raise ListeningError(f"{directory} is writable by everybody: anybody could replace the socket. chmod o-w it")


def _clear(path: Path) -> None:
    """Remove a socket file that nobody listens on."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListeningError(f"{path} exists and is no socket; it is left alone")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ListeningError(f"{path}: {error.strerror or error}") from None
        else:
            raise ListeningError(f"{path}: another agent is serving there")
