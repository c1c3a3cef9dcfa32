"""`keyferry-agent audit who`: shows which callers received which data keys."""

import argparse
import json
import pwd
from collections.abc import Iterable, Iterator
from typing import Any, Final

from keyferry.operations import OPERATIONS
from keyferry.stdout import show_lines

from ...audit.key_names import LoggedNames, open_keyring, plain_name
from ...audit.query import RELEASES, Counted, Listed, Query, Spool, names_of
from ...chained_log.chain import ChainError
from ...config.settings import Settings
from ...keyring.document import KeyringError
from . import times
from .opening import open_history, report, say

__all__ = ["add_options", "who"]

_FAILED: Final = 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that select entries."""
    user = parser.add_mutually_exclusive_group()
    user.add_argument("--uid", type=int, metavar="N", help="the caller's user, by its number")
    user.add_argument("--user", metavar="NAME", help="the caller's user, by its name on this host")
    parser.add_argument("--unit", metavar="UNIT", help="the caller's systemd unit, like orders.service")
    parser.add_argument("--access-key", metavar="ID", help="the access key with which the caller signed, at a gateway")
    parser.add_argument(
        "--key",
        metavar="KEY",
        help="the master key's ID, ARN or alias; an alias also matches the keys that had it earlier",
    )
    parser.add_argument("--version", metavar="ID", help="one version of a master key")
    parser.add_argument(
        "--recipient", metavar="FINGERPRINT", help="the fingerprint of the public key that data keys were exported to"
    )
    parser.add_argument("--grant", metavar="NAME", help="the grant that allowed the requests")
    parser.add_argument(
        "--operation",
        metavar="NAME",
        choices=sorted(OPERATIONS),
        help=f"one operation; by default, all that return a data key to a caller: {', '.join(RELEASES)}",
    )
    parser.add_argument("--context-key", metavar="KEY", help="a key of the EncryptionContext")
    parser.add_argument(
        "--ciphertext", metavar="HASH", help="one data key: `sha256:` and the SHA-256 of its CiphertextBlob"
    )
    parser.add_argument(
        "--until",
        type=times.until,
        metavar="TIME",
        help="until this time, or the end of this day; in the form of --since",
    )
    parser.add_argument("--list", action="store_true", help="each request, with the hash that identifies its data key")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def who(arguments: argparse.Namespace, settings: Settings | None) -> int:
    """Print the selected entries. Return the exit status. Raises `ChainError` or OSError."""
    query = _query(arguments)
    with Spool() as spool:
        return _who(arguments, settings, query, spool)


def _who(arguments: argparse.Namespace, settings: Settings | None, query: Query, spool: Spool) -> int:
    def new_tally() -> Counted | Listed:
        return Listed(query, spool) if arguments.list else Counted(query)

    history = open_history(arguments.file, settings, new_tally)
    tallies = [tally for tally in history.tallies if isinstance(tally, Counted | Listed)]
    names = names_of(tallies)
    keys = _key_ids(arguments.key, settings, names)
    report(history, query.since)
    complete = history.is_complete(query.since)
    if undecided_count := sum(tally.undecided for tally in tallies):
        say(
            f"{undecided_count} entries have more keys in their EncryptionContext than an entry holds: "
            "--context-key may miss them"
        )
        complete = False
    entries = _entries(tallies, query, keys)
    if arguments.json:
        status = show_lines("keyferry-agent", _json(entries))
    else:
        status = show_lines(
            "keyferry-agent", _lines(entries, _line if arguments.list else _group, _nothing(query, complete))
        )
    return status or (0 if complete else _FAILED)


def _query(arguments: argparse.Namespace) -> Query:
    uid = arguments.uid
    if arguments.user is not None:
        try:
            uid = pwd.getpwnam(arguments.user).pw_uid
        except (KeyError, ValueError):
            raise ChainError(
                f"--user {arguments.user}: this host has no such user; give its number with --uid"
            ) from None
    if arguments.since is not None and arguments.until is not None and arguments.until <= arguments.since:
        raise ChainError(f"--until {arguments.until} is not after --since {arguments.since}")
    return Query(
        operations=RELEASES if arguments.operation is None else (arguments.operation,),
        uid=uid,
        unit=arguments.unit,
        access_key=arguments.access_key,
        recipient=arguments.recipient,
        grant=arguments.grant,
        version=arguments.version,
        ciphertext=arguments.ciphertext,
        context_key=arguments.context_key,
        since=arguments.since,
        until=arguments.until,
    )


def _key_ids(name: str | None, settings: Settings | None, names: LoggedNames) -> frozenset[str] | None:
    """Return the IDs of the keys that have a name now or had it when entries were written. None if `name` is None.

    Raises `ChainError` for an alias that is neither in the keyring nor in the audit log.
    """
    if name is None or not (alias := plain_name(name)).startswith("alias/"):
        return None if name is None else frozenset({alias})
    periods = names.aliases.get(alias, {})
    ids, reason = set(periods), ""
    try:
        ids.add(current_id := open_keyring(settings).find(alias).key_id)
        say(f"{alias} is key {current_id} in the keyring")
    except KeyringError as error:
        reason = str(error)
    if not ids:
        raise ChainError(
            f"{alias}: neither the audit log nor the keyring has this alias ({reason}); name the key by its ID"
        )
    for key_id, period in periods.items():
        say(f"{alias} was key {key_id} {period}, by the audit log")
    if reason:
        say(f"{alias} was not found in the keyring: {reason}")
    return frozenset(ids)


def _entries(
    tallies: Iterable[Counted | Listed], query: Query, keys: frozenset[str] | None
) -> Iterator[dict[str, Any]]:
    total = Counted(query)
    for tally in tallies:
        if isinstance(tally, Counted):
            total.add(tally)
        else:
            yield from tally.of(keys)
    yield from total.of(keys)


def _nothing(query: Query, complete: bool) -> str:
    if not complete:
        return "No entry was found, but the audit log is incomplete: callers may have received data keys."
    return "No caller received such a data key." if query.operations == RELEASES else "No such request was answered."


def _json(entries: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a JSON array with one element per line, without waiting for the last element."""
    before = "["
    for fields in entries:
        yield before if before == "[" else f"{before},"
        before = f"  {json.dumps(fields)}"
    yield before
    yield "]"


def _lines(entries: Iterable[dict[str, Any]], line: Any, placeholder: str) -> Iterator[str]:
    is_empty = True
    for fields in entries:
        is_empty = False
        yield line(fields)
    if is_empty:
        yield placeholder


def _caller(fields: dict[str, Any]) -> str:
    access_key, uid, unit = (fields.get(name) for name in ("access_key", "uid", "unit"))
    names = [
        f"access key {access_key}" if access_key else "",
        f"uid {uid}" if uid is not None or not access_key else "",
    ]
    return " ".join(filter(None, [*names, str(unit) if unit else ""]))


def _to(fields: dict[str, Any]) -> str:
    return f"to {fields.get('recipient') or fields.get('destination_key_id') or 'itself, in plaintext'}"


def _group(group: dict[str, Any]) -> str:
    return (
        f"{_caller(group)}: {group['operation']} {group['count']} times, {group['first']} to {group['last']}, "
        f"key {group['key_id']}, version {group['key_version_id']}, {_to(group)}, by grant {group['grant']}"
    )


def _line(entry: dict[str, Any]) -> str:
    destination = f" as {entry['destination_ciphertext']}" if entry.get("destination_ciphertext") else ""
    return (
        f"{entry.get('time')} {entry.get('request_id')} {_caller(entry)}: {entry.get('operation')} "
        f"{entry.get('ciphertext') or 'a data key without a hash'}{destination}, key {entry.get('key_id')}, "
        f"version {entry.get('key_version_id')}, {_to(entry)}, by grant {entry.get('grant')}"
    )
