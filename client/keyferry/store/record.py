"""One record: a data key under its master key, with a name, as it is in the database."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from ..ciphertext import ciphertext_hash
from ..client import Client
from ..errors import KeyferryError
from ..parameters import encode_base64, unique_pairs
from ..record import DataKeyRecord

__all__ = [
    "LONGEST_NAME",
    "VERSION_PREFIX",
    "Record",
    "StoreError",
    "check_name",
    "context_text",
    "new_record",
    "now",
    "printable",
    "version_prefix",
]

LONGEST_NAME: Final = 255
"""Characters of a record's name."""

VERSION_PREFIX: Final = 48
"""Characters of a CiphertextBlob that hold its KeyVersionId: 36 bytes are exactly 48 of Base64 (docs/ciphertext.md)."""


class StoreError(KeyferryError):
    """The store refused, or cannot be reached: what it was, and what to do. Never says a database's password."""


class Record(NamedTuple):
    """A row. All of it is text, as the API gives it; what is damaged shows only when it is used."""

    name: str
    key_id: str
    key_version_id: str
    ciphertext_blob: str
    context_text: str
    """The EncryptionContext as JSON."""
    created: str
    """UTC, to the second: 2026-01-31T12:00:00Z."""
    rewrapped: str | None = None
    """The same; None: never."""
    row_id: int = 0
    """The database's; 0 before it has one."""

    @property
    def encryption_context(self) -> dict[str, str]:
        """The context that the ciphertext was made with. Raises `StoreError` when the database's text is damaged."""
        try:
            context = json.loads(self.context_text, object_pairs_hook=unique_pairs)
        except (ValueError, RecursionError):
            context = None
        if not isinstance(context, dict) or not all(isinstance(value, str) for value in context.values()):
            raise StoreError(f"{printable(self.name)}: its EncryptionContext in the store is damaged")
        return context

    def data_key_record(self) -> DataKeyRecord:
        """The record as a cryptographic module takes it. Raises `StoreError`."""
        return DataKeyRecord(
            KeyId=self.key_id,
            KeyVersionId=self.key_version_id,
            CiphertextBlob=self.ciphertext_blob,
            EncryptionContext=self.encryption_context,
        )

    def to_json(self) -> dict[str, Any]:
        """The record by the API's names; a context that is damaged is null, and so is the hash of a damaged CiphertextBlob."""
        try:
            context: dict[str, str] | None = self.encryption_context
        except StoreError:
            context = None
        try:
            blob_hash: str | None = ciphertext_hash(self.ciphertext_blob)
        except ValueError:
            blob_hash = None
        return {
            "Name": self.name,
            "KeyId": self.key_id,
            "KeyVersionId": self.key_version_id,
            "CiphertextBlob": self.ciphertext_blob,
            "CiphertextHash": blob_hash,
            "EncryptionContext": context,
            "Created": self.created,
            "Rewrapped": self.rewrapped,
        }


def new_record(
    kms: Client,
    name: str,
    *,
    key_id: str,
    encryption_context: Mapping[str, str] | str | None = None,
    key_spec: str | None = None,
    number_of_bytes: int | None = None,
) -> Record:
    """Make a data key that nobody sees (GenerateDataKeyWithoutPlaintext), and the record of it, to be added to a store.

    Raises `KeyferryError`.
    """
    check_name(name)
    made = kms.generate_data_key_without_plaintext(
        key_id=key_id, encryption_context=encryption_context, key_spec=key_spec, number_of_bytes=number_of_bytes
    )
    context = encryption_context or {}
    if isinstance(context, str):
        context = json.loads(context)  # the agent has checked it
    return Record(name, made.key_id, made.key_version_id, made.ciphertext_blob, context_text(context), now())


def context_text(context: Mapping[str, str]) -> str:
    """An EncryptionContext as it is stored: JSON of ASCII characters, sorted."""
    return json.dumps(context, sort_keys=True)


def version_prefix(key_version_id: str) -> str:
    """How every CiphertextBlob begins that was made under this version."""
    return encode_base64(key_version_id.encode())


def check_name(name: str) -> None:
    """Refuse what cannot be typed or shown. Raises `StoreError`."""
    if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable() or name != name.strip():
        raise StoreError(
            f"'{printable(name[:40])}' is no name for a record: 1 to {LONGEST_NAME} printable characters, no space at its ends"
        )


def printable(text: str) -> str:
    """What is in a database, as a terminal may have it: its control characters are somebody else's."""
    return text if text.isprintable() else ascii(text)[1:-1]


def now() -> str:
    """This moment, as records have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
