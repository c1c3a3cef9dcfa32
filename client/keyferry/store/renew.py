"""Give a record a new data key: the old record keeps the old one, under another name, until all that it encrypted is moved.

A rewrap keeps the data key: it helps against a master key that leaked, and not against a data key that did. The new record has
the same name, master key, EncryptionContext and size, so that applications use the new data key from their next start on.
"""

from ..ciphertext import data_key_size
from ..client import Client
from .record import Record, StoreError, new_record, printable
from .store import Store

__all__ = ["renew"]


def renew(store: Store, kms: Client, name: str, *, old_name: str | None = None) -> tuple[Record, Record]:
    """Give the record `name` a new data key; return the new record, and the old one under its new name.

    `old_name` is by default the name with the date on which the old record was added: `orders@2026-01-31T12:00:00Z`. Both
    change in one transaction. Raises `KeyferryError`; then the store is as it was.
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
