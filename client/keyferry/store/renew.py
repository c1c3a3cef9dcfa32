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
    old = store.get(name)
    old = old._replace(name=f"{name}@{old.created}" if old_name is None else old_name)
    store.check_free(old.name)
    try:
        size = data_key_size(old.ciphertext_blob)
    except ValueError as error:
        raise StoreError(f"{printable(name)}: its CiphertextBlob in the store is damaged: {error}") from None
    new = new_record(
        kms, name, key_id=old.key_id, encryption_context=old.encryption_context or None, number_of_bytes=size
    )
    store.renew(old._replace(name=name), new, old.name)
    return new, old
