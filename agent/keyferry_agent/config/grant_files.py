"""Files of grants: one for each application, in a folder that is read in the order of the files' names.

A file of grants may have `[[grant]]` tables only, so that one application's file cannot change settings of others.
"""

import os
from pathlib import Path
from typing import Final, NamedTuple

from keyferry import private_files

from .table import ConfigTable, load

__all__ = ["File", "beside", "find", "read"]

_NAME: Final = "grants.d"
_EXTENSION: Final = ".toml"
_ONLY: Final = "grant"


class File(NamedTuple):
    """A file of grants, or the folder itself, with its problems."""

    path: Path
    table: ConfigTable
    open_to_others: list[str]


def beside(configuration: Path) -> Path:
    """Return the default folder of grants, next to the configuration. It need not exist."""
    return configuration.absolute().with_name(_NAME)


def find(folder: Path) -> list[Path]:
    """Return the paths of all files of grants in a folder, sorted by name. Raises OSError."""
    return [folder / name for name in _names(folder) if name.endswith(_EXTENSION)]


def read(folder: Path) -> list[File]:
    """Return the folder and its files of grants, with their problems; an empty list if the folder does not exist."""
    entry = File(folder, ConfigTable("", {}, [], []), private_files.folder_problems(folder))
    try:
        paths = find(folder)
        ignored_names = [name for name in _names(folder) if not name.endswith(_EXTENSION)]
    except OSError as error:
        if not os.path.lexists(folder):
            return []
        entry.table.problems.append(f"this folder cannot be read: {error.strerror}")
        return [entry]
    for name in ignored_names:
        entry.table.warnings.append(f"{name!r} is not read: the name of a file of grants ends in {_EXTENSION}")
    return [entry, *(_read_file(path, is_folder_safe=not entry.open_to_others) for path in paths)]


def _names(folder: Path) -> list[str]:
    """Return the names in a folder, except hidden ones: editors and mounted ConfigMaps make those. Raises OSError."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _read_file(path: Path, *, is_folder_safe: bool) -> File:
    file = load(path, regular=True)
    content = file.raw or {}
    table = ConfigTable("", {name: value for name, value in content.items() if name == _ONLY}, [], [])
    if file.problem:
        table.problems.append(file.problem)
    for name in content:
        if name != _ONLY:
            table.add_problem(
                name, "a file of grants has [[grant]] tables only; move this into the configuration, or remove it"
            )
    return File(path, table, file.open_to_others if is_folder_safe else [])
