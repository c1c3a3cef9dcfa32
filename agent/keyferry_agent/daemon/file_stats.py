"""The status of watched files, which shows whether a file was replaced since it was last read."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from ..config import grant_files
from ..config.options import Options
from ..config.settings import Settings

__all__ = ["FileStats", "read_settings", "stat_files"]

FileStats: TypeAlias = Mapping[Path, tuple[int, ...] | None]
"""By path: device, inode, size in bytes and ctime in nanoseconds; None for a missing file.

A folder's entry also has those of its files of grants."""


def stat_files(paths: Iterable[Path]) -> FileStats:
    """Return the status of files, following symbolic links. May block on a file system that hangs."""
    return {path: _stat(path) for path in paths}


def read_settings(options: Options, stats: FileStats) -> tuple[Settings, FileStats]:
    """Return the settings, and the status of their files from before they were read, so that a later change is detected.

    `stats`: the status of the files that are known already. Blocks. Raises `SettingsError` or OSError.
    """
    settings = options.settings()
    files = options.files(settings)
    current = {**stat_files(files), **{path: stats[path] for path in files if path in stats}}
    if settings.grants_folder not in (None, *stats):  # the folder was read before its stat
        settings = options.settings()
    return settings, current


def _stat(path: Path) -> tuple[int, ...] | None:
    status = _status(path)
    if status is None or not os.path.isdir(path):
        return status
    try:
        statuses = [_status(file) for file in grant_files.find(path)]
    except OSError:
        return status
    # A file that is changed in place, or behind a symbolic link, leaves the folder's own status unchanged.
    return (*status, *(number for status in statuses if status is not None for number in status))


def _status(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns
