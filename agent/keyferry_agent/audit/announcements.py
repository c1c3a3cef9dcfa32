"""Entries that are not requests: the start of an agent (`audit.start`), and the names of its keys (`audit.keys`)."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

__all__ = ["KEYS", "START", "key_lists", "names_in", "start"]

START: Final = "audit.start"
KEYS: Final = "audit.keys"
_MAX_KEYS: Final = 3_584
"""Bytes of the keys in one entry, so that a line stays below 4,096: so much a pipe takes whole, or not at all."""


def start(now: str, version: str, started_at: str, chain: str) -> str:
    """Return the entry of an agent's start, a JSON object that is not closed yet. `chain`: as in `RecordFile.chain`."""
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
    """Return the entries that name all keys of a keyring, each with its aliases. There are several for a large keyring, and an
    entry for an empty one, too.
    """
    parts: list[dict[str, list[str]]] = [{}]
    size = 0
    for key_id, aliases in keys:
        for piece in [(key_id, None), *((key_id, alias) for alias in aliases)]:
            name, alias = piece
            part = parts[-1]
            more = len(json.dumps(alias)) + 2 if alias is not None and name in part else len(json.dumps(piece)) + 2
            if size + more > _MAX_KEYS:
                parts.append(part := {})
                size = 0
                more = len(json.dumps(piece)) + 2
            named = part.setdefault(name, [])
            if alias is not None:
                named.append(alias)
            size += more
    common = {"time": now, "event": KEYS, "level": "info", "loaded_at": loaded_at}
    return [
        _opened({**common, "part": number, "parts": len(parts), "keys": part}) for number, part in enumerate(parts, 1)
    ]


def names_in(fields: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the key IDs in an `audit.keys` entry, each with its aliases. Leaves out what an agent does not write."""
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
