"""Receipt keys in a keyring's document: the private keys with which agents sign receipts, and their public keys."""

from dataclasses import dataclass, field
from typing import Any, Final

from keyferry.parameters import encode_base64

from .description import RECEIPT_MATERIAL_BYTES, ReceiptKeyDescription, ReceiptVersionDescription
from .reading import KeyringError, ObjectReader

__all__ = ["RECEIPT_KEY_SPECS", "ReceiptKeyEntry", "ReceiptVersionEntry"]

RECEIPT_KEY_SPECS: Final = ("Ed25519", "EC_SM2")
_MAX_PUBLIC_KEY_BYTES: Final = 256
"""More than the DER SubjectPublicKeyInfo of either key spec: 44 and 91 bytes."""


@dataclass
class ReceiptVersionEntry:
    """One version of a receipt key. A staged version is published, and does not sign.

    `public_key` is its DER SubjectPublicKeyInfo.
    """

    version_id: str
    created: str
    public_key: bytes
    material: bytearray = field(repr=False)
    staged: bool = False

    def describe(self) -> ReceiptVersionDescription:
        """Return the version without its material."""
        return ReceiptVersionDescription(self.version_id, self.created, self.staged, encode_base64(self.public_key))


@dataclass
class ReceiptKeyEntry:
    """One receipt key. A keyring has at most one for each key spec."""

    key_id: str
    key_spec: str
    primary: str
    versions: list[ReceiptVersionEntry]

    def describe(self) -> ReceiptKeyDescription:
        """Return the key without its material."""
        versions = tuple(version.describe() for version in self.versions)
        return ReceiptKeyDescription(self.key_id, self.key_spec, self.primary, versions)

    def to_json(self) -> dict[str, Any]:
        """Return the key as a JSON object, which contains key material."""
        fields = self.describe().to_json()
        for version, version_fields in zip(self.versions, fields["KeyVersions"], strict=True):
            version_fields["Material"] = encode_base64(version.material)
        return fields

    @classmethod
    def from_json(cls, reader: ObjectReader) -> "ReceiptKeyEntry":
        """Read and check a key. Raises `KeyringError`, which does not quote key material."""
        key = cls(
            key_id=reader.uuid("KeyId"),
            key_spec=reader.one_of("KeySpec", RECEIPT_KEY_SPECS),
            primary=reader.string("PrimaryKeyVersion"),
            versions=[_version(version) for version in reader.objects("KeyVersions")],
        )
        reader.done()
        if key.primary not in {version.version_id for version in key.versions if not version.staged}:
            raise KeyringError(f"{reader.path}: PrimaryKeyVersion is not a version of the key, or is staged")
        return key


def _version(reader: ObjectReader) -> ReceiptVersionEntry:
    version = ReceiptVersionEntry(
        version_id=reader.uuid("KeyVersionId"),
        created=reader.date("CreationDate"),
        public_key=bytes(reader.base64("PublicKey", range(1, _MAX_PUBLIC_KEY_BYTES + 1))),
        material=reader.base64("Material", range(RECEIPT_MATERIAL_BYTES, RECEIPT_MATERIAL_BYTES + 1)),
        staged=reader.boolean("Staged"),
    )
    reader.done()
    return version
