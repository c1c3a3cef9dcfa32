"""The chain of an audit log. Each line contains the SHA-256 of the line before it, so changes to earlier lines are detected.

A chain cannot show that its newest lines are missing. To detect that, an operator keeps `Verified.last` in another place.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from .reading import ChainError, entry, lines

__all__ = ["BEGINNING", "ChainError", "Verified", "link", "read", "verify"]

BEGINNING: Final = "0" * 64
"""The `previous` of the first entry of an audit log."""


class Verified(NamedTuple):
    """A chain without faults: the number of entries, the hash of the last entry, and whether the log's first entry is in it."""

    lines: int
    last: str
    beginning: bool


def link(line: bytes) -> str:
    """Return the `previous` of the line that follows: the SHA-256 of a line without its newline, in hexadecimal."""
    return hashlib.sha256(line).hexdigest()


def verify(paths: list[Path]) -> Verified:
    """Follow the chain through files in the given order, up to the first fault. Raises `ChainError`, or OSError."""
    last_hash, count, beginning = "", 0, False
    for path in paths:
        for line in lines(path):
            fields = entry(path, line)
            if fields is None:
                continue
            previous_hash = fields.get("previous")
            if not count:
                # If not, older files are missing, and the chain is verified from here on.
                beginning = previous_hash == BEGINNING
            elif previous_hash != last_hash:
                problem = "begins a new chain" if previous_hash == BEGINNING else "does not follow the line before it"
                raise ChainError(f"{path}, line {line.number}: {problem}: a line was changed, removed or moved")
            last_hash, count = link(line.text), count + 1
    if not count:
        raise ChainError("the audit log has no entry")
    return Verified(count, last_hash, beginning)


def read(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield the entries in files, without following the chain. Raises `ChainError` for an invalid line, or OSError."""
    for path in paths:
        for line in lines(path):
            if (fields := entry(path, line)) is not None:
                yield fields
