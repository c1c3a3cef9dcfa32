"""Finds the rotated files of an audit log, however logrotate is configured to name them."""

import os
import re
import stat
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from ..chained_log.reading import ChainError, Identity, entry, identity, lines

__all__ = ["File", "Found", "find", "not_among"]

_COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".lzma", ".lzo", ".lz", ".Z", ".zip", ".7z")
_AFTER_NAME: Final = re.compile(r"[-._](?:.*[-._])?\d.*|\d{6,}.*", re.DOTALL)
"""Suffixes after the whole name: `.1`, `-20261129`, `-2026-11-29`, `-20261129-1764412345`, `.old-3`; but not `.sha256`."""
_BEFORE_EXTENSION: Final = re.compile(r"[-._]\d[-._:TZ\d]*")
"""Parts before the extension, with logrotate's `extension`: `audit-20261129.jsonl`, `audit.1.jsonl`."""
_SNIFF_LINES: Final = 1_000


class File(NamedTuple):
    """A file to read.

    `optional`: the file counts only if its chain is connected with the chain of the others. `mixed`: the file may contain
    lines that do not look like audit entries, as a journal does.
    """

    path: Path
    identity: Identity | None = None
    optional: bool = False
    mixed: bool = False


class Found(NamedTuple):
    """The files of an audit log, and a message for each path that looks like such a file and cannot be read."""

    files: list[File]
    problems: list[str]


def find(current: Path) -> Found:
    """Return the file to which an agent writes and the rotated files in its folder, unordered.

    Raises `ChainError` if `current` is not a regular file.
    """
    files: dict[Identity, File] = {}
    problems: list[str] = []
    try:
        status = current.stat()
    except OSError as error:
        problems.append(f"{current}: {error.strerror}")
    else:
        if not stat.S_ISREG(status.st_mode):
            raise ChainError(f"{current}: not a file; name the files that its content is kept in")
        files[identity(status)] = File(current, identity(status))
    for name in dict.fromkeys((current, Path(os.path.realpath(current)))):
        _look_beside(name, files, problems)
    return Found([*files.values()], problems)


def not_among(files: Iterable[Path]) -> list[Path]:
    """Return the rotated files that belong to `files` and are missing from them."""
    by_identity: dict[Identity, File] = {}
    paths = []
    for path in files:
        try:
            status = path.stat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            by_identity[identity(status)] = File(path)
            paths.append(path)
    count = len(by_identity)
    for path in paths:
        _look_beside(path, by_identity, [], sniff=False)
        _look_before(path, by_identity)
    return [file.path for file in [*by_identity.values()][count:]]


def _look_beside(current: Path, files: dict[Identity, File], problems: list[str], *, sniff: bool = True) -> None:
    try:
        names = sorted(os.listdir(current.parent))
    except OSError as error:
        problems.append(f"{current.parent}: {error.strerror}, so rotated files cannot be found")
        return
    for name in names:
        is_rotated, has_prefix, has_infix = _likeness(name, current.name)
        path = current.with_name(name)
        if not (is_rotated or (sniff and (has_prefix or has_infix))):
            continue
        try:
            status = path.stat()
        except OSError as error:
            if is_rotated:
                problems.append(f"{path}: {error.strerror}")
            continue
        if stat.S_ISDIR(status.st_mode) or identity(status) in files:
            continue
        if not stat.S_ISREG(status.st_mode):
            if is_rotated:
                problems.append(f"{path}: not a file")
        elif is_rotated or _has_entries(path):
            files[identity(status)] = File(path, identity(status), optional=has_infix and not is_rotated)


def _look_before(path: Path, files: dict[Identity, File]) -> None:
    """If `path` is a rotated file, add the file to which the agent writes, and its other rotated files."""
    try:
        names = sorted(os.listdir(path.parent))
    except OSError:
        return
    for name in names:
        current = path.with_name(name)
        try:
            status = current.stat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode) and _likeness(path.name, name)[0] and identity(status) not in files:
            if _has_entries(current):
                files[identity(status)] = File(current, identity(status))
            _look_beside(current, files, [], sniff=False)


def _likeness(name: str, current: str) -> tuple[bool, bool, bool]:
    """Compare a file's name with the current file's name.

    Return whether logrotate may have made the name, whether it begins with the current name, and whether the two differ only in
    the middle.
    """
    base_name = next((name.removesuffix(end) for end in _COMPRESSED if name.endswith(end)), name)
    if name == current:
        return False, False, False
    if name.startswith(current):
        return base_name != name or bool(_AFTER_NAME.fullmatch(name[len(current) :])), True, False
    stem, extension = os.path.splitext(current)
    if extension and base_name.startswith(stem) and base_name.endswith(extension):
        middle = base_name[len(stem) : -len(extension)]
        return bool(_BEFORE_EXTENSION.fullmatch(middle)), False, middle[:1] in ("-", ".", "_")
    return False, False, False


def _has_entries(path: Path) -> bool:
    """Return whether the first lines of a file contain an audit entry."""
    try:
        return any(entry(path, line) is not None for line in islice(lines(path), _SNIFF_LINES))
    except (ChainError, OSError):
        return False
