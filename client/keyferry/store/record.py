"""Defines a data-key record: a named data key, encrypted under its master key, as a row of the database."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from ..ciphertext import ciphertext_hash
from ..client import Client
from ..errors import KeyferryError
from ..module.interface import DataKeyRecord
from ..parameters import encode_base64, unique_pairs

__all__ = [
    "MAX_NAME_CHARACTERS",
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

MAX_NAME_CHARACTERS: Final = 255
"""Most characters in a record's name."""

VERSION_PREFIX: Final = 48
"""Characters of a CiphertextBlob that hold its KeyVersionId: 36 bytes are exactly 48 of Base64 (docs/ciphertext.md)."""


class StoreError(KeyferryError):
    """The store refused a call or cannot be reached. The message names the fault and the remedy, never a password."""


class Record(NamedTuple):
    """A row of the table. Every column is text in the API's form. Damage is detected only when a field is used."""

    name: str
    key_id: str
    key_version_id: str
    ciphertext_blob: str
    context_text: str
    """The EncryptionContext as JSON."""
    created: str
    """UTC, to the second: 2026-01-31T12:00:00Z."""
    rewrapped: str | None = None
    """UTC, to the second, of the last rewrap. None: never rewrapped."""
    row_id: int = 0
    """The row's number in the database. 0: not in a database yet."""

    @property
    def encryption_context(self) -> dict[str, str]:
        """Return the EncryptionContext of the ciphertext. Raises `StoreError` if the database's text is damaged."""
        try:
            context = json.loads(self.context_text, object_pairs_hook=unique_pairs)
        except (ValueError, RecursionError):
            context = None
        if not isinstance(context, dict) or not all(isinstance(value, str) for value in context.values()):
            raise StoreError(f"{printable(self.name)}: its EncryptionContext in the store is damaged")
        return context

    def data_key_record(self) -> DataKeyRecord:
        """Return the record in the form that a cryptographic module accepts. Raises `StoreError`."""
        return DataKeyRecord(
            KeyId=self.key_id,
            KeyVersionId=self.key_version_id,
            CiphertextBlob=self.ciphertext_blob,
            EncryptionContext=self.encryption_context,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the record under the API's names. A damaged context is None, and so is the hash of a damaged blob."""
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
    """Generate a data key without plaintext (GenerateDataKeyWithoutPlaintext), and return its record, not yet in a store.

    Raises `KeyferryError`.
    """
    check_name(name)
    answer = kms.generate_data_key_without_plaintext(
        key_id=key_id, encryption_context=encryption_context, key_spec=key_spec, number_of_bytes=number_of_bytes
    )
    context = encryption_context or {}
    if isinstance(context, str):
        context = json.loads(context)  # the agent has checked the JSON text
    return Record(name, answer.key_id, answer.key_version_id, answer.ciphertext_blob, context_text(context), now())


def context_text(context: Mapping[str, str]) -> str:
    """Return an EncryptionContext in the stored form: JSON in ASCII, with sorted keys."""
    return json.dumps(context, sort_keys=True)


def version_prefix(key_version_id: str) -> str:
    """Return the first characters of every CiphertextBlob under this version, in Base64."""
    return encode_base64(key_version_id.encode())


def check_name(name: str) -> None:
    """Raise `StoreError` for a record's name that a user could not type or a terminal could not show."""
    if not 1 <= len(name) <= MAX_NAME_CHARACTERS or not name.isprintable() or name != name.strip():
        raise StoreError(
            f"'{printable(name[:40])}': not a valid record name; use 1 to {MAX_NAME_CHARACTERS} printable characters, "
            "without spaces at the ends"
        )


def printable(text: str) -> str:
    """Return text of a database in a form that is safe on a terminal. Text that is not printable, such as control characters,
    is escaped, because another user may have written it.
    """
    return text if text.isprintable() else ascii(text)[1:-1]


def now() -> str:
    """Return the current time in the form of `Record.created`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
