"""Find a request's audit entry by its RequestId, and make questions of it that are judged by the current grants."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from keyferry.errors import CODES
from keyferry.operations import OPERATIONS

from ...audit.key_names import LoggedNames
from ...audit.log import MAX_GROUPS
from ...audit.query import NamesOnly, names_of
from ...chained_log.chain import ChainError
from ...config.settings import Settings
from ...peer import Peer
from ..audit.opening import open_history, report
from .judging import WITHOUT_KEY, Question
from .keys import Keys

__all__ = ["find_request", "questions_of", "recorded_lines"]

_BY_GRANTS: Final = ("Forbidden.NoPermission", "AccessDeniedError")


class _Search(NamesOnly):
    """Finds the entry of a request, and the names of keys, in a file of the audit log."""

    def __init__(self, request_id: str) -> None:
        super().__init__()
        self._request_id = request_id
        self.entry: dict[str, Any] | None = None

    def __call__(self, fields: dict[str, Any], time: datetime | None) -> None:
        super().__call__(fields, time)
        if fields.get("event") == "audit" and fields.get("request_id") == self._request_id:
            self.entry = fields


def find_request(request_id: str, files: list[Path], settings: Settings) -> tuple[dict[str, Any], LoggedNames]:
    """Return the audit entry of a request, and the names of keys in the audit log. Raises `ChainError` or OSError."""
    normal_id = request_id.strip().upper()
    history = open_history(files, settings, lambda: _Search(normal_id), option="files (--audit-log FILE)")
    searches = [tally for tally in history.tallies if isinstance(tally, _Search)]
    for search in searches:
        if search.entry is not None:
            return search.entry, names_of(searches)
    report(history, None)
    raise ChainError(f"no request {normal_id} is in the audit log")


def recorded_lines(entry: dict[str, Any]) -> list[str]:
    """Return lines that describe the request and its outcome, from its audit entry."""
    outcome = str(entry.get("outcome"))
    key = f" on key {entry['key_id']}" if entry.get("key_id") else ""
    unit = f", unit {entry['unit']}" if entry.get("unit") else ""
    caller = f"access key {entry['access_key']}" if entry.get("access_key") else f"uid {entry.get('uid')}"
    summary = (
        f"request {entry.get('request_id')}, at {entry.get('time')}: {caller}{unit}, "
        f"listener {entry.get('listener')}: {entry.get('operation')}{key}: {outcome}"
    )
    if outcome == "OK":
        grant = entry.get("grant")
        return [summary, f"It was allowed by the grant {grant!r}." if grant else "It needed no grant."]
    if outcome in _BY_GRANTS:
        return [summary, "It was refused, because no grant covered it then."]
    code = CODES.get(outcome)
    return [summary, f"It was not refused by the grants: {code.message if code else outcome}"]


def questions_of(entry: dict[str, Any], keys_of: Callable[[str], Keys]) -> tuple[list[Question], list[Keys]]:
    """Return the questions of a request, and its keys. Raises `ChainError` for an unknown operation."""
    operation = entry.get("operation")
    if operation not in OPERATIONS:
        raise ChainError(f"the agent has no operation {operation!r}")
    gids, uid = entry.get("gids"), entry.get("uid")
    peer = Peer(
        uid=uid if isinstance(uid, int) else None,
        gids=frozenset(gids if isinstance(gids, list) else ()),
        pid=None,
        listener=str(entry.get("listener")),
        unit=entry.get("unit"),
        exe=entry.get("exe"),
        sha256=entry.get("sha256"),
        access_key=entry.get("access_key") or "",
    )
    unknown_selectors = {"pod"}
    if "exe" not in entry:
        unknown_selectors |= {"exe", "sha256"}
    if len(peer.gids) >= MAX_GROUPS:
        unknown_selectors |= {"gid", "group"}
    source, destination = (str(entry.get(name) or "") for name in ("key_id", "destination_key_id"))
    lookups = [(f"kms:{operation}", source)]
    if operation == "ReEncrypt":
        lookups = [("kms:ReEncryptFrom", source), ("kms:ReEncryptTo", destination)]
    questions, request_keys = [], []
    for action, key_id in lookups:
        keys = keys_of(key_id) if key_id else None
        if keys is not None:
            request_keys.append(keys)
        questions.append(
            Question(
                peer=peer,
                action=action,
                key=keys.shown if keys else "every key" if action in WITHOUT_KEY else "a key that is not recorded",
                names=keys.names if keys else None,
                fingerprint=entry.get("recipient") or None,
                context_keys=tuple(entry.get("context_keys") or ()),
                unknown=frozenset(unknown_selectors),
                stays=source == destination or not destination,
            )
        )
    return questions, request_keys
