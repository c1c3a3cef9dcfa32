"""The query of `audit who`: finds the matching entries, and counts them in groups or keeps them one by one."""

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from datetime import datetime
from typing import IO, Any, Final, NamedTuple, Self

from .key_names import LoggedNames
from .log import MAX_CONTEXT_KEYS, MAX_CONTEXT_KEYS_BYTES, MAX_KEY_CHARACTERS

__all__ = ["RELEASES", "Counted", "Listed", "NamesOnly", "Query", "Spool", "names_of"]

RELEASES: Final = ("GenerateAndExportDataKey", "ExportDataKey", "GenerateDataKey", "Decrypt", "ReEncrypt")
"""Operations that return a data key to a caller, or re-encrypt it under another key, with which the caller may decrypt it."""
_MAYBE_MORE_BYTES: Final = MAX_CONTEXT_KEYS_BYTES - 12 * MAX_KEY_CHARACTERS - 4
"""Bytes in JSON from which on a list of context keys may have been cut off, because one more key might not have fit."""


class Query(NamedTuple):
    """The conditions of a query. None matches any value."""

    operations: tuple[str, ...] = RELEASES
    uid: int | None = None
    unit: str | None = None
    access_key: str | None = None
    recipient: str | None = None
    grant: str | None = None
    version: str | None = None
    ciphertext: str | None = None
    context_key: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def matches(self, fields: dict[str, Any], time: datetime | None) -> bool:
        """Return whether an entry matches, apart from its key and its context. An entry without a time matches any time."""
        names = ("uid", "unit", "access_key", "recipient", "grant")
        conditions = [(getattr(self, name), name) for name in names]
        return (
            fields.get("event") == "audit"
            and fields.get("outcome") == "OK"
            and fields.get("operation") in self.operations
            and all(value is None or fields.get(name) == value for value, name in conditions)
            and _one_of(self.version, fields, "key_version_id", "destination_key_version_id")
            and _one_of(self.ciphertext, fields, "ciphertext", "destination_ciphertext")
            and not (time is not None and self.since is not None and time < self.since)
            and not (time is not None and self.until is not None and time >= self.until)
        )

    def has_context_key(self, fields: dict[str, Any]) -> bool | None:
        """Return whether an entry has the key of the EncryptionContext; None if its list of keys may have been cut off."""
        if self.context_key is None:
            return True
        keys = fields.get("context_keys")
        if not isinstance(keys, list):
            return False
        if self.context_key[:MAX_KEY_CHARACTERS] in keys:
            return True
        is_full = len(keys) >= MAX_CONTEXT_KEYS or len(json.dumps(keys)) >= _MAYBE_MORE_BYTES
        return None if is_full else False


def _one_of(value: str | None, fields: dict[str, Any], *names: str) -> bool:
    return value is None or any(fields.get(name) == value for name in names)


class NamesOnly:
    """A tally that collects the names of keys in one file."""

    def __init__(self) -> None:
        self.names = LoggedNames()

    def __call__(self, fields: dict[str, Any], time: datetime | None) -> None:
        """Take an entry."""
        self.names.take(fields, time)


class _Matching(NamesOnly, ABC):
    """A tally of the entries that match a query. A subclass defines how it keeps them."""

    def __init__(self, query: Query) -> None:
        super().__init__()
        self._query = query
        self.undecided = 0
        """Entries whose list of context keys may have been cut off, so that a match is uncertain."""

    def __call__(self, fields: dict[str, Any], time: datetime | None) -> None:
        """Take an entry."""
        super().__call__(fields, time)
        if self._query.matches(fields, time):
            match = self._query.has_context_key(fields)
            self.undecided += match is None
            if match:
                self._found(fields)

    @abstractmethod
    def _found(self, fields: dict[str, Any]) -> None:
        """Add a matching entry to the tally."""


class Counted(_Matching):
    """Matching entries, counted in one group for each caller, operation, key and recipient."""

    NAMES: Final = (
        "uid",
        "unit",
        "access_key",
        "listener",
        "grant",
        "operation",
        "recipient",
        "key_id",
        "key_version_id",
        "destination_key_id",
    )

    def __init__(self, query: Query) -> None:
        super().__init__(query)
        self._groups: dict[str, dict[str, Any]] = {}

    def add(self, later_file: "Counted") -> None:
        """Add the groups of a later file."""
        for group in later_file.of(None):
            self._add(group)

    def of(self, keys: Collection[str] | None) -> list[dict[str, Any]]:
        """Return the groups of some keys; for None, of all keys."""
        return [group for group in self._groups.values() if is_of(group, keys)]

    def _found(self, fields: dict[str, Any]) -> None:
        time_text = fields.get("time")
        self._add(
            {**{name: fields.get(name) for name in self.NAMES}, "count": 1, "first": time_text, "last": time_text}
        )

    def _add(self, group: dict[str, Any]) -> None:
        key = json.dumps([group[name] for name in self.NAMES])
        total = self._groups.setdefault(key, {**group, "count": 0})
        total["count"] += group["count"]
        total["last"] = group["last"]


class Spool:
    """A temporary file without a name. It keeps matching entries until the order of the audit log's files is known."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, line: bytes) -> None:
        """Append a line with its newline. Raises OSError."""
        if self._file is None:
            self._file = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed at the end of the `with` block
        self.size += self._file.write(line)

    def lines(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the lines between two places."""
        while start < end:
            assert self._file is not None
            self._file.seek(start)
            line = self._file.readline()
            start += len(line)
            yield line


class Listed(_Matching):
    """Matching entries, kept one by one in a spool, so that memory does not grow with their number."""

    NAMES: Final = (
        "time",
        "request_id",
        "operation",
        "ciphertext",
        "destination_ciphertext",
        "key_id",
        "key_version_id",
        "destination_key_id",
        "destination_key_version_id",
        "recipient",
        "uid",
        "pid",
        "unit",
        "access_key",
        "listener",
        "exe",
        "sha256",
        "grant",
        "context_keys",
    )

    def __init__(self, query: Query, spool: Spool) -> None:
        super().__init__(query)
        self._spool = spool
        self._begin = self._end = 0

    def of(self, keys: Collection[str] | None) -> Iterator[dict[str, Any]]:
        """Yield the entries of some keys; for None, of all keys."""
        for line in self._spool.lines(self._begin, self._end):
            fields = json.loads(line)
            if is_of(fields, keys):
                yield fields

    def _found(self, fields: dict[str, Any]) -> None:
        fields_of_entry = {name: fields[name] for name in self.NAMES if name in fields}
        if not self._end:  # files are read one after the other, so the entries of one file are contiguous
            self._begin = self._spool.size
        self._spool.append(json.dumps(fields_of_entry).encode() + b"\n")
        self._end = self._spool.size


def is_of(fields: dict[str, Any], keys: Collection[str] | None) -> bool:
    """Return whether an entry is about one of `keys`, for ReEncrypt also as the destination. None matches any key."""
    return keys is None or fields.get("key_id") in keys or fields.get("destination_key_id") in keys


def names_of(tallies: Iterable[NamesOnly]) -> LoggedNames:
    """Return the names of keys from all files together."""
    names = LoggedNames()
    names.merge(tally.names for tally in tallies)
    return names
