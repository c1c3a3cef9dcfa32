"""`keyferry-agent check`: print all problems of a configuration, and all obstacles to an agent's start on this host.

A configuration is often checked on another host than the one that it is for. Obstacles of this host are therefore warnings.
With --systemd they are errors, because the configuration is for this host. The command does not write, create or lock files.
"""

import argparse
import importlib
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from keyferry import age_passphrase, private_files
from keyferry.stdout import say, show

from ..authz.grants import numbered
from ..config.gateways import certificate_problems
from ..config.settings import Settings, examine
from ..keyring.document import Document, KeyringError
from ..keyring.file import open_sealed, read_sealed
from ..keyring.sealing import Unsealer
from ..server import unix_sockets
from ..telemetry.metrics import MISSING_LIBRARY
from . import systemd_units

__all__ = ["add_parser"]

FAILED: Final = 1


def add_parser(commands: Any) -> None:
    """Add `check` to the agent's command."""
    parser = commands.add_parser("check", help="print all problems of a configuration", allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--systemd",
        action="store_true",
        help=f"the configuration is for {systemd_units.SERVICE} of this host: ask systemd for its sockets, folders and "
        "credentials, and fail if the agent would not start",
    )
    parser.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    settings, problems, open_to_others, missing_files = examine(arguments.file)
    warnings: list[str] = []
    if settings is not None:
        open_to_others += _open_files(settings)
        warnings += settings.warnings
        problems += [f"{arguments.file}: {problem}" for problem in certificate_problems(settings.gateways)]
        if not problems:  # with problems, a file may seem to be missing only because its line is invalid
            obstacles, remarks = _of_this_host(settings, systemd=arguments.systemd)
            obstacles += missing_files
            if arguments.systemd:
                problems = [f"{arguments.file}: {obstacle}" for obstacle in obstacles]
            else:
                warnings += obstacles
            warnings += remarks
    for problem in (*open_to_others, *problems):
        say(problem)
    for warning in warnings:
        say(f"{arguments.file}: warning: {warning}")
    if settings is None or problems or open_to_others:
        return FAILED
    warning_count = f"; warnings: {len(warnings)}" if warnings else ""
    return show("keyferry-agent", f"{arguments.file}: good; grants: {len(settings.grants)}{warning_count}")


def _of_this_host(settings: Settings, *, systemd: bool) -> tuple[list[str], list[str]]:
    """Return messages about obstacles to a start on this host, and messages about grants that can never match."""
    try:
        unit = systemd_units.read() if systemd else systemd_units.Unit()
    except systemd_units.UnitError as error:
        return [f"--systemd: {error}"], []
    obstacles = [*_packages(settings), *_sockets(settings, unit), *_folders(settings, unit)]
    missing_files = _missing_files(settings, unit)
    remarks: list[str] = []
    if not missing_files:
        try:
            document = _keyring(settings)
        except KeyringError as error:
            missing_files.append(f"keyring: {error}")
        else:
            remarks = [*_keys(settings, document), *_access_keys(settings, document)] if document else []
    return [*obstacles, *missing_files], remarks


def _packages(settings: Settings) -> list[str]:
    problems = []
    if settings.metrics and not _importable("prometheus_client"):
        problems.append(MISSING_LIBRARY)
    if settings.sm2_fallback == "gmssl" and not _importable("gmssl"):
        problems.append("sm2_fallback needs the package gmssl, which is a part of every installation: install it again")
    return problems


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


# --- sockets and folders ----------------------------------------------------------------------------------------------


def _sockets(settings: Settings, unit: systemd_units.Unit) -> list[str]:
    """Return messages about problems with inherited sockets, and with those that the agent has to create."""
    names = {text for gateway in settings.gateways for text in (gateway.name, gateway.listen)}
    given = [
        (unit_socket.name, unit_socket.path)
        for unit_socket in unit.sockets
        if not {unit_socket.name, str(unit_socket.path)} & names
    ]
    try:
        assignment = unix_sockets.assign(settings.listeners, given)
    except unix_sockets.ListeningError as error:
        return [f"listener: {error}"]
    hint = "no enabled socket unit has it" if unit.is_known else "or let systemd pass the socket (check --systemd)"
    passed = {*assignment, *(unit_socket.name for unit_socket in unit.sockets)}
    places = [(f"listener {listener.name!r}", listener.name, listener.path) for listener in settings.listeners]
    places += [(f"gateway {entry.name!r}", entry.name, entry.path) for entry in settings.gateways if entry.is_unix]
    passed |= {str(unit_socket.path) for unit_socket in unit.sockets}
    ports = [entry for entry in settings.gateways if not entry.is_unix and not {entry.name, entry.listen} & passed]
    return [
        *(
            f"{place}: {problem}; {hint}"
            for place, name, path in places
            if name not in passed
            for problem in _unwritable(path, unit)
        ),
        *(
            f"gateway {entry.name!r}: {systemd_units.SERVICE} has no network and no enabled socket unit has "
            f"{entry.listen}; enable systemd/examples/keyferry-gateway.socket with FileDescriptorName={entry.name}"
            for entry in ports
            if not unit.has_network
        ),
    ]


def _folders(settings: Settings, unit: systemd_units.Unit) -> list[str]:
    problems = []
    if settings.metrics.startswith("/"):
        problems += [f"metrics.listen: {problem}" for problem in _unwritable(Path(settings.metrics), unit)]
    if settings.unseal_socket is not None:
        problems += [f"unseal_socket: {problem}" for problem in _unwritable(settings.unseal_socket, unit)]
    path = Path(settings.audit.path)
    if path.is_absolute():
        if not os.path.exists(path):
            problems += [f"audit.path: {problem}" for problem in _unwritable(path, unit)]
        elif path.is_dir():
            problems.append(f"audit.path: {path} is a folder; name a file in it")
        elif not os.access(path, os.R_OK | os.W_OK):
            problems.append(f"audit.path: {path}: this user may not write to it")
        else:
            problems += [f"audit.path: {problem}" for problem in unit.protected(path)]
    return problems


def _unwritable(path: Path, unit: systemd_units.Unit) -> list[str]:
    """Return why an agent of this user cannot create a file; an empty list if systemd makes its folder at the start."""
    if unit.makes(path):
        return []
    folder = path.parent
    try:
        mode = folder.stat().st_mode
    except OSError as error:
        return [f"{folder}: {error.strerror}"]
    if not stat.S_ISDIR(mode):
        return [f"{folder}: not a folder"]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"{folder}: this user may not create files there"]
    return unit.protected(path)


# --- files ------------------------------------------------------------------------------------------------------------


def _missing_files(settings: Settings, unit: systemd_units.Unit) -> list[str]:
    """Return one message for each file that `run` would not find."""
    problems: list[str] = []
    for name, path in (("keyring", settings.keyring), ("unseal", settings.unseal)):
        if path is None and name == "unseal" and settings.unseal_socket is not None:
            continue  # an operator sends the secret
        if path is None:
            problems.append(f"{name}: not set; run needs it, or --{name}")
        elif unit.is_known and name == "unseal" and path.parent == systemd_units.CREDENTIALS:
            if path.name not in unit.credentials:
                problems.append(
                    f"unseal: {systemd_units.SERVICE} loads no credential {path.name!r}; add LoadCredentialEncrypted="
                )
        elif not os.path.exists(path):
            problems.append(f"{name}: {path} does not exist here, or is not visible to this user")
    problems += [
        f"gateway {gateway.name!r}: {path} does not exist here, or is not visible to this user"
        for gateway in settings.gateways
        for path in gateway.files
        if not path.exists()
    ]
    return problems


def _open_files(settings: Settings) -> list[str]:
    """Return one message for each way in which other users can write the keyring, or read or write the unseal secret."""
    problems: list[str] = []
    if settings.keyring is not None:
        problems += private_files.problems(settings.keyring, owners=None)
    if settings.unseal is not None:
        owners = private_files.owner_of(settings.keyring)
        problems += private_files.problems(settings.unseal, secret=True, owners=owners)
    return problems


# --- keys -------------------------------------------------------------------------------------------------------------


def _keyring(settings: Settings) -> Document | None:
    """Return the keyring's document, or None if this user may not read its files or if it has a passphrase (takes seconds).

    Raises `KeyringError` if the agent could not open it either.
    """
    keyring, unseal = settings.keyring, settings.unseal
    if keyring is None or unseal is None or not (os.access(keyring, os.R_OK) and os.access(unseal, os.R_OK)):
        return None
    sealed_bytes = read_sealed(keyring)
    if age_passphrase.work_factor(sealed_bytes) is not None:
        return None
    return open_sealed(sealed_bytes, Unsealer.read(unseal, private_files.owner_of(keyring)))


def _keys(settings: Settings, document: Document) -> list[str]:
    """Return one message for each key of a grant that matches no key of the keyring, often because an alias is misspelt."""
    key_names = [key.key_id for key in document.keys]
    key_names += [alias for aliases in document.aliases_by_key().values() for alias in aliases]
    names = [full_name for name in key_names for full_name in settings.names_of(name)]
    return [
        f"{place}.keys: {key!r} matches no key of the keyring"
        for place, grant in numbered(settings.grants)
        for key in grant.keys
        if key != "*" and not replace(grant, keys=(key,)).has_key(names)
    ]


def _access_keys(settings: Settings, document: Document) -> list[str]:
    """Return one message for each grant to an access key that the keyring does not have, or that is disabled."""
    enabled = {access_key.access_key_id: access_key.enabled for access_key in document.access_keys}
    messages = []
    for place, grant in numbered(settings.grants):
        access_key_id = grant.to.get("access_key")
        if access_key_id is not None and not enabled.get(access_key_id):
            why = "is disabled in the keyring" if access_key_id in enabled else "is not in the keyring"
            messages.append(f"{place}.to.access_key: {access_key_id} {why}; the grant matches no caller")
    return messages
