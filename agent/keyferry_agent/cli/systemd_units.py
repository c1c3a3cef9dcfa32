"""Read which sockets, folders and credentials the agent's service gets from systemd: runs `systemctl show` and `cat`."""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

__all__ = ["CREDENTIALS", "SERVICE", "Socket", "Unit", "UnitError", "read"]

SERVICE: Final = "keyferry-agent.service"
CREDENTIALS: Final = Path("/run/credentials", SERVICE)
TIMEOUT_SECONDS: Final = 10.0
_FOLDERS: Final = {
    "RuntimeDirectory": "/run",
    "StateDirectory": "/var/lib",
    "CacheDirectory": "/var/cache",
    "LogsDirectory": "/var/log",
}
"""A unit's settings for folders that systemd makes, owned by the service's user, and their parent folders."""
_CREDENTIAL: Final = re.compile(r"^\s*(?:Load|Set)Credential(?:Encrypted)?\s*=\s*([^:\s]+)", re.MULTILINE)
"""Credentials in a unit's text: systemd 252 shows the property itself as "[unprintable]"."""
_PROTECTION: Final = ("ProtectSystem", "ReadWritePaths", "PrivateNetwork", "RestrictAddressFamilies")
_LISTENS: Final = {"active", "activating"}


class UnitError(Exception):
    """The description of a unit could not be read from systemd. The message contains the reason."""


@dataclass(frozen=True, slots=True)
class Socket:
    """A socket that the service inherits from systemd. `path` is its file."""

    name: str
    path: Path | None


@dataclass(frozen=True, slots=True)
class Unit:
    """The agent's service. `is_known` is False if systemd was not asked; the other attributes are then empty or None."""

    sockets: tuple[Socket, ...] = ()
    folders: tuple[Path, ...] = ()
    """Folders that systemd makes for the service."""
    writable: tuple[Path, ...] | None = None
    """All folders that the service may write to; None if only its user's permissions restrict it."""
    credentials: frozenset[str] = frozenset()
    has_network: bool = True
    """Whether the service may open ports that other processes of this host can reach."""
    is_known: bool = field(default=False)

    def makes(self, path: Path) -> bool:
        """Return whether a file is directly in a folder that systemd makes for the service."""
        return path.parent in self.folders

    def protected(self, path: Path) -> list[str]:
        """Return a list with one message if the service may not write to a file, although its user may; else an empty list."""
        if self.writable is None or any(path.is_relative_to(folder) for folder in self.writable):
            return []
        return [f"{path.parent}: {SERVICE} may not write there; use /var/log/keyferry, or add ReadWritePaths="]


def read() -> Unit:
    """Return systemd's description of the service. Each `systemctl` may block for `TIMEOUT_SECONDS`. Raises `UnitError`."""
    properties = ("LoadState", "Wants", "Requires", "TriggeredBy", *_FOLDERS, *_PROTECTION)
    (unit_properties,) = _show([SERVICE], properties)
    if unit_properties.get("LoadState") != "loaded":
        raise UnitError(f"{SERVICE} is not loaded; install it and run systemctl daemon-reload")
    required_names = {
        name
        for name in (*unit_properties["Wants"].split(), *unit_properties["Requires"].split())
        if name.endswith(".socket")
    }
    trigger_names = {name for name in unit_properties["TriggeredBy"].split() if name.endswith(".socket")}
    folders = [
        Path(parent, name.split(":")[0])
        for setting, parent in _FOLDERS.items()
        for name in unit_properties.get(setting, "").split()
    ]
    writable = None
    if unit_properties.get("ProtectSystem") == "strict":
        writable = (*folders, *(Path(name.lstrip("-+")) for name in unit_properties.get("ReadWritePaths", "").split()))
    credentials = frozenset(_CREDENTIAL.findall(_systemctl("cat", "--no-pager", SERVICE)))
    return Unit(
        _sockets(sorted(trigger_names | required_names), required_names),
        tuple(folders),
        writable,
        credentials,
        has_network=_has_network(unit_properties),
        is_known=True,
    )


def _has_network(unit_properties: dict[str, str]) -> bool:
    families = unit_properties.get("RestrictAddressFamilies", "").split()
    is_list_of_allowed = bool(families) and not families[0].startswith("~")
    return unit_properties.get("PrivateNetwork") != "yes" and ("AF_INET" in families or not is_list_of_allowed)


def _sockets(names: list[str], required_names: set[str]) -> tuple[Socket, ...]:
    """Return the sockets of the units that listen or are started with the service: it inherits them at its next start."""
    if not names:
        return ()
    properties = ("Id", "ActiveState", "FileDescriptorName", "Listen")
    sockets = []
    for unit_properties in _show(names, properties):
        if unit_properties["ActiveState"] in _LISTENS or unit_properties["Id"] in required_names:
            name = unit_properties.get("FileDescriptorName") or unit_properties["Id"].removesuffix(".socket")
            paths = [line.removesuffix(" (Stream)") for line in unit_properties.get("Listen", "").splitlines()]
            sockets += [Socket(name, Path(path)) for path in paths]
    return tuple(sockets)


def _show(names: list[str], properties: tuple[str, ...]) -> list[dict[str, str]]:
    """Return properties of units. The values of a repeated property are lines. Raises `UnitError`."""
    units: list[dict[str, str]] = []
    for block in _systemctl("show", f"--property={','.join(properties)}", "--", *names).strip().split("\n\n"):
        unit_properties: dict[str, str] = {}
        for line in block.splitlines():
            name, _, value = line.partition("=")
            unit_properties[name] = f"{unit_properties[name]}\n{value}" if name in unit_properties else value
        units.append(unit_properties)
    return units


def _systemctl(*arguments: str) -> str:
    """Return the output of `systemctl`. Blocks for `TIMEOUT_SECONDS` at most. Raises `UnitError`."""
    command = ["systemctl", *arguments]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)  # noqa: S603 - a list
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnitError(f"systemctl {arguments[0]}: {error}") from None
    if process.returncode:
        raise UnitError(f"{' '.join(command[:2])}: {' '.join(process.stderr.split())}")
    return process.stdout
