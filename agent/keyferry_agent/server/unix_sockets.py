"""Listening sockets, inherited from the service manager or created by the agent.

A created socket has its mode from the start, never replaces the socket of a running agent, and is removed when the agent exits.
"""

import os
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from ..config.settings import Listener
from ..locking import Lock, LockError

__all__ = ["BACKLOG", "ListeningError", "ListeningSocket", "assign", "open_listeners"]

BACKLOG: Final = 512
_LOCK_SECONDS: Final = 5.0
"""Seconds to wait while another agent that starts at the same time creates its socket, which takes milliseconds."""


class ListeningError(Exception):
    """The agent cannot listen on a socket. The message contains the reason and a remedy."""


class ListeningSocket(NamedTuple):
    """A listening socket. `original_stat`: its file's first status, if known. `is_own`: whether this agent created the file."""

    name: str
    path: Path
    socket: socket.socket
    original_stat: os.stat_result | None
    is_own: bool

    def close(self) -> None:
        """Stop listening, and remove the socket's file as `remove` does."""
        self.socket.close()
        self.remove()

    def remove(self) -> None:
        """Remove the socket's file if this agent created it and another agent has not replaced it."""
        if self.is_own and not self.was_replaced():
            with suppress(OSError):
                self.path.unlink()

    def was_replaced(self) -> bool:
        """Return whether the socket's file was removed or replaced. Returns False if its first status is unknown."""
        if self.original_stat is None:
            return False
        try:
            status = self.path.lstat()
        except OSError:
            return True
        # The file system soon reuses the inode number of a removed file. The time distinguishes the two files.
        old_status = self.original_stat
        return (status.st_dev, status.st_ino, status.st_mtime_ns) != (
            old_status.st_dev,
            old_status.st_ino,
            old_status.st_mtime_ns,
        )


def open_listeners(
    listeners: Sequence[Listener], given_sockets: Sequence[tuple[str, socket.socket]]
) -> list[ListeningSocket]:
    """Return a listening socket for each listener: a given one that belongs to it (`assign`), else a newly created one.

    Raises `ListeningError`, also for a given socket that belongs to no listener.
    """
    indexes = assign(listeners, [(name, _path(sock)) for name, sock in given_sockets])
    listening_sockets: list[ListeningSocket] = []
    try:
        for listener in listeners:
            if listener.name in indexes:
                listening_sockets.append(_adopt(listener, given_sockets[indexes[listener.name]][1]))
            else:
                sock = _create(listener)
                listening_sockets.append(ListeningSocket(listener.name, listener.path, sock, None, is_own=True))
                listening_sockets[-1] = listening_sockets[-1]._replace(original_stat=listener.path.lstat())
    except (ListeningError, OSError) as error:
        for opened_socket in listening_sockets:
            opened_socket.close()
        if isinstance(error, OSError):
            raise ListeningError(f"{error.filename or listener.path}: {error.strerror}") from None
        raise
    return listening_sockets


def assign(listeners: Sequence[Listener], given_sockets: Sequence[tuple[str, Path | None]]) -> dict[str, int]:
    """Map names of listeners to the indexes of the given sockets that belong to them. A socket is given by its name and path.

    A socket belongs to the listener with its name, else to the one with its path. If one socket and one listener are left
    over, they belong together. Raises `ListeningError` for a socket that belongs to no listener.
    """
    indexes: dict[str, int] = {}
    strangers = []
    for number, (name, path) in enumerate(given_sockets):
        by_name = [entry.name for entry in listeners if entry.name == name and entry.name not in indexes]
        by_path = [entry.name for entry in listeners if entry.path == path and entry.name not in indexes]
        for owner in (by_name or by_path)[:1]:
            indexes[owner] = number
        if not by_name and not by_path:
            strangers.append(number)
    free_names = [entry.name for entry in listeners if entry.name not in indexes]
    if len(strangers) == len(free_names) == 1:  # for one socket and one listener, no name is needed
        indexes[free_names[0]] = strangers.pop()
    if strangers:
        name, path = given_sockets[strangers[0]]
        raise ListeningError(
            f"systemd hands over a socket named {name!r} at {path}, and no listener has this name or path: set "
            f"FileDescriptorName= of the socket unit to a [[listener]]'s name ({', '.join(free_names) or 'all have one'}), "
            "or disable and stop the socket unit"
        )
    return indexes


def _path(sock: socket.socket) -> Path | None:
    name = sock.getsockname() if sock.family == socket.AF_UNIX else ""
    return Path(name) if isinstance(name, str) and name else None


def _adopt(listener: Listener, sock: socket.socket) -> ListeningSocket:
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise ListeningError(
            f"the socket for {listener.name!r} is not a Unix stream socket: use ListenStream=/an/absolute/path"
        )
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ListeningError(f"the socket for {listener.name!r} is not listening: the socket unit needs Accept=no")
    path = _path(sock)
    try:
        original_stat = path.lstat() if path else None
    except OSError:  # the path is not visible to this process
        original_stat = None
    return ListeningSocket(listener.name, path or listener.path, sock, original_stat, is_own=False)


def _create(listener: Listener) -> socket.socket:
    """Create the socket file and listen on it. Replaces a stale socket file. Raises `ListeningError`."""
    path = listener.path
    _check_directory(path.parent)
    try:
        # Without the lock, an agent could mistake a socket for stale that another agent has bound, but does not listen on yet.
        with Lock(path, seconds=_LOCK_SECONDS):
            return _bind(listener, path)
    except LockError as error:
        raise ListeningError(str(error)) from None


def _bind(listener: Listener, path: Path) -> socket.socket:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_umask = os.umask(0o177)  # only the owner can connect before the mode is set
    try:
        sock.bind(os.fspath(path))
        _set_owner(path, listener)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ListeningError(f"{path}: {error.strerror or error}") from None
    finally:
        os.umask(old_umask)
    return sock


def _set_owner(path: Path, listener: Listener) -> None:
    """Set the owner and mode of the socket's file. Uses a descriptor, since the folder's owner could put a link at the path."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise ListeningError(f"{path}: another user replaced the socket while it was made; check its folder")
        link = f"/proc/self/fd/{descriptor}"
        if listener.uid is not None or listener.gid is not None:
            os.chown(link, -1 if listener.uid is None else listener.uid, -1 if listener.gid is None else listener.gid)
        os.chmod(link, listener.mode)
    finally:
        os.close(descriptor)


def _check_directory(directory: Path) -> None:
    try:
        status = directory.stat()
    except OSError as error:
        raise ListeningError(
            f"{directory}: {error.strerror}. Make it, owned by the agent's user, or set another path (of the agent's own "
            "socket also with --socket)"
        ) from None
    open_to_all = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
    if open_to_all:
        raise ListeningError(f"{directory} is writable by all users: they could replace the socket. chmod o-w it")


def _remove_stale(path: Path) -> None:
    """Remove a socket file on which no process listens. Raises `ListeningError` for another file, or a running agent's."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListeningError(f"{path} exists and is not a socket; remove it, or listen on another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A blocking connect(2) would wait while a listener's queue is full, and another user may own that listener.
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass
        except OSError as error:
            raise ListeningError(f"{path}: {error.strerror or error}") from None
    raise ListeningError(f"{path}: another agent is serving there; end it, or set another socket")
