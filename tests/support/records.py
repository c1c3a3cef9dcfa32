"""Stores with records, and their contents."""

from collections.abc import Callable, Iterable

import sqlalchemy

from keyferry import Client, KmsError, operations
from keyferry.parameters import decode_base64, encode_base64
from keyferry.store import Record, Store
from keyferry.store import store as store_module
from keyferry.store.record import context_text, now


def fill(store: Store, kms: Client, count: int, *, key_id: str = "alias/a", start: int = 0) -> dict[str, str]:
    """Add records r0, r1 and so on, each with its own context; return the plaintext data keys by name."""
    contexts = [{"tenant": f"t{number}", "é": '"'} if number % 3 else {} for number in range(start, start + count)]
    made = kms.pipeline(
        operations.GenerateDataKey(key_id=key_id, encryption_context=context or None) for context in contexts
    )
    records = [
        Record(f"r{number}", each.key_id, each.key_version_id, each.ciphertext_blob, context_text(context), now())
        for number, (each, context) in enumerate(zip(made, contexts, strict=True), start)
    ]
    store.add(*records)
    return {record.name: each.plaintext for record, each in zip(records, made, strict=True)}


def opened(records: Iterable[Record], kms: Client) -> dict[str, str]:
    """Return the data key of each record in plaintext, by name, as a caller of Decrypt gets it."""
    read = list(records)
    answers = kms.pipeline(
        operations.Decrypt(ciphertext_blob=record.ciphertext_blob, encryption_context=record.encryption_context or None)
        for record in read
    )
    for answer in answers:
        if isinstance(answer, KmsError):
            raise answer
    return {record.name: answer.plaintext for record, answer in zip(read, answers, strict=True)}


def damage(store: Store, name: str, column: str, change_of: Callable[[str], str]) -> None:
    """Change one column of one row, as an administrator with the database's shell would."""
    with store._engine.begin() as connection:
        table = store_module._records
        (text,) = connection.execute(sqlalchemy.select(table.c[column]).where(table.c.name == name)).one()
        connection.execute(sqlalchemy.update(table).where(table.c.name == name).values({column: change_of(text)}))


def flipped(blob: str, bit: int) -> str:
    """A blob with one bit changed."""
    raw = bytearray(decode_base64(blob))
    raw[bit // 8] ^= 1 << bit % 8
    return encode_base64(raw)
