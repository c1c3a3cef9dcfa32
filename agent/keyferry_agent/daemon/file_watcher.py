"""How files looked when they were last read: `stat_files` finds out whether one was replaced."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from ..config import grant_files

__all__ = ["FileStats", "stat_files"]

FileStats: TypeAlias = Mapping[Path, tuple[int, ...] | None]
"""How files looked: which file each name led to, its size, and when it was last changed; None for one that is not there.

A folder looks as its files do."""


def stat_files(paths: Sequence[Path]) -> FileStats:
    """Look at files."""
    return {path: _stat(path) for path in paths}


def _stat(path: Path) -> tuple[int, ...] | None:
    status = _status(path)
    if status is None or not os.path.isdir(path):
        return status
    try:
        files = [_status(file) for file in grant_files.find(path)]
    except OSError:
        return status
    # Also a file that was changed in place, or behind a symbolic link: the folder itself looks the same.
    return (*status, *(number for each in files if each is not None for number in each))


def _status(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns
