"""The chain of a record: each line holds the SHA-256 of the one before it, so that none can be changed, taken out or moved.

What a chain cannot show is that its newest lines are missing: whoever wants to know keeps `last` somewhere else.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["BEGINNING", "ChainError", "Verified", "link", "read", "verify"]

BEGINNING: Final = "0" * 64
"""What the first line of a record has for the one before it."""


class ChainError(Exception):
    """A record is not what was written. The message says which line, and what is wrong with it."""


class Verified(NamedTuple):
    """A whole chain: how many lines, the hash of the last, and whether the first is the very first."""

    lines: int
    last: str
    beginning: bool


def link(line: bytes) -> str:
    """What the line after this one holds: the SHA-256 of its bytes without the newline, in hex."""
    return hashlib.sha256(line).hexdigest()


def verify(paths: list[Path]) -> Verified:
    """Follow the chain through files, oldest first. Raises `ChainError`, or OSError."""
    previous, count, beginning = "", 0, False
    for path, number, line in _lines(paths):
        record = _parse(path, number, line)
        if not _is_recorded(record):
            continue  # the agent's log, where both go to standard error
        held = record.get("previous")
        if not count:
            beginning = held == BEGINNING  # else older files were left out: the chain is whole from here on
        elif held != previous:
            what = "begins a new chain" if held == BEGINNING else "does not follow the line before it"
            raise ChainError(f"{path}, line {number}: {what}: a line was changed, taken out, or moved")
        previous, count = link(line), count + 1
    if not count:
        raise ChainError("there is no line in it")
    return Verified(count, previous, beginning)


def read(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """The records in files, as they are. Raises `ChainError` for a line that is none, or OSError."""
    for path, number, line in _lines(paths):
        record = _parse(path, number, line)
        if _is_recorded(record):
            yield record


def _lines(paths: list[Path]) -> Iterator[tuple[Path, int, bytes]]:
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    raise ChainError(f"{path}, line {number}: cut off")
                yield path, number, line[:-1]


def _is_recorded(record: dict[str, Any]) -> bool:
    return record.get("event") == "audit" or "previous" in record


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ChainError(f"{path}, line {number}: not a line of an audit record")
    return record
