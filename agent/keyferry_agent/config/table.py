"""Strict reading of TOML. A table returns checked values by name, and collects problems instead of raising an exception."""

import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from keyferry import private_files
from keyferry.content import byte_order_mark

from .validators import InvalidValue, short_repr

__all__ = ["ConfigTable", "File", "load"]

_BYTE_ORDER_MARK: Final = "\ufeff"


class File(NamedTuple):
    """A parsed TOML file, or why it could not be parsed; and one message for each way in which others can write to it."""

    raw: Mapping[str, Any] | None
    problem: str
    open_to_others: list[str]


def load(path: Path, *, regular: bool = False) -> File:
    """Read and parse a file. `regular`: refuse all but regular files; reading a pipe could block."""
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
    except (ValueError, RecursionError) as error:  # too many digits in a number, or arrays too deeply nested
        problem = f"not TOML: {error}"
    return File(None, problem, open_to_others)


def _has_byte_order_mark(encoding: str) -> str:
    return f"begins with a byte order mark ({encoding}); save it as UTF-8 without one"


class ConfigTable:
    """A TOML table that returns checked values by name, and collects problems instead of raising an exception."""

    def __init__(self, path: str, raw: Mapping[str, Any], problems: list[str], warnings: list[str]) -> None:
        self._path = path
        self._raw = raw
        self._known: list[str] = []
        self.problems = problems
        self.warnings = warnings

    @property
    def is_empty(self) -> bool:
        """Whether the table has no names."""
        return not self._raw

    def has(self, name: str) -> bool:
        """Return whether the table has this name."""
        return name in self._raw

    def add_problem(self, name: str, why: str) -> None:
        """Add a problem with a value."""
        self.problems.append(f"{self._at(name)}: {why}")

    def add_warning(self, name: str, why: str) -> None:
        """Add a warning about a value."""
        self.warnings.append(f"{self._at(name)}: {why}")

    def get(self, name: str, requirement: str, check: Callable[[Any], Any], default: Any) -> Any:
        """Return the value that `check` returns, or the default if the name is absent or the value is invalid.

        `check` raises `InvalidValue` with a reason. After ValueError or TypeError, the message has the `requirement`.
        """
        self._known.append(name)
        if name not in self._raw:
            return default
        try:
            return check(self._raw[name])
        except (ValueError, TypeError, KeyError) as error:
            # KeyError: a user or a group that this host does not have.
            self.add_problem(
                name,
                str(error)
                if isinstance(error, InvalidValue)
                else f"expected {requirement}, not {short_repr(self._raw[name])}",
            )
            return default

    def tables(self, name: str) -> list["ConfigTable"]:
        """Return the tables of an array of tables, `[[name]]`; an empty list if it is absent or invalid."""
        self._known.append(name)
        values = self._raw.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            self.add_problem(name, f"expected tables: [[{name}]]")
            return []
        return [
            ConfigTable(f"{self._at(name)}[{i}]", value, self.problems, self.warnings) for i, value in enumerate(values)
        ]

    def table(self, name: str) -> "ConfigTable":
        """Return the table `[name]`; an empty one if it is absent or invalid."""
        self._known.append(name)
        value = self._raw.get(name, {})
        if not isinstance(value, dict):
            self.add_problem(name, f"expected a table: [{name}]")
            value = {}
        return ConfigTable(self._at(name), value, self.problems, self.warnings)

    def check_unknown(self) -> None:
        """Add a problem for every name that no call has read: it is unknown."""
        for name in self._raw:
            if name not in self._known:
                self.add_problem(name, f"unknown; expected one of {', '.join(self._known)}")

    def _at(self, name: str) -> str:
        text = name if name.isprintable() else ascii(name)[1:-1]  # a problem is one line
        return f"{self._path}.{text}" if self._path else text
