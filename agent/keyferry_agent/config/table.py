"""Reading TOML strictly: tables that give out values by name and type, note everything that is wrong, and stop at nothing."""

import grp
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from keyferry import private_files
from keyferry.content import byte_order_mark

from ..authz.grants import ACTIONS

_LONGEST_SOCKET: Final = 107  # sun_path of sockaddr_un, less its NUL
_PORTS: Final = 65_536
_NO_ID: Final = 2**32 - 1  # (uid_t) -1
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
                str(error) if isinstance(error, _Problem) else f"expected {expected}, not {_shown(self._raw[name])}",
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


class _Problem(ValueError):
    """A check's own words for what is wrong."""


# --- checks of single values ------------------------------------------------------------------------------------------


def string(value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def path(value: Any) -> Path:
    """An absolute path."""
    made = Path(string(value))
    if not made.is_absolute() or "\0" in value:
        raise _Problem(f"expected an absolute path, not {_shown(value)}")
    return made


def socket_path(value: Any) -> Path:
    """An absolute path that fits into a socket's address."""
    made = path(value)
    if len(os.fsencode(made)) > _LONGEST_SOCKET:
        raise _Problem(f"a socket's path has at most {_LONGEST_SOCKET} bytes; this has {len(os.fsencode(made))}")
    return made


def identity(value: Any) -> int:
    """The number of a user or group."""
    number: int = at_least(0)(value)
    if number >= _NO_ID:
        raise ValueError
    return number


def unseal(value: Any) -> Path:
    """A path, or credential:NAME for one that systemd provides."""
    text = string(value)
    if not text.startswith("credential:"):
        return path(text)
    name = text.removeprefix("credential:")
    if not name or "/" in name:
        raise _Problem(f"expected credential:NAME, not {_shown(value)}")
    directory = os.environ.get("CREDENTIALS_DIRECTORY", "/run/credentials/keyferry-agent.service")
    return Path(directory, name)


def address(value: Any) -> str:
    """The path of a socket, or a port of this host's loopback: ADDRESS:PORT."""
    text = remote_address(value)
    if not text.startswith("/") and not ip_address(text.rpartition(":")[0].strip("[]")).is_loopback:
        raise _Problem(
            f"{_shown(value)} is not a loopback address, and metrics have no authentication; "
            "set remote = true to serve other hosts and pods"
        )
    return text


def remote_address(value: Any) -> str:
    """The path of a socket, or a port of any address of this host: ADDRESS:PORT."""
    text = string(value)
    if text.startswith("/"):
        return str(socket_path(text))
    host, _, port = text.rpartition(":")
    ip_address(host.strip("[]"))
    if not port.isdecimal() or not 0 < int(port) < _PORTS:
        raise ValueError
    return text


def boolean(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise TypeError
    return value


def mode(value: Any) -> int:
    """An octal mode as text."""
    made = int(string(value), 8)
    if not 0 <= made <= 0o777:
        raise ValueError
    return made


def one_of(*choices: str) -> Callable[[Any], str]:
    """One of these words."""

    def check(value: Any) -> str:
        if value not in choices:
            raise _Problem(f"expected one of {', '.join(choices)}, not {_shown(value)}")
        return str(value)

    return check


def at_least(least: int) -> Callable[[Any], int]:
    """An integer from `least`."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError
        return value

    return check


def seconds(value: Any) -> float:
    """A number of seconds, above 0 to an hour."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 3600:
        raise ValueError
    return float(value)


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise TypeError
    return tuple(string(entry) for entry in value)


_ACTION: Final = re.compile(r"\*|kms:[A-Za-z]*\*?")
KEY: Final = re.compile(r"\*|alias/[\w/*-]+|acs:kms:[\w*-]+:[\w*-]+:(key|alias)/[\w/*-]+|[\w*-]+", re.ASCII)
PIN: Final = re.compile(r"sha256:[0-9a-f]{64}")
UNIT: Final = re.compile(r"[\w:.\\@-]+\.(service|scope)", re.ASCII)
POD: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ARN_PART: Final = re.compile(r"[A-Za-z0-9_-]{1,24}")


def matching(pattern: re.Pattern[str]) -> Callable[[Any], str]:
    """A string that matches."""

    def check(value: Any) -> str:
        if not pattern.fullmatch(string(value)):
            raise ValueError
        return str(value)

    return check


def each(pattern: re.Pattern[str], expected: str) -> Callable[[Any], tuple[str, ...]]:
    """A list of strings that all match."""

    def check(value: Any) -> tuple[str, ...]:
        strings = _strings(value)
        for string in strings:
            if not pattern.fullmatch(string):
                raise _Problem(f"{string!r} is no {expected}")
        return strings

    return check


def actions(value: Any) -> tuple[str, ...]:
    """A list of actions that there are."""
    actions = each(_ACTION, "action")(value)
    for action in actions:
        # A misspelt action would silently allow nothing; those that later versions will know are known now.
        if not any(fnmatchcase(known, action) for known in ACTIONS):
            raise _Problem(f"{action!r} is no action")
    return actions


def arn_part(value: Any) -> str:
    """A part of an ARN, of at most 24 characters: so that a page of a hundred of the longest aliases fits a message."""
    if not _ARN_PART.fullmatch(string(value)):
        raise ValueError
    return str(value)


def pairs(value: Any) -> Mapping[str, str]:
    """A table of strings."""
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise TypeError
    return MappingProxyType(value)


def uid(value: Any) -> int:
    """A user of this host, by name or number."""
    return identity(value) if isinstance(value, int) else pwd.getpwnam(string(value)).pw_uid


def gid(value: Any) -> int:
    """A group of this host, by name or number."""
    return identity(value) if isinstance(value, int) else grp.getgrnam(string(value)).gr_gid


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer that has more; TOML's hexadecimal ones may
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
