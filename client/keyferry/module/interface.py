"""The interface of every cryptographic module, and the calls that all modules share: steps 1 and 3 of the guide."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final, TypedDict

from ..client import Client
from ..errors import KeyferryError

__all__ = ["CryptographicModule", "DataKey", "DataKeyRecord", "ModuleError"]

NONCE_SIZE: Final = 12
TAG: Final = 16
"""Bytes before and after the ciphertext of AES-GCM, in every module."""
AES_KEYS: Final = (16, 24, 32)

NOT_OURS: Final = "this is not a data key that was exported to this module"
INVALID_SIZE: Final = "invalid data key size; expected 16, 24 or 32 bytes"
NOT_HELD: Final = "this module does not hold that key; recover it from its data-key record"
NOT_AUTHENTIC: Final = "this was not encrypted with this key and this aad, or it is damaged"


class ModuleError(KeyferryError):
    """The module refused a key or a ciphertext. All causes have one error, so that the error is not an oracle."""


def check_size(size: int) -> None:
    """Raise `ModuleError` unless a data key's size in bytes is the size of an AES key."""
    if size not in AES_KEYS:
        raise ModuleError(f"invalid data key size: {size} bytes; expected 16, 24 or 32")


class DataKey:
    """An opaque handle to a data key inside a module. The data key cannot be read through the handle."""

    __slots__ = ("__weakref__",)

    def __reduce__(self) -> str:
        raise TypeError("a DataKey cannot be pickled or copied: it stands for a key in one module of one process")

    def __repr__(self) -> str:
        return "DataKey(...)"


class DataKeyRecord(TypedDict):
    """The data-key record, which an application stores to recover a data key: the data key encrypted under its master key.

    It includes the KeyId and the EncryptionContext for decrypting, and can be written as JSON. It is not secret, but without it
    the data key is lost.
    """

    KeyId: str
    KeyVersionId: str
    CiphertextBlob: str
    EncryptionContext: dict[str, str]


class CryptographicModule(ABC):
    """Holds a private key and the data keys that were exported to it."""

    wrapping_key_spec: str
    wrapping_algorithm: str

    def __reduce__(self) -> str:
        raise TypeError(f"a {type(self).__name__} cannot be pickled or copied: open it in each process")

    @property
    @abstractmethod
    def public_key_blob(self) -> str:
        """Return the public key in the format of PublicKeyBlob: Base64 of the DER SubjectPublicKeyInfo."""

    @abstractmethod
    def import_data_key(self, exported_data_key: str | bytes) -> DataKey:
        """Import an ExportedDataKey (Base64, or its bytes) of 16, 24 or 32 bytes. Raises `ModuleError`."""

    @abstractmethod
    def encrypt(self, key: DataKey, plaintext: bytes, aad: bytes = b"") -> bytes:
        """Encrypt with AES-GCM under a fresh random nonce; return nonce (12 bytes) ‖ ciphertext ‖ tag (16 bytes)."""

    @abstractmethod
    def decrypt(self, key: DataKey, sealed: bytes, aad: bytes = b"") -> bytes:
        """Decrypt the output of `encrypt`, with the same aad. Raises `ModuleError` for every failure."""

    @abstractmethod
    def forget(self, key: DataKey) -> None:
        """Wipe a data key. Later calls with its handle raise `ModuleError`."""

    def new_data_key(
        self,
        kms: Client,
        *,
        key_id: str,
        encryption_context: Mapping[str, str] | None = None,
        number_of_bytes: int | None = None,
    ) -> tuple[DataKey, DataKeyRecord]:
        """Call GenerateAndExportDataKey, and import the data key. Return its handle, and the data-key record to recover it.

        Store the data-key record before encrypting anything that must survive. Raises `KeyferryError`.
        """
        answer = kms.generate_and_export_data_key(
            key_id=key_id,
            number_of_bytes=number_of_bytes,
            encryption_context=encryption_context,
            **self._recipient(),
        )
        record = DataKeyRecord(
            KeyId=answer.key_id,
            KeyVersionId=answer.key_version_id,
            CiphertextBlob=answer.ciphertext_blob,
            EncryptionContext=dict(encryption_context or {}),
        )
        return self.import_data_key(answer.exported_data_key), record

    def recover_data_key(self, kms: Client, record: DataKeyRecord) -> DataKey:
        """Call ExportDataKey, and import the data key of a data-key record, after a loss or in another module.

        Raises `KeyferryError`.
        """
        answer = kms.export_data_key(
            ciphertext_blob=record["CiphertextBlob"],
            encryption_context=record["EncryptionContext"] or None,
            **self._recipient(),
        )
        return self.import_data_key(answer.exported_data_key)

    def _recipient(self) -> dict[str, Any]:
        return {
            "public_key_blob": self.public_key_blob,
            "wrapping_key_spec": self.wrapping_key_spec,
            "wrapping_algorithm": self.wrapping_algorithm,
        }
