"""`KeyringDescription`: all data of a keyring's keys but their material, as objects and as JSON.

The loader writes descriptions to the agent, the service manager stores them over a restart, and the sealed document has them
with the material in between. JSON names are those of the keyring's document (docs/keyring.md).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

from ..crypto.ciphertext_blob import KEY_SIZES

__all__ = [
    "RECEIPT_MATERIAL_BYTES",
    "AccessKeyDescription",
    "KeyDescription",
    "KeyringDescription",
    "ReceiptKeyDescription",
    "ReceiptVersionDescription",
    "VersionDescription",
]

_ALIGNMENT = 16
"""Secret memory rounds the size of each piece of material up to a multiple of so many bytes."""
RECEIPT_MATERIAL_BYTES = 32
"""Bytes of an Ed25519 seed (RFC 8032), and of an SM2 private scalar (GB/T 32918)."""


class VersionDescription(NamedTuple):
    """One version of a key. Dates are UTC in ISO 8601, to the second."""

    version_id: str
    created: str
    staged: bool = False
    disabled: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the version as a JSON object.

        Only a disabled version has `Disabled`: a program that does not know the field refuses it, and so does not decrypt.
        """
        fields = {"KeyVersionId": self.version_id, "CreationDate": self.created, "Staged": self.staged}
        return {**fields, "Disabled": True} if self.disabled else fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the version in a JSON object that `to_json` returned. Raises KeyError and TypeError."""
        return cls(fields["KeyVersionId"], fields["CreationDate"], fields["Staged"], fields.get("Disabled", False))


class KeyDescription(NamedTuple):
    """One master key. `primary` is the ID of a version; `delete_date` is empty unless the key's deletion is scheduled."""

    key_id: str
    key_spec: str
    created: str
    primary: str
    versions: tuple[VersionDescription, ...]
    aliases: tuple[str, ...] = ()
    state: str = "Enabled"
    description: str = ""
    origin: str = "Aliyun_KMS"
    delete_date: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the key as a JSON object."""
        return {
            "KeyId": self.key_id,
            "KeySpec": self.key_spec,
            "KeyState": self.state,
            "Description": self.description,
            "Origin": self.origin,
            "CreationDate": self.created,
            "DeleteDate": self.delete_date,
            "PrimaryKeyVersion": self.primary,
            "KeyVersions": [version.to_json() for version in self.versions],
            "Aliases": list(self.aliases),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the key in a JSON object that `to_json` returned. Raises KeyError and TypeError."""
        return cls(
            key_id=fields["KeyId"],
            key_spec=fields["KeySpec"],
            created=fields["CreationDate"],
            primary=fields["PrimaryKeyVersion"],
            versions=tuple(VersionDescription.from_json(version) for version in fields["KeyVersions"]),
            aliases=tuple(fields["Aliases"]),
            state=fields["KeyState"],
            description=fields["Description"],
            origin=fields["Origin"],
            delete_date=fields["DeleteDate"],
        )


class AccessKeyDescription(NamedTuple):
    """One access key of a gateway. `secret_bytes` and `token_bytes`: the sizes of its secret and its token, which may be 0."""

    access_key_id: str
    created: str
    enabled: bool
    description: str
    secret_bytes: int
    token_bytes: int

    @property
    def material_sizes(self) -> list[int]:
        """The bytes of each piece of material: the secret with an `&` after it, and the token if there is one."""
        return [self.secret_bytes + 1, self.token_bytes] if self.token_bytes else [self.secret_bytes + 1]


class ReceiptVersionDescription(NamedTuple):
    """One version of a receipt key. `public_key`: Base64 of its DER SubjectPublicKeyInfo."""

    version_id: str
    created: str
    staged: bool
    public_key: str

    def to_json(self) -> dict[str, Any]:
        """Return the version as a JSON object."""
        return {
            "KeyVersionId": self.version_id,
            "CreationDate": self.created,
            "Staged": self.staged,
            "PublicKey": self.public_key,
        }


class ReceiptKeyDescription(NamedTuple):
    """One receipt key. `primary` is the ID of the version that signs."""

    key_id: str
    key_spec: str
    primary: str
    versions: tuple[ReceiptVersionDescription, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the key as a JSON object."""
        return {
            "KeyId": self.key_id,
            "KeySpec": self.key_spec,
            "PrimaryKeyVersion": self.primary,
            "KeyVersions": [version.to_json() for version in self.versions],
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the key in a JSON object that `to_json` returned. Raises KeyError and TypeError."""
        versions = tuple(
            ReceiptVersionDescription(
                version["KeyVersionId"], version["CreationDate"], version["Staged"], version["PublicKey"]
            )
            for version in fields["KeyVersions"]
        )
        return cls(fields["KeyId"], fields["KeySpec"], fields["PrimaryKeyVersion"], versions)


class KeyringDescription(NamedTuple):
    """Master keys, access keys and receipt keys of a keyring."""

    keys: tuple[KeyDescription, ...] = ()
    access_keys: tuple[AccessKeyDescription, ...] = ()
    receipt_keys: tuple[ReceiptKeyDescription, ...] = ()

    def material_sizes(self) -> Iterator[int]:
        """Yield the bytes of each piece of material: of each version, access key and receipt key, in order."""
        for key in self.keys:
            yield from [KEY_SIZES[key.key_spec]] * len(key.versions)
        for access_key in self.access_keys:
            yield from access_key.material_sizes
        for receipt_key in self.receipt_keys:
            yield from [RECEIPT_MATERIAL_BYTES] * len(receipt_key.versions)

    @property
    def allocated_bytes(self) -> int:
        """The bytes of secret memory for all pieces of material."""
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in self.material_sizes())

    def sections(self) -> dict[str, Any]:
        """Return everything but the master keys as a JSON object."""
        return {
            "AccessKeys": [list(access_key) for access_key in self.access_keys],
            "ReceiptKeys": [key.to_json() for key in self.receipt_keys],
        }

    @classmethod
    def from_json(cls, keys: Iterator[Mapping[str, Any]], sections: Mapping[str, Any]) -> Self:
        """Return the description of keys, and of the object that `sections` returned. Raises KeyError and TypeError."""
        return cls(
            tuple(KeyDescription.from_json(fields) for fields in keys),
            tuple(AccessKeyDescription(*fields) for fields in sections["AccessKeys"]),
            tuple(ReceiptKeyDescription.from_json(fields) for fields in sections["ReceiptKeys"]),
        )
