"""The sockets: given by the service manager, or made: with the right mode from the start, never taken from an agent that lives,
gone at the end.
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

__all__ = ["ListeningError", "ListeningSocket", "assign", "open_listeners"]

_BACKLOG: Final = 512
_LOCK_SECONDS: Final = 5.0
"""For another agent that starts at the same moment to make its socket: it needs milliseconds."""


class ListeningError(Exception):
    """The socket cannot be had. The message says why, and what to do."""


class ListeningSocket(NamedTuple):
    """A socket that is listened on. `made`: how its file was when this agent made it; None where the manager did."""

    name: str
    path: Path
    socket: socket.socket
    seen: os.stat_result | None
    made: bool

    def close(self) -> None:
        """Stop listening; the file goes, if this agent has made it and it is still the one."""
        self.socket.close()
        self.remove()

    def remove(self) -> None:
        """Remove the socket's file at the end, if this agent has made it: another agent may have its own there."""
        if self.made and not self.lost():
            with suppress(OSError):
                self.path.unlink()

    def lost(self) -> bool:
        """Whether the socket's file is gone, or is another one."""
        if self.seen is None:
            return False
        try:
            now = self.path.lstat()
        except OSError:
            return True
        # The number of a removed file is soon another file's: its time tells them apart.
        seen = self.seen
        return (now.st_dev, now.st_ino, now.st_mtime_ns) != (seen.st_dev, seen.st_ino, seen.st_mtime_ns)


def open_listeners(listeners: Sequence[Listener], given: Sequence[tuple[str, socket.socket]]) -> list[ListeningSocket]:
    """Listen as the configuration says: on a socket that was given for it, else on one of its own.

    A given socket belongs to the listener of its name, or of its path; a sole one that has neither, to the only listener that
    has none. Raises `ListeningError`, also for a given socket that belongs to nobody.
    """
    found = assign(listeners, [(name, _path(sock)) for name, sock in given])
    opened: list[ListeningSocket] = []
    try:
        for listener in listeners:
            if listener.name in found:
                opened.append(_adopt(listener, given[found[listener.name]][1]))
            else:
                made = _take(listener)
                opened.append(ListeningSocket(listener.name, listener.path, made, None, made=True))
                opened[-1] = opened[-1]._replace(seen=listener.path.lstat())
    except (ListeningError, OSError) as error:
        for each in opened:
            each.close()
        if isinstance(error, OSError):
            raise ListeningError(f"{error.filename or listener.path}: {error.strerror}") from None
        raise
    return opened


def assign(listeners: Sequence[Listener], given: Sequence[tuple[str, Path | None]]) -> dict[str, int]:
    """Return, by the name of a listener, which of the given sockets is its own. A socket is given by its name and path.

    Raises `ListeningError` for a socket that belongs to no listener.
    """
    found: dict[str, int] = {}
    strangers = []
    for number, (name, path) in enumerate(given):
        by_name = [each.name for each in listeners if each.name == name and each.name not in found]
        by_path = [each.name for each in listeners if each.path == path and each.name not in found]
        for owner in (by_name or by_path)[:1]:
            found[owner] = number
        if not by_name and not by_path:
            strangers.append(number)
    rest = [each.name for each in listeners if each.name not in found]
    if len(strangers) == len(rest) == 1:  # one socket, one listener: nobody had to name anything
        found[rest[0]] = strangers.pop()
    if strangers:
        name, path = given[strangers[0]]
        raise ListeningError(
            f"systemd hands over a socket named {name!r} at {path}, and no listener has this name or path: set "
            f"FileDescriptorName= of the socket unit to the name of a [[listener]] ({', '.join(rest) or 'all have one'}), or "
            "disable and stop the socket unit"
        )
    return found


def _path(sock: socket.socket) -> Path | None:
    name = sock.getsockname() if sock.family == socket.AF_UNIX else ""
    return Path(name) if isinstance(name, str) and name else None


def _adopt(listener: Listener, sock: socket.socket) -> ListeningSocket:
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        raise ListeningError(
            f"the socket for {listener.name!r} is no Unix stream socket: use ListenStream=/an/absolute/path"
        )
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ListeningError(f"the socket for {listener.name!r} is not listening: the socket unit needs Accept=no")
    path = _path(sock)
    try:
        seen = path.lstat() if path else None
    except OSError:  # not to be seen from here
        seen = None
    return ListeningSocket(listener.name, path or listener.path, sock, seen, made=False)


def _take(listener: Listener) -> socket.socket:
    """Make the socket file and listen on it; a stale one is replaced. Raises `ListeningError`."""
    path = listener.path
    _check_directory(path.parent)
    try:
        # Of two agents that start at once, one would take the other's socket, not yet listened on, for a stale one.
        with Lock(path, seconds=_LOCK_SECONDS):
            return _make(listener, path)
    except LockError as error:
        raise ListeningError(str(error)) from None


def _make(listener: Listener, path: Path) -> socket.socket:
    _clear(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)  # nobody but the owner can connect before the mode is set
    try:
        made.bind(os.fspath(path))
        _own(path, listener)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise ListeningError(f"{path}: {error.strerror or error}") from None
    finally:
        os.umask(old)
    return made


def _own(path: Path, listener: Listener) -> None:
    """Give the socket's file its owner and mode. By its inode: another user may own the folder, and put a link at the name."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise ListeningError(f"{path}: another user replaced the socket while it was made; check its folder")
        itself = f"/proc/self/fd/{descriptor}"
        if listener.uid is not None or listener.gid is not None:
            os.chown(itself, -1 if listener.uid is None else listener.uid, -1 if listener.gid is None else listener.gid)
        os.chmod(itself, listener.mode)
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
        raise ListeningError(f"{directory} is writable by everybody: anybody could replace the socket. chmod o-w it")


def _clear(path: Path) -> None:
    """Remove a socket file that nobody listens on."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ListeningError(f"{path} exists and is no socket; it is left alone")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(
            False
        )  # connect(2) blocks while a listener's queue is full, and another user may own the listener
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
