"""`keyferry-agent keyring history`: list the changes of a keyring. The file's hashes show whether each was done."""

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from keyferry.stdout import complain, show_json, show_lines

from ...chained_log import chain
from ...keyring.changes import EVENT, file_hash, log_of
from ...keyring.document import KeyringError
from ...keyring.file import read_sealed

__all__ = ["add_parser"]

FAILED: Final = 1
_PROGRAM: Final = "keyferry-agent"
_OTHER: Final = "replaced by other means than these commands"


def add_parser(subparsers: Any) -> None:
    """Add `history` to the verbs of keyrings."""
    text = "Print the changes of a keyring, and verify their chain; nothing is unsealed."
    parser = subparsers.add_parser("history", help=text, description=text, allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE", help="the keyring")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=_history)


def _history(arguments: argparse.Namespace) -> int:
    keyring = Path(os.path.realpath(arguments.file))
    log = log_of(keyring)
    try:
        current_hash: str | None = file_hash(read_sealed(keyring))
    except KeyringError as error:
        complain(_PROGRAM, str(error))
        current_hash = None
    code = 0
    try:
        changes = _with_results([entry for entry in chain.read([log]) if entry.get("event") == EVENT], current_hash)
        if not chain.verify([log]).beginning:
            raise chain.ChainError(f"{log}: the beginning is missing")
    except chain.ChainError as error:
        complain(_PROGRAM, str(error))
        code = FAILED
    except OSError as error:
        complain(_PROGRAM, f"{log}: {error.strerror}")
        return FAILED
    status = show_json(_PROGRAM, {"Changes": changes}) if arguments.json else show_lines(_PROGRAM, _lines(changes))
    return status or code


def _with_results(entries: list[dict[str, Any]], current_hash: str | None) -> list[dict[str, Any]]:
    """Return one entry for each change, with its result, and one for each replacement of the file by other means."""
    changes: list[dict[str, Any]] = []
    for entry in entries:
        if entry.get("result") == "begun":
            changes.append(dict(entry))
        elif changes and changes[-1].get("after") == entry.get("after"):
            changes[-1]["result"] = entry.get("result")
    results: list[dict[str, Any]] = []
    next_hashes = [*(entry.get("before") for entry in changes[1:]), current_hash]
    for entry, next_hash in zip(changes, next_hashes, strict=True):
        before, after = entry.get("before"), entry.get("after")
        if next_hash == after:  # also after a crash between the replacement and the second entry
            entry["result"] = "done"
        elif entry["result"] == "begun":
            entry["result"] = "not done" if next_hash == before else "unknown"
        results.append(entry)
        result_hash = after if entry["result"] == "done" else before
        if next_hash != result_hash and entry["result"] != "unknown":
            results.append({"result": _OTHER, "before": result_hash, "after": next_hash})
    return results


def _lines(changes: Iterable[dict[str, Any]]) -> Iterator[str]:
    for entry in changes:
        if entry["result"] == _OTHER:
            yield f"the keyring was {_OTHER}, or removed"
            continue
        users = [f"user {entry.get('user')} ({entry.get('uid')})"]
        users += [
            f"{name} {entry[field]}"
            for name, field in (("login uid", "login_uid"), ("claimed sudo uid", "claimed_sudo_uid"))
            if entry.get(field) is not None
        ]
        yield f"{entry.get('time')}  {entry.get('verb')}: {entry['result']}; {', '.join(users)}"
        for change in entry.get("changes", []):
            yield f"    {_line(change)}"
        if entry.get("omitted_changes"):
            yield f"    and {entry['omitted_changes']} more"


def _line(change: dict[str, Any]) -> str:
    names = [
        f"{name.removesuffix('_id').replace('_', ' ')} {change[name]}"
        for name in ("recipient", "host", "alias", "access_key_id", "receipt_key_id", "key_id", "key_version_id")
        if name in change
    ]
    text = str(change.get("change"))
    if "before" in change:
        text = f"{text} from {change['before']} to {change['after']}"
    return f"{', '.join(names)}: {text}"
