"""Reading TOML strictly: tables that give out values by name and type, note everything that is wrong, and stop at nothing."""

import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from keyferry import private_files
from keyferry.content import byte_order_mark

from .validators import InvalidValue, shown

__all__ = ["ConfigTable", "File", "load"]

_BYTE_ORDER_MARK: Final = "\ufeff"


class File(NamedTuple):
    """What a TOML file has, or why it has nothing; and the ways in which other users can write it, one message each."""

    raw: Mapping[str, Any] | None
    problem: str
    open_to_others: list[str]


def load(path: Path, *, regular: bool = False) -> File:
    """Read a file. `regular`: refuse a pipe, which would be waited for, and all else that is not a regular file."""
    open_to_others: list[str] = []
    try:
        with open(
            os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if regular else 0)), encoding="utf-8"
        ) as file:
            if regular and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return File(None, "not a regular file", [])
            open_to_others = private_files.problems(path, file.fileno())
            text = file.read()
        if text.startswith(_BYTE_ORDER_MARK):
            return File(None, _has_byte_order_mark("UTF-8"), open_to_others)
        return File(tomllib.loads(text), "", open_to_others)
    except OSError as error:
        problem = str(error.strerror)
    except UnicodeDecodeError as error:
        encoding = byte_order_mark(error.object)
        problem = _has_byte_order_mark(encoding) if encoding else f"not UTF-8: {error.reason} at byte {error.start}"
    except (ValueError, RecursionError) as error:  # also of a number of thousands of digits, and of arrays in arrays
        problem = f"not TOML: {error}"
    return File(None, problem, open_to_others)


def _has_byte_order_mark(encoding: str) -> str:
    return f"begins with a byte order mark ({encoding}); save it as UTF-8 without one"


class ConfigTable:
    """A TOML table that gives out its values by name and type, and notes what is wrong instead of stopping."""

    def __init__(self, path: str, raw: Mapping[str, Any], problems: list[str], warnings: list[str]) -> None:
        self._path = path
        self._raw = raw
        self._taken: list[str] = []
        self.problems = problems
        self.warnings = warnings

    def has(self, name: str) -> bool:
        """Whether the file says anything for this name."""
        return name in self._raw

    def wrong(self, name: str, why: str) -> None:
        """Note what is wrong with a value."""
        self.problems.append(f"{self._at(name)}: {why}")

    def take(self, name: str, expected: str, check: Callable[[Any], Any], default: Any) -> Any:
        """A value that `check` accepts; ValueError and TypeError from it say that something else was expected."""
        self._taken.append(name)
        if name not in self._raw:
            return default
        try:
            return check(self._raw[name])
        except (ValueError, TypeError, KeyError) as error:
            # KeyError: a user or a group that this host does not have.
            self.wrong(
                name,
                str(error) if isinstance(error, InvalidValue) else f"expected {expected}, not {shown(self._raw[name])}",
            )
            return default

    def tables(self, name: str) -> list["ConfigTable"]:
        """An array of tables: `[[name]]`."""
        self._taken.append(name)
        values = self._raw.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            self.wrong(name, f"expected tables: [[{name}]]")
            return []
        return [
            ConfigTable(f"{self._at(name)}[{i}]", value, self.problems, self.warnings) for i, value in enumerate(values)
        ]

    def table(self, name: str) -> "ConfigTable":
        """A table: `[name]`; an empty one where it is absent."""
        self._taken.append(name)
        value = self._raw.get(name, {})
        if not isinstance(value, dict):
            self.wrong(name, f"expected a table: [{name}]")
            value = {}
        return ConfigTable(self._at(name), value, self.problems, self.warnings)

    def done(self) -> None:
        """Note every name that nobody asked for."""
        for name in self._raw:
            if name not in self._taken:
                self.wrong(name, f"unknown; known here are {', '.join(self._taken)}")

    def _at(self, name: str) -> str:
        shown = name if name.isprintable() else ascii(name)[1:-1]  # a problem is one line
        return f"{self._path}.{shown}" if self._path else shown


# --- checks of single values ------------------------------------------------------------------------------------------
