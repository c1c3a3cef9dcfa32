"""`keyferry-agent audit ...`: whether the audit log is whole, and which callers were given data keys."""

import argparse
import json
import sys
from collections.abc import Callable
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
from . import chain, rotated
from .history import History, Tally

__all__ = ["add_parser"]

FAILED: Final = 1
_RELEASES: Final = ("GenerateAndExportDataKey", "ExportDataKey", "GenerateDataKey", "Decrypt", "ReEncrypt")
"""Operations that give a caller what is under a key, or let it get there under another key."""
_MAX_PROBLEMS: Final = 20
"""Problems that are printed one by one."""
_MAX_ATTEMPTS: Final = 5
"""Attempts to read all files while log rotation renames them."""
_EPILOG: Final = (
    "exit codes: 0 done, and the audit log is complete (for verify: the chain is whole from its first entry); 1 it is "
    "incomplete, or was changed, or could not be read, and why is on stderr; 2 usage"
)


def add_parser(commands: Any) -> None:
    """Add `audit` and its verbs to the agent's command."""
    parser = commands.add_parser("audit", help="verify and search the audit log", epilog=_EPILOG, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text, do in (
        ("verify", "Is the chain of audit entries whole?", _verify),
        ("who", "Which callers were given data keys under a master key, and for which recipients.", _who),
    ):
        verb = verbs.add_parser(name, help=text, description=text, epilog=_EPILOG, allow_abbrev=False)
        verb.add_argument(
            "file", type=Path, nargs="*", metavar="FILE", help="files of the audit log, in any order; or --config"
        )
        verb.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="the agent's configuration: its audit log, with the rotated files beside it",
        )
        verb.set_defaults(run=_guarded, verb_action=do)
        if name == "who":
            verb.add_argument(
                "--key", required=True, metavar="KEY", help="the master key's ID or ARN; with --config also an alias"
            )
            verb.add_argument("--version", metavar="ID", help="one version of it")
            verb.add_argument("--json", action="store_true", help="one JSON document on stdout")
        verb.add_argument(
            "--since",
            type=moment,
            metavar="TIME",
            help="like 2026-01-31 or 2026-01-31T12:00:00Z; the audit log need not be complete before",
        )


def _guarded(arguments: argparse.Namespace) -> int:
    try:
        code: int = arguments.verb_action(arguments)
    except (chain.ChainError, KeyringError, SettingsError, OSError) as error:
        _say(str(error))
    except (KeyError, TypeError, ValueError) as error:  # an entry with other fields than the agent's
        _say(f"not a line of an audit log: {error!r}")
    else:
        return code
    return FAILED


def _say(text: str) -> None:
    print(f"keyferry-agent: {text}", file=sys.stderr)


def _history(arguments: argparse.Namespace, settings: Settings | None, tally: Callable[[], Tally] | None) -> History:
    """Read the files that are named, or those of the configuration. Raises `ChainError`."""
    if arguments.file:
        paths = dict.fromkeys(arguments.file)
        beside = [
            f"{path}: looks like a rotated file of this audit log, and was not named"
            for path in rotated.not_among(paths)
        ]
        return History(map(rotated.File, paths), not_given=beside, tally=tally)
    if settings is None or settings.audit.path == "stderr":
        where = "it goes to standard error" if settings else "or use --config, to find them"
        raise chain.ChainError(f"name the files of the audit log: {where}")
    current = Path(settings.audit.path)
    found = rotated.find(current)
    for _ in range(_MAX_ATTEMPTS):
        history = History(found.files, problems=found.problems, current=current, tally=tally)
        before, found = found, rotated.find(current)
        if not history.moved and before == found:
            break
    return history


def _report(history: History, since: datetime | None) -> None:
    """Print which files were read, and from when on the audit log is complete."""
    if history.files:
        _say(f"read, oldest first: {', '.join(map(str, history.files))}")
    for text in history.notes:
        _say(text)
    for problem in history.problems[:_MAX_PROBLEMS]:
        _say(problem.text)
    if len(history.problems) > _MAX_PROBLEMS:
        _say(f"and {len(history.problems) - _MAX_PROBLEMS} more problems")
    end = _text(history.ends)
    if not history.problems:
        _say(f"the audit log is complete from its beginning, {_text(history.begins)}, to {end}")
    elif history.is_complete(since):
        _say(f"the audit log is complete from {_text(history.healed)} to {end}, and so since --since")
    elif history.healed is not None:
        _say(f"THE AUDIT LOG IS INCOMPLETE: it is complete from {_text(history.healed)} to {end} only")
    else:
        _say("THE AUDIT LOG IS INCOMPLETE")


def _text(time: datetime | None) -> str:
    return "an unknown time" if time is None else time.isoformat(timespec="milliseconds")


def _key_id(name: str, settings: Settings | None) -> str:
    """Return the ID of a key that is named by its ID, an ARN or an alias. Raises `ChainError`, `KeyringError`."""
    name = name.rpartition(":")[2].removeprefix("key/") if name.startswith("acs:") else name
    if not name.startswith("alias/"):
        return name
    if settings is None or settings.keyring is None or settings.unseal is None:
        raise chain.ChainError(f"the audit log has key IDs: to look up {name}, give --config with a keyring and unseal")
    unsealer = Unsealer.read(settings.unseal, owner_of(settings.keyring))
    return file.read(settings.keyring, unsealer).find(name).key_id


def _settings(arguments: argparse.Namespace) -> Settings | None:
    return read(arguments.config) if arguments.config else None


def _verify(arguments: argparse.Namespace) -> int:
    history = _history(arguments, _settings(arguments), None)
    _report(history, arguments.since)
    # Old files are deleted as a rule: a chain that is whole from its first entry is not damaged. --since asks for more.
    whole = history.only_older_missing and arguments.since is None
    if not (whole or history.is_complete(arguments.since)):
        return FAILED
    since = f"from {_text(history.healed)} on" if history.problems else "from the beginning"
    return show("keyferry-agent", f"whole: {history.count} lines, {since}; the last has the SHA-256 {history.last}")


class _Released:
    """Data keys that callers were given under a master key: one group of entries for each caller, operation and recipient."""

    _NAMES: Final = (
        "uid",
        "unit",
        "listener",
        "grant",
        "operation",
        "recipient",
        "key_version_id",
        "destination_key_id",
    )

    def __init__(self, key_id: str, version: str | None, since: datetime | None) -> None:
        self._key_id = key_id
        self._version = version
        self._since = since
        self.groups: dict[str, dict[str, Any]] = {}

    def __call__(self, fields: dict[str, Any], time: datetime | None) -> None:
        """Add an entry. One without a time is never too old."""
        if (
            fields.get("operation") not in _RELEASES
            or fields.get("outcome") != "OK"
            or fields.get("key_id") != self._key_id
            or (self._version and fields.get("key_version_id") != self._version)
            or (self._since is not None and time is not None and time < self._since)
        ):
            return
        group = {name: fields.get(name) for name in self._NAMES}
        when = fields.get("time")
        self._add({**group, "count": 1, "first": when, "last": when})

    def add(self, later: "_Released") -> None:
        """Add all groups of a later file."""
        for group in later.groups.values():
            self._add(group)

    def _add(self, group: dict[str, Any]) -> None:
        key = json.dumps([group[name] for name in self._NAMES])
        known = self.groups.setdefault(key, {**group, "count": 0})
        known["count"] += group["count"]
        known["last"] = group["last"]


def _who(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    key_id = _key_id(arguments.key, settings)

    def released() -> _Released:
        return _Released(key_id, arguments.version, arguments.since)

    history = _history(arguments, settings, released)
    _report(history, arguments.since)
    total = released()
    for tally in history.tallies:
        assert isinstance(tally, _Released)
        total.add(tally)
    groups, complete = [*total.groups.values()], history.is_complete(arguments.since)
    if arguments.json:
        text = json.dumps(groups, indent=2)
    else:
        text = "\n".join(map(_line, groups)) or (
            "No caller was given a data key of this master key."
            if complete
            else "No entry was found, but the audit log is incomplete: callers may have been given data keys."
        )
    return show("keyferry-agent", text) or (0 if complete else FAILED)


def _line(group: dict[str, Any]) -> str:
    return (
        f"uid {group['uid']}{' ' + str(group['unit']) if group['unit'] else ''}: {group['operation']} "
        f"{group['count']} times, {group['first']} to {group['last']}, version {group['key_version_id']}, "
        f"to {group['recipient'] or group['destination_key_id'] or 'itself, in plaintext'}, by grant {group['grant']}"
    )
