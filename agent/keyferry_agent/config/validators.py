"""Checks of single values in the configuration: each returns the value, or raises `InvalidValue` with the reason."""

import grp
import os
import pwd
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from ..authz.grants import ACTIONS

__all__ = [
    "FINGERPRINT",
    "HOST",
    "KEY",
    "POD",
    "UNIT",
    "InvalidValue",
    "actions",
    "address",
    "arn_part",
    "at_least",
    "between",
    "boolean",
    "gid",
    "identity",
    "list_of",
    "matching",
    "mode",
    "one_of",
    "pairs",
    "path",
    "remote_address",
    "seconds",
    "short_repr",
    "socket_path",
    "string",
    "uid",
    "unseal",
]


class InvalidValue(ValueError):
    """A value is invalid. The message replaces the general one of `ConfigTable.get`."""


_MAX_SOCKET_PATH_BYTES: Final = 107  # sun_path of sockaddr_un, less its NUL


_PORTS: Final = 65_536


_NO_ID: Final = 2**32 - 1  # (uid_t) -1


def string(value: Any) -> str:
    """Return a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def path(value: Any) -> Path:
    """Return an absolute path."""
    result = Path(string(value))
    if not result.is_absolute() or "\0" in value:
        raise InvalidValue(f"expected an absolute path, not {short_repr(value)}")
    return result


def socket_path(value: Any) -> Path:
    """Return an absolute path that fits into a socket's address."""
    file_path = path(value)
    if len(os.fsencode(file_path)) > _MAX_SOCKET_PATH_BYTES:
        raise InvalidValue(
            f"a socket's path has at most {_MAX_SOCKET_PATH_BYTES} bytes; this has {len(os.fsencode(file_path))}"
        )
    return file_path


def identity(value: Any) -> int:
    """Return the number of a user or group."""
    number: int = at_least(0)(value)
    if number >= _NO_ID:
        raise ValueError
    return number


def unseal(value: Any) -> Path:
    """Return a path; for `credential:NAME`, that of a credential from systemd."""
    text = string(value)
    if not text.startswith("credential:"):
        return path(text)
    name = text.removeprefix("credential:")
    if not name or "/" in name:
        raise InvalidValue(f"expected credential:NAME, not {short_repr(value)}")
    directory = os.environ.get("CREDENTIALS_DIRECTORY", "/run/credentials/keyferry-agent.service")
    return Path(directory, name)


def address(value: Any) -> str:
    """Return the path of a socket, or ADDRESS:PORT with a loopback address."""
    text = remote_address(value)
    if not text.startswith("/") and not ip_address(text.rpartition(":")[0].strip("[]")).is_loopback:
        raise InvalidValue(
            f"{short_repr(value)} is not a loopback address, and metrics have no authentication; "
            "set remote = true to serve other hosts and pods"
        )
    return text


def remote_address(value: Any) -> str:
    """Return the path of a socket, or ADDRESS:PORT with any IP address."""
    text = string(value)
    if text.startswith("/"):
        return str(socket_path(text))
    host, _, port = text.rpartition(":")
    ip_address(host.strip("[]"))
    if not port.isdecimal() or not 0 < int(port) < _PORTS:
        raise ValueError
    return text


def boolean(value: Any) -> bool:
    """Return a boolean."""
    if not isinstance(value, bool):
        raise TypeError
    return value


def mode(value: Any) -> int:
    """Return the number of a file mode from its octal text."""
    number = int(string(value), 8)
    if not 0 <= number <= 0o777:
        raise ValueError
    return number


def one_of(*choices: str) -> Callable[[Any], str]:
    """Return a check that accepts these strings."""

    def check(value: Any) -> str:
        if value not in choices:
            raise InvalidValue(f"expected one of {', '.join(choices)}, not {short_repr(value)}")
        return str(value)

    return check


def at_least(minimum: int) -> Callable[[Any], int]:
    """Return a check that accepts integers from `minimum`."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError
        return value

    return check


def between(minimum: int, maximum: int) -> Callable[[Any], int]:
    """Return a check that accepts integers from `minimum` to `maximum`."""

    def check(value: Any) -> int:
        number: int = at_least(minimum)(value)
        if number > maximum:
            raise ValueError
        return number

    return check


def seconds(value: Any) -> float:
    """Return a number of seconds above 0, at most an hour."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 3600:
        raise ValueError
    return float(value)


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise TypeError
    return tuple(string(entry) for entry in value)


_ACTION: Final = re.compile(r"\*|kms:[A-Za-z]*\*?")


KEY: Final = re.compile(r"\*|alias/[\w/*-]+|acs:kms:[\w*-]+:[\w*-]+:(key|alias)/[\w/*-]+|[\w*-]+", re.ASCII)


FINGERPRINT: Final = re.compile(r"sha256:[0-9a-f]{64}")


UNIT: Final = re.compile(r"[\w:.\\@-]+\.(service|scope)", re.ASCII)


ACCESS_KEY_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]", re.ASCII)


POD: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


_ARN_PART: Final = re.compile(r"[A-Za-z0-9_-]{1,24}")


def matching(pattern: re.Pattern[str]) -> Callable[[Any], str]:
    """Return a check that accepts strings that match the whole pattern."""

    def check(value: Any) -> str:
        if not pattern.fullmatch(string(value)):
            raise ValueError
        return str(value)

    return check


def list_of(pattern: re.Pattern[str], requirement: str) -> Callable[[Any], tuple[str, ...]]:
    """Return a check that accepts lists of strings that all match the pattern. `requirement`: the noun for its messages."""

    def check(value: Any) -> tuple[str, ...]:
        strings = _strings(value)
        for string in strings:
            if not pattern.fullmatch(string):
                raise InvalidValue(f"{string!r} is not a valid {requirement}")
        return strings

    return check


def actions(value: Any) -> tuple[str, ...]:
    """Return a list of actions. Each must match at least one existing action."""
    actions = list_of(_ACTION, "action")(value)
    for action in actions:
        # A misspelt action would silently allow nothing. `ACTIONS` already has the actions of later versions.
        if not any(fnmatchcase(name, action) for name in ACTIONS):
            raise InvalidValue(f"{action!r} is not an action")
    return actions


def arn_part(value: Any) -> str:
    """Return a part of an ARN: at most 24 characters, so that a page of 100 of the longest aliases fits into a message."""
    if not _ARN_PART.fullmatch(string(value)):
        raise ValueError
    return str(value)


def pairs(value: Any) -> Mapping[str, str]:
    """Return a read-only table of strings."""
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise TypeError
    return MappingProxyType(value)


def uid(value: Any) -> int:
    """Return the number of a user of this host, from a name or a number."""
    return identity(value) if isinstance(value, int) else pwd.getpwnam(string(value)).pw_uid


def gid(value: Any) -> int:
    """Return the number of a group of this host, from a name or a number."""
    return identity(value) if isinstance(value, int) else grp.getgrnam(string(value)).gr_gid


def short_repr(value: Any) -> str:
    """Return a value's repr for a message: one line of at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print such integers; a hexadecimal integer in TOML may have as many digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
