"""`KeyDescription`: all data of a master key but its material, as objects and as JSON.

The loader writes descriptions to the agent, the service manager stores them over a restart, and the sealed document has them
with the material in between. JSON names are those of the keyring's document (docs/keyring.md).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from ..crypto.ciphertext_blob import KEY_SIZES

__all__ = ["KeyDescription", "VersionDescription"]

_ALIGNMENT = 16
"""Secret memory rounds the size of each piece of material up to a multiple of so many bytes."""


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

    @property
    def material_size(self) -> int:
        """The bytes of secret memory for the material of all versions."""
        return -(-KEY_SIZES[self.key_spec] // _ALIGNMENT) * _ALIGNMENT * len(self.versions)

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
