"""What every cryptographic module is, and the calls that are the same for all of them: steps 1 and 3 of the guide."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final

from ..client import Client
from ..errors import KeyferryError
from ..record import DataKeyRecord

__all__ = ["CryptographicModule", "DataKey", "DataKeyRecord", "ModuleError"]

NONCE: Final = 12
TAG: Final = 16
"""Bytes before and after what AES-GCM encrypted, in every module."""
AES_KEYS: Final = (16, 24, 32)

NOT_OURS: Final = "this is not a data key that was exported to this module"
NO_AES_KEY: Final = "this data key is no AES key: 16, 24 or 32 bytes are"
NOT_HELD: Final = "this module does not hold that key (any more)"
NOT_AUTHENTIC: Final = "this was not encrypted with this key and this aad, or it is damaged"


class ModuleError(KeyferryError):
    """The module refused: a key or a ciphertext that is not what it should be. One error for all causes: no oracle."""


def check_size(size: int) -> None:
    """Raise `ModuleError` for a data key whose size in bytes is none of AES."""
    if size not in AES_KEYS:
        raise ModuleError(f"a data key of {size} bytes is no AES key: 16, 24 or 32 are")


class DataKey:
    """A data key inside a module. An opaque handle: it names the key, and there is no way to read it out."""

    __slots__ = ("__weakref__",)

    def __reduce__(self) -> str:
        raise TypeError("a DataKey cannot be pickled or copied: it stands for a key in one module of one process")

    def __repr__(self) -> str:
        return "DataKey(...)"


class CryptographicModule(ABC):
    """Holds a private key and the data keys that were exported to it."""

    wrapping_key_spec: str
    wrapping_algorithm: str

    def __reduce__(self) -> str:
        raise TypeError(f"a {type(self).__name__} cannot be pickled or copied: open it in each process")

    @property
    @abstractmethod
    def public_key_blob(self) -> str:
        """The public key, as PublicKeyBlob takes it: Base64 of the DER SubjectPublicKeyInfo."""

    @abstractmethod
    def import_data_key(self, exported_data_key: str | bytes) -> DataKey:
        """Import an ExportedDataKey (Base64, or its bytes) of 16, 24 or 32 bytes. Raises `ModuleError`."""

    @abstractmethod
    def encrypt(self, key: DataKey, plaintext: bytes, aad: bytes = b"") -> bytes:
        """Encrypt with AES-GCM under a fresh random nonce: nonce (12) ‖ ciphertext ‖ tag (16)."""

    @abstractmethod
    def decrypt(self, key: DataKey, sealed: bytes, aad: bytes = b"") -> bytes:
        """Decrypt what `encrypt` gave, with the same aad. Raises `ModuleError`, whatever is wrong."""

    @abstractmethod
    def forget(self, key: DataKey) -> None:
        """Wipe a data key. The handle is of no further use."""

    def new_data_key(
        self,
        kms: Client,
        *,
        key_id: str,
        encryption_context: Mapping[str, str] | None = None,
        number_of_bytes: int | None = None,
    ) -> tuple[DataKey, DataKeyRecord]:
        """GenerateAndExportDataKey, then import: a data key ready to use, and the record that brings it back.

        Store the record before encrypting anything that must survive. Raises `KeyferryError`.
        """
        made = kms.generate_and_export_data_key(
            key_id=key_id,
            number_of_bytes=number_of_bytes,
            encryption_context=encryption_context,
            **self._recipient(),
        )
        record = DataKeyRecord(
            KeyId=made.key_id,
            KeyVersionId=made.key_version_id,
            CiphertextBlob=made.ciphertext_blob,
            EncryptionContext=dict(encryption_context or {}),
        )
        return self.import_data_key(made.exported_data_key), record

    def recover_data_key(self, kms: Client, record: DataKeyRecord) -> DataKey:
        """ExportDataKey, then import: the data key of a record, after a loss or in another module. Raises `KeyferryError`."""
        exported = kms.export_data_key(
            ciphertext_blob=record["CiphertextBlob"],
            encryption_context=record["EncryptionContext"] or None,
            **self._recipient(),
        )
        return self.import_data_key(exported.exported_data_key)

    def _recipient(self) -> dict[str, Any]:
        return {
            "public_key_blob": self.public_key_blob,
            "wrapping_key_spec": self.wrapping_key_spec,
            "wrapping_algorithm": self.wrapping_algorithm,
        }
