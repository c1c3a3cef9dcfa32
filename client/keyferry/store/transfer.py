"""Copy records from one store to another, with every field as it is: from SQLite to PostgreSQL, or back.

A page of records is one transaction in the target. A copy that was killed is finished by the next run, which finds the records
that are there already. No record is overwritten: one that differs under the same name is reported, and both stay as they are.
"""

from collections.abc import Callable
from itertools import islice
from typing import Final, NamedTuple

from .record import Record, StoreError, check_name, printable
from .store import Store

__all__ = ["Copied", "copy"]

_PAGE: Final = 500
"""Records in one transaction."""


class Copied(NamedTuple):
    """What a copy did, in numbers of records."""

    records: int
    """In the source."""
    copied: int
    present: int
    """In the target before, equal in every field."""
    refused: int
    """Not copied, each reported."""


def copy(
    source: Store,
    target: Store,
    *,
    refused: Callable[[str], None] = lambda _why: None,
    advanced: Callable[[int], None] = lambda _count: None,
) -> Copied:
    """Copy all records. `refused` is called with the reason for each that is not, `advanced` with the size of each page.

    A target with `create=True` is made where it does not exist. Raises `StoreError`, also where another process adds one of the
    same names at that moment; what was copied until then is copied.
    """
    counts = {"copied": 0, "present": 0, "refused": 0}
    records = iter(source)
    while page := list(islice(records, _PAGE)):
        there = target.named(record.name for record in page)
        new = []
        for record in page:
            found = there.get(record.name)
            why = _obstacle(record) if found is None else _difference(record, found)
            if why:
                counts["refused"] += 1
                refused(f"{printable(record.name)}: {why}")
            elif found is None:
                new.append(record)
            else:
                counts["present"] += 1
        if new:
            target.add(*new)
        counts["copied"] += len(new)
        advanced(len(page))
    return Copied(sum(counts.values()), **counts)


def _obstacle(record: Record) -> str:
    """Return why a record cannot be added to any store; an empty text where it can."""
    try:
        check_name(record.name)
    except StoreError as error:
        return str(error)
    # The driver puts U+FFFD for bytes that are not text. PostgreSQL refuses null characters.
    damaged = any(character in str(field) for field in record for character in "\ufffd\0")
    return "it is damaged in the source" if damaged else ""


def _difference(record: Record, found: Record) -> str:
    """Return how a record differs from the one of its name in the target; an empty text where they are equal."""
    names = {"context_text": "encryption_context"}
    differing = [
        names.get(field, field)
        for field in Record._fields
        if field != "row_id" and getattr(record, field) != getattr(found, field)
    ]
    return f"another record has this name in the target, and differs in {', '.join(differing)}" if differing else ""
