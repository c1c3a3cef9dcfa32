"""Gives a record a new data key. The old data key stays in the store under another name, until its ciphertexts are moved.

A rewrap keeps the data key, so it helps after a master key leaked, but not after a data key leaked. The new record has the same
name, master key, EncryptionContext and size. Applications therefore use the new data key from their next start on.
"""

from ..ciphertext import data_key_size
from ..client import Client
from .record import Record, StoreError, new_record, printable
from .store import Store

__all__ = ["renew"]


def renew(store: Store, kms: Client, name: str, *, old_name: str | None = None) -> tuple[Record, Record]:
    """Give the record `name` a new data key; return the new record, and the old record under its new name.

    `old_name` defaults to the name and the time at which the old record was added: `orders@2026-01-31T12:00:00Z`. One
    transaction changes both records. Raises `KeyferryError`; then the store is unchanged.
    """
    old_record = store.get(name)
    old_record = old_record._replace(name=f"{name}@{old_record.created}" if old_name is None else old_name)
    store.check_free(old_record.name)
    try:
        size = data_key_size(old_record.ciphertext_blob)
    except ValueError as error:
        raise StoreError(f"{printable(name)}: its CiphertextBlob in the store is damaged: {error}") from None
    added_record = new_record(
        kms,
        name,
        key_id=old_record.key_id,
        encryption_context=old_record.encryption_context or None,
        number_of_bytes=size,
    )
    store.renew(old_record._replace(name=name), added_record, old_record.name)
    return added_record, old_record
