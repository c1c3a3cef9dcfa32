"""The status of watched files: `stat_files` shows whether a file was replaced since it was last read."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from ..config import grant_files

__all__ = ["FileStats", "stat_files"]

FileStats: TypeAlias = Mapping[Path, tuple[int, ...] | None]
"""By path: device, inode, size in bytes and ctime in nanoseconds; None for a missing file.

A folder's entry also has those of its files of grants."""


def stat_files(paths: Sequence[Path]) -> FileStats:
    """Return the status of files, following symbolic links. May block on a file system that hangs."""
    return {path: _stat(path) for path in paths}


def _stat(path: Path) -> tuple[int, ...] | None:
    status = _status(path)
    if status is None or not os.path.isdir(path):
        return status
    try:
        files = [_status(file) for file in grant_files.find(path)]
    except OSError:
        return status
    # A file that is changed in place, or behind a symbolic link, leaves the folder's own status unchanged.
    return (*status, *(number for each in files if each is not None for number in each))


def _status(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns
