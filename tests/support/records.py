"""Stores full of records, and what is in them."""

from collections.abc import Iterable

from keyferry import Client, KmsError, operations
from keyferry.store import Record, Store
from keyferry.store.record import context_text, now


def fill(store: Store, kms: Client, count: int, *, key_id: str = "alias/a", start: int = 0) -> dict[str, str]:
    """Add records r0, r1 and so on, each with a context of its own; give the plaintext of each data key by name."""
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
    """The data key of each record in plaintext, by name, as whoever may decrypt gets it."""
    read = list(records)
    answers = kms.pipeline(
        operations.Decrypt(ciphertext_blob=record.ciphertext_blob, encryption_context=record.encryption_context or None)
        for record in read
    )
    for answer in answers:
        if isinstance(answer, KmsError):
            raise answer
    return {record.name: answer.plaintext for record, answer in zip(read, answers, strict=True)}
