"""Entries that are not requests: the start of an agent (`audit.start`), the names of its keys (`audit.keys`), attempts to
unseal its keyring (`audit.unseal`), the end of a gap (`audit.resumed`), and further refusals of a gateway
(`audit.unauthenticated`).
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Final

from ..peer import Peer

__all__ = [
    "KEYS",
    "RESUMED",
    "START",
    "UNAUTHENTICATED",
    "UNSEAL",
    "key_lists",
    "names_in",
    "resumed",
    "start",
    "unauthenticated",
    "unsealing",
]

START: Final = "audit.start"
KEYS: Final = "audit.keys"
UNSEAL: Final = "audit.unseal"
RESUMED: Final = "audit.resumed"
UNAUTHENTICATED: Final = "audit.unauthenticated"
_MAX_KEYS: Final = 3_584
"""Bytes of the keys in one entry. They keep a line below PIPE_BUF (4,096): up to that, a write to a pipe is atomic."""


def start(now: str, version: str, started_at: str, chain: str) -> str:
    """Return the entry of an agent's start, a JSON object without its closing brace. `chain`: as in `RecordFile.chain`."""
    return _opened(
        {
            "time": now,
            "event": START,
            "level": "info",
            "version": version,
            "pid": os.getpid(),
            "started_at": started_at,
            "chain": chain,
        }
    )


def key_lists(now: str, loaded_at: str, keys: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """Return the entries that name all keys of a keyring, each with its aliases.

    A large keyring has several entries, and an empty keyring has one.
    """
    parts: list[list[str]] = [[]]
    remaining = _MAX_KEYS
    for piece in itertools.chain.from_iterable(itertools.starmap(_pieces, keys)):
        if len(piece) > remaining:
            parts.append([])
            remaining = _MAX_KEYS
        parts[-1].append(piece)
        remaining -= len(piece) + len(", ")
    common = _opened({"time": now, "event": KEYS, "level": "info", "loaded_at": loaded_at})
    return [
        f'{common}, "part": {number}, "parts": {len(parts)}, "keys": {{{", ".join(part)}}}'
        for number, part in enumerate(parts, 1)
    ]


def unsealing(now: str, peer: Peer, outcome: str, loaded_at: str) -> str:
    """Return the entry of an attempt to unseal the keyring.

    `outcome`: "OK" or "Refused". `loaded_at`: the load time of the keyring in use after the attempt.
    """
    return _opened(
        {
            "time": now,
            "event": UNSEAL,
            "level": "info" if outcome == "OK" else "warning",
            "uid": peer.uid,
            "gids": sorted(peer.gids),
            "pid": peer.pid,
            "unit": peer.unit,
            "outcome": outcome,
            "loaded_at": loaded_at,
        }
    )


def resumed(now: str, unrecorded_requests: int) -> str:
    """Return the entry that follows a gap, with the number of requests without an audit entry."""
    return _opened({"time": now, "event": RESUMED, "level": "warning", "unrecorded": unrecorded_requests})


def unauthenticated(now: str, listener: str, count: int) -> str:
    """Return the entry of requests of a gateway that were refused before their signature was verified, beyond the limit of
    entries a second.
    """
    fields = {"time": now, "event": UNAUTHENTICATED, "level": "warning", "listener": listener, "requests": count}
    return _opened(fields)


def _pieces(key_id: str, aliases: Iterable[str]) -> Iterator[str]:
    """Yield a key and its aliases as a member of a JSON object, or several members if the aliases do not fit into one entry.

    Two of these members never share an entry, since the second begins with an alias that did not fit into the first.
    """
    names = [quoted(alias) for alias in aliases]
    member = f"{quoted(key_id)}: [{', '.join(names)}]"
    if len(member) <= _MAX_KEYS:
        yield member
        return
    piece = ""
    for name in names:
        extension = f"{piece}, {name}" if piece else f"{quoted(key_id)}: [{name}"
        if len(extension) >= _MAX_KEYS:
            yield f"{piece}]"
            extension = f"{quoted(key_id)}: [{name}"
        piece = extension
    yield f"{piece}]"


def names_in(fields: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the key IDs in an `audit.keys` entry, each with its aliases. Leaves out values that an agent does not write."""
    keys = fields.get("keys")
    if fields.get("event") != KEYS or not isinstance(keys, dict):
        return {}
    return {
        key_id: [alias for alias in aliases if isinstance(alias, str)]
        for key_id, aliases in keys.items()
        if isinstance(aliases, list)
    }


def _opened(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields)[:-1]
