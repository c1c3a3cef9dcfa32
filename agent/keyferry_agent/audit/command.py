"""`keyferry-agent audit ...`: is the record whole, and who was given data keys."""

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from keyferry.output import show

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
        verb.add_argument("file", type=Path, nargs="+", metavar="FILE", help="records, oldest first")
        verb.set_defaults(run=_guarded, verb_action=do)
        if name == "who":
            verb.add_argument("--key", required=True, metavar="ID", help="the master key's ID")
            verb.add_argument("--version", metavar="ID", help="one version of it")
            verb.add_argument("--since", type=_moment, metavar="TIME", help="like 2026-01-31 or 2026-01-31T12:00:00Z")
            verb.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone()


def _guarded(arguments: argparse.Namespace) -> int:
    try:
        return show("keyferry-agent", arguments.verb_action(arguments))
    except (chain.ChainError, OSError) as error:
        print(f"keyferry-agent: {error}", file=sys.stderr)
        return FAILED
    except (KeyError, TypeError, ValueError) as error:  # a line with other fields: `verify` says which
        print(f"keyferry-agent: not a line of an audit record: {error!r}", file=sys.stderr)
        return FAILED


def _verify(arguments: argparse.Namespace) -> str:
    verified = chain.verify(arguments.file)
    since = "from the beginning" if verified.beginning else "and older ones that were not given"
    return f"whole: {verified.lines} lines, {since}; the last has the SHA-256 {verified.last}"


def _who(arguments: argparse.Namespace) -> str:
    given: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in chain.read(arguments.file):
        if (
            record.get("operation") not in _GIVES
            or record.get("outcome") != "OK"
            or record.get("key_id") != arguments.key
        ):
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
