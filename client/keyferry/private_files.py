"""Files that other users must not write, and secrets that other users must not read: the rule, in one place.

The rule follows OpenSSH: ssh refuses an identity that others can read, and sshd (StrictModes) refuses a file in a folder that
others can write. The agent and the client check the descriptor that they read from, so that no file can be swapped in between.

Only regular files with a name are judged. A pipe, a terminal, and memory without a name (memfd_create(2)) that a parent process
handed over have no mode that means anything.
docs/configuration.md states the rule for operators.
"""

import os
import stat
from collections.abc import Collection, Iterator
from typing import Final, TypeAlias

__all__ = ["ALLOW_OPEN_FILES", "PrivateFileError", "allowed", "check", "folder_problems", "owner_of", "problems"]

ALLOW_OPEN_FILES: Final = "KEYFERRY_ALLOW_OPEN_FILES"
"""An environment variable. "1" switches the rule off, for platforms that cannot give files a private mode or owner."""

_ROOT: Final = 0
_CREDENTIALS: Final = "/run/credentials/"
"""systemd keeps the credentials of each unit in a folder here. Only root can make one."""

_DESCRIPTORS: Final = ("/dev/", "/proc/")
"""Where descriptors have paths."""

_MAX_LINKS: Final = 40
"""Symbolic links that the kernel follows in one path."""

_Path: TypeAlias = str | os.PathLike[str]


class PrivateFileError(Exception):
    """Another user can write a file, or read a secret. The message names the file, the fault and what to do."""


def allowed() -> bool:
    """Return whether the environment switches the rule off."""
    return os.environ.get(ALLOW_OPEN_FILES) == "1"


def check(descriptor: int, path: _Path, *, secret: bool = False, owners: Collection[int] | None = ()) -> None:
    """Check the open file behind `descriptor`, which `path` led to. Raises `PrivateFileError`.

    The parameters are those of `problems`.
    """
    messages = problems(path, descriptor, secret=secret, owners=owners)
    if messages:
        raise PrivateFileError("; ".join(messages))


def problems(
    path: _Path, descriptor: int | None = None, *, secret: bool = False, owners: Collection[int] | None = ()
) -> list[str]:
    """Return one message for each way in which other users can write the file, or read it if it is a `secret`.

    Without a descriptor the function opens the path itself, which takes no permission to read the file; a path that does not
    exist has no problems. The owner must be root or the effective user. `owners` are further users that root accepts as the
    owner; None stands for every user.
    """
    if allowed():
        return []
    if descriptor is None:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return []
        try:
            return problems(path, descriptor, secret=secret, owners=owners)
        finally:
            os.close(descriptor)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return []
    if status.st_nlink == 0 and os.path.abspath(path).startswith(_DESCRIPTORS):
        return []  # only processes that were given the descriptor have this file
    trusted_uids = {_ROOT, os.geteuid()}
    if os.geteuid() == _ROOT:
        trusted_uids.update([status.st_uid] if owners is None else owners)
    return [
        *_owner_problems(os.fspath(path), status, trusted_uids),
        *_mode_problems(os.fspath(path), status, secret=secret),
        *_folder_problems(os.fspath(path), trusted_uids),
    ]


def folder_problems(path: _Path) -> list[str]:
    """Return one message for each way in which other users can put files into a folder, or replace files in it.

    The owners are those of `problems`. A path that does not exist, or is not a folder, has no problems. A sticky bit is not
    enough: it does not keep other users from adding files.
    """
    if allowed() or not os.path.isdir(path):
        return []
    name, trusted_uids = os.fspath(path), {_ROOT, os.geteuid()}
    messages = list(_folder_problems(f"{name}/*", trusted_uids))
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & stat.S_ISVTX and mode & (stat.S_IWGRP | stat.S_IWOTH) and not _is_read_only(name):
        messages.append(f"{name}: mode {mode:04o}: other users can put files into it; chmod go-w {name}")
    return messages


def _is_read_only(path: str) -> bool:
    """Return whether a folder is on a read-only mount, so that its writers, if any, are elsewhere."""
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def owner_of(path: _Path | None) -> tuple[int, ...]:
    """Return the owner of a file as the argument `owners`; empty if the file does not exist."""
    try:
        return (os.stat(path).st_uid,) if path is not None else ()
    except OSError:
        return ()


def _owner_problems(path: str, status: os.stat_result, trusted_uids: Collection[int]) -> Iterator[str]:
    if status.st_uid not in trusted_uids:
        yield f"{path}: belongs to user {status.st_uid}, not to root or to the user running this; chown it"


def _mode_problems(path: str, status: os.stat_result, *, secret: bool) -> Iterator[str]:
    mode = stat.S_IMODE(status.st_mode)
    writable = bool(mode & (stat.S_IWGRP | stat.S_IWOTH))
    readable = bool(mode & stat.S_IROTH) or (bool(mode & stat.S_IRGRP) and not _group_may_read(path, status))
    if secret and (readable or writable):
        verbs = " and ".join(verb for verb, is_allowed in (("read", readable), ("write", writable)) if is_allowed)
        yield f"{path}: mode {mode:04o}: other users can {verbs} it; chmod 600 {path}"
    elif writable:
        yield f"{path}: mode {mode:04o}: other users can write it; chmod go-w {path}"


def _group_may_read(path: str, status: os.stat_result) -> bool:
    """Return whether root gave a secret to a group for this process: a Kubernetes fsGroup, or a systemd credential."""
    if status.st_uid != _ROOT:
        return False
    if os.path.realpath(path).startswith(_CREDENTIALS):
        # The group bits are those of an access control list there, which names the unit's user.
        return status.st_gid == _ROOT or status.st_gid in _groups()
    return os.geteuid() != _ROOT and status.st_gid in _groups()


def _groups() -> set[int]:
    return {os.getegid(), *os.getgroups()}


def _folder_problems(path: str, trusted_uids: Collection[int]) -> Iterator[str]:
    """Yield one message for each folder and each link on the way to the file with which others can replace it."""
    for name, status in _hops(os.path.abspath(path)):
        if stat.S_ISLNK(status.st_mode):
            if status.st_uid not in trusted_uids:
                yield f"{path}: user {status.st_uid} owns the link {name}, and can point it to another file; remove it"
            continue
        try:
            read_only = _is_read_only(name)
        except OSError:
            continue
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid not in trusted_uids:
            yield f"{path}: its folder {name} belongs to user {status.st_uid}: that user can replace the file; chown {name}"
        # In a sticky folder users replace only files of their own. A read-only mount has its writers, if any, elsewhere: the
        # folder of a Kubernetes ConfigMap has mode 0777, below a folder of the host that only root can enter.
        elif mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX and not read_only:
            yield f"{path}: its folder {name} has mode {mode:04o}: other users can replace the file; chmod go-w {name}"


def _hops(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield each folder and each symbolic link that the kernel goes through to open an absolute path, once."""
    visited_paths: set[str] = set()
    components, place = [part for part in reversed(path.split("/")) if part], "/"
    links = 0
    while True:
        try:
            status = os.lstat(place)
        except OSError:  # the file is gone, or belongs to another process (/proc/self/fd)
            return
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MAX_LINKS:
                return
            if place not in visited_paths:
                visited_paths.add(place)
                yield place, status
            try:
                target = os.readlink(place)
            except OSError:
                return
            components += [part for part in reversed(target.split("/")) if part]
            place = "/" if target.startswith("/") else os.path.dirname(place)
            continue
        if stat.S_ISDIR(status.st_mode) and place not in visited_paths:
            visited_paths.add(place)
            yield place, status
        if not components:
            return
        part = components.pop()
        if part != ".":
            place = os.path.dirname(place) if part == ".." else os.path.join(place, part)
