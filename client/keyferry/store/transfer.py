"""Copies records from one store to another with every field unchanged, for example from SQLite to PostgreSQL or back.

A page of records is one transaction in the target. After a copy was killed, the next run skips the records that are already in
the target, and completes the copy. No record is overwritten: a record that differs from the target's record of the same name
is reported, and both stay as they are.
"""

from collections.abc import Callable
from itertools import islice
from typing import Final, NamedTuple

from .record import Record, StoreError, check_name, printable
from .store import Store

__all__ = ["Copied", "copy"]

_PAGE_RECORDS: Final = 500
"""Records in one transaction."""


class Copied(NamedTuple):
    """Result of a copy, in numbers of records."""

    records: int
    """Records in the source."""
    copied: int
    present: int
    """Records already in the target, equal in every field."""
    refused: int
    """Records that were not copied, each reported to `refused`."""


def copy(
    source: Store,
    target: Store,
    *,
    refused: Callable[[str], None] = lambda _why: None,
    advanced: Callable[[int], None] = lambda _count: None,
) -> Copied:
    """Copy all records. `refused` is called with the reason for each record not copied, `advanced` with the size of each page.

    A missing target is created if it was opened with `create=True`. Raises `StoreError`, also if another process adds a record
    with one of the same names at that moment. Pages copied until then stay in the target.
    """
    counts = {"copied": 0, "present": 0, "refused": 0}
    records = iter(source)
    while page := list(islice(records, _PAGE_RECORDS)):
        target_records = target.named(record.name for record in page)
        new_records = []
        for record in page:
            target_record = target_records.get(record.name)
            why = _obstacle(record) if target_record is None else _difference(record, target_record)
            if why:
                counts["refused"] += 1
                refused(f"{printable(record.name)}: {why}")
            elif target_record is None:
                new_records.append(record)
            else:
                counts["present"] += 1
        if new_records:
            target.add(*new_records)
        counts["copied"] += len(new_records)
        advanced(len(page))
    return Copied(sum(counts.values()), **counts)


def _obstacle(record: Record) -> str:
    """Return the reason why a record cannot be added to any store, or an empty text if it can."""
    try:
        check_name(record.name)
    except StoreError as error:
        return str(error)
    # The driver puts U+FFFD for bytes that are not text. PostgreSQL refuses null characters.
    is_damaged = any(character in str(field) for field in record for character in "\ufffd\0")
    return "damaged in the source; repair the record there" if is_damaged else ""


def _difference(record: Record, target_record: Record) -> str:
    """Return the difference from the target's record of the same name, or an empty text if they are equal."""
    names = {"context_text": "encryption_context"}
    differences = [
        names.get(field, field)
        for field in Record._fields
        if field != "row_id" and getattr(record, field) != getattr(target_record, field)
    ]
    return f"another record has this name in the target, and differs in {', '.join(differences)}" if differences else ""
