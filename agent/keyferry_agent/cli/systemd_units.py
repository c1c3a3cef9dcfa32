"""What systemd will give the agent's service: sockets, folders and credentials, by its units. Asks `systemctl show`."""

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
"""Settings of a unit for folders that systemd makes, owned by the service's user, and the folders that these are in."""
_CREDENTIAL: Final = re.compile(r"^\s*(?:Load|Set)Credential(?:Encrypted)?\s*=\s*([^:\s]+)", re.MULTILINE)
"""In the text of a unit: systemd 252 shows the property itself as "[unprintable]"."""
_PROTECTION: Final = ("ProtectSystem", "ReadWritePaths")
_LISTENS: Final = {"active", "activating"}


class UnitError(Exception):
    """systemd did not describe the unit. The message says why."""


@dataclass(frozen=True, slots=True)
class Socket:
    """A socket that systemd hands over, with its name and path."""

    name: str
    path: Path | None


@dataclass(frozen=True, slots=True)
class Unit:
    """The agent's service, as far as it is known. Without systemd nothing is."""

    sockets: tuple[Socket, ...] = ()
    folders: tuple[Path, ...] = ()
    """Folders that systemd makes for the service."""
    writable: tuple[Path, ...] | None = None
    """All folders that the service may write to; None: those that its user may write to."""
    credentials: frozenset[str] = frozenset()
    is_known: bool = field(default=False)

    def makes(self, path: Path) -> bool:
        """Whether a file is directly in a folder that systemd makes for the service."""
        return path.parent in self.folders

    def protected(self, path: Path) -> list[str]:
        """Return a message where the service may not write to a file, although its user may."""
        if self.writable is None or any(path.is_relative_to(folder) for folder in self.writable):
            return []
        return [f"{path.parent}: {SERVICE} may not write there; use /var/log/keyferry, or add ReadWritePaths="]


def read() -> Unit:
    """Return what systemd knows of the service. Blocks for `TIMEOUT_SECONDS` at most. Raises `UnitError`."""
    wanted = ("LoadState", "Wants", "Requires", "TriggeredBy", *_FOLDERS, *_PROTECTION)
    (shown,) = _show([SERVICE], wanted)
    if shown.get("LoadState") != "loaded":
        raise UnitError(f"{SERVICE} is not installed, or systemctl daemon-reload is missing")
    needed = {name for name in (*shown["Wants"].split(), *shown["Requires"].split()) if name.endswith(".socket")}
    triggers = {name for name in shown["TriggeredBy"].split() if name.endswith(".socket")}
    folders = [
        Path(parent, name.split(":")[0])
        for setting, parent in _FOLDERS.items()
        for name in shown.get(setting, "").split()
    ]
    writable = None
    if shown.get("ProtectSystem") == "strict":
        writable = (*folders, *(Path(name.lstrip("-+")) for name in shown.get("ReadWritePaths", "").split()))
    credentials = frozenset(_CREDENTIAL.findall(_systemctl("cat", "--no-pager", SERVICE)))
    return Unit(_sockets(sorted(triggers | needed), needed), tuple(folders), writable, credentials, is_known=True)


def _sockets(names: list[str], needed: set[str]) -> tuple[Socket, ...]:
    """Return those of these socket units that the service gets at its next start: they listen, or the start starts them."""
    if not names:
        return ()
    wanted = ("Id", "ActiveState", "FileDescriptorName", "Listen")
    found = []
    for shown in _show(names, wanted):
        if shown["ActiveState"] in _LISTENS or shown["Id"] in needed:
            name = shown.get("FileDescriptorName") or shown["Id"].removesuffix(".socket")
            paths = [line.removesuffix(" (Stream)") for line in shown.get("Listen", "").splitlines()]
            found += [Socket(name, Path(path)) for path in paths]
    return tuple(found)


def _show(names: list[str], wanted: tuple[str, ...]) -> list[dict[str, str]]:
    """Return properties of units. The values of a property that is repeated are lines. Raises `UnitError`."""
    units: list[dict[str, str]] = []
    for block in _systemctl("show", f"--property={','.join(wanted)}", "--", *names).strip().split("\n\n"):
        shown: dict[str, str] = {}
        for line in block.splitlines():
            name, _, value = line.partition("=")
            shown[name] = f"{shown[name]}\n{value}" if name in shown else value
        units.append(shown)
    return units


def _systemctl(*arguments: str) -> str:
    """Return what `systemctl` prints. Raises `UnitError`."""
    command = ["systemctl", *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)  # noqa: S603 - a list
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnitError(f"systemctl {arguments[0]}: {error}") from None
    if ended.returncode:
        raise UnitError(f"{' '.join(command[:2])}: {' '.join(ended.stderr.split())}")
    return ended.stdout
