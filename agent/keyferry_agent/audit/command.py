"""`keyferry-agent audit ...`: is the record whole, and who was given data keys."""

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from keyferry.arguments import moment
from keyferry.output import show
from keyferry.private_files import owner_of

from ..keyring import file
from ..keyring.document import KeyringError
from ..keyring.sealing import Unsealer
from ..settings import Settings, SettingsError, read
from . import chain

__all__ = ["add_parser"]

FAILED: Final = 1
_GIVES: Final = ("GenerateAndExportDataKey", "ExportDataKey", "GenerateDataKey", "Decrypt", "ReEncrypt")
"""Operations after which somebody has what is under a key, or can get at it under another."""


def add_parser(commands: Any) -> None:
    """Add `audit` and its verbs to the agent's command."""
    parser = commands.add_parser("audit", help="verify and search the record of requests", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text, do in (
        ("verify", "Is the chain of lines whole? Give files oldest first.", _verify),
        ("who", "Who was given data keys under a master key, and for which recipients.", _who),
    ):
        verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        verb.add_argument("file", type=Path, nargs="*", metavar="FILE", help="records, oldest first; or --config")
        verb.add_argument(
            "--config", type=Path, metavar="FILE", help="the agent's configuration: its record, with rotated files"
        )
        verb.set_defaults(run=_guarded, verb_action=do)
        if name == "who":
            verb.add_argument(
                "--key", required=True, metavar="KEY", help="the master key's ID or ARN; with --config also an alias"
            )
            verb.add_argument("--version", metavar="ID", help="one version of it")
            verb.add_argument("--since", type=moment, metavar="TIME", help="like 2026-01-31 or 2026-01-31T12:00:00Z")
            verb.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _guarded(arguments: argparse.Namespace) -> int:
    try:
        return show("keyferry-agent", arguments.verb_action(arguments))
    except (chain.ChainError, KeyringError, SettingsError, OSError) as error:
        print(f"keyferry-agent: {error}", file=sys.stderr)
        return FAILED
    except (KeyError, TypeError, ValueError) as error:  # a line with other fields: `verify` says which
        print(f"keyferry-agent: not a line of an audit record: {error!r}", file=sys.stderr)
        return FAILED


def _records(arguments: argparse.Namespace) -> tuple[list[Path], Settings | None]:
    """The files to look at, oldest first, and the configuration if one was named. Raises `ChainError`, `SettingsError`."""
    settings = read(arguments.config) if arguments.config else None
    if arguments.file:
        return arguments.file, settings
    if settings is None or settings.audit.path == "stderr":
        where = "its record goes to standard error" if settings else "or --config, to find them"
        raise chain.ChainError(f"name the record's files, oldest first: {where}")
    current = Path(settings.audit.path)
    # As logrotate calls them: the higher the number, the older.
    rotated = [path for path in current.parent.glob(f"{current.name}.*") if path.suffix[1:].isdecimal()]
    return [*sorted(rotated, key=lambda path: -int(path.suffix[1:])), current], settings


def _key_id(name: str, settings: Settings | None) -> str:
    """The ID that the record has, of a key that is named by it, an ARN or an alias. Raises `ChainError`, `KeyringError`."""
    name = name.rpartition(":")[2].removeprefix("key/") if name.startswith("acs:") else name
    if not name.startswith("alias/"):
        return name
    if settings is None or settings.keyring is None or settings.unseal is None:
        raise chain.ChainError(f"the record has key IDs: to look up {name}, give --config with a keyring and unseal")
    unsealer = Unsealer.read(settings.unseal, owner_of(settings.keyring))
    return file.read(settings.keyring, unsealer).find(name).key_id


def _verify(arguments: argparse.Namespace) -> str:
    verified = chain.verify(_records(arguments)[0])
    since = "from the beginning" if verified.beginning else "and older ones that were not given"
    return f"whole: {verified.lines} lines, {since}; the last has the SHA-256 {verified.last}"


def _who(arguments: argparse.Namespace) -> str:
    given: dict[tuple[Any, ...], dict[str, Any]] = {}
    files, settings = _records(arguments)
    key_id = _key_id(arguments.key, settings)
    for record in chain.read(files):
        if record.get("operation") not in _GIVES or record.get("outcome") != "OK" or record.get("key_id") != key_id:
            continue
        if arguments.version and record.get("key_version_id") != arguments.version:
            continue
        if arguments.since and datetime.fromisoformat(record["time"]) < arguments.since:
            continue
        names = ("uid", "unit", "listener", "grant", "operation", "recipient", "key_version_id", "destination_key_id")
        who = tuple(record.get(name) for name in names)
        entry = given.setdefault(who, {**dict(zip(names, who, strict=True)), "count": 0, "first": record["time"]})
        entry["count"] += 1
        entry["last"] = record["time"]
    if arguments.json:
        return json.dumps(list(given.values()), indent=2)
    lines = [
        f"uid {entry['uid']}{' ' + entry['unit'] if entry['unit'] else ''}: {entry['operation']} "
        f"{entry['count']} times, {entry['first']} to {entry['last']}, version {entry['key_version_id']}, "
        f"to {entry['recipient'] or entry['destination_key_id'] or 'itself, in plaintext'}, by grant {entry['grant']}"
        for entry in given.values()
    ]
    return "\n".join(lines) or "Nobody, in these records."
