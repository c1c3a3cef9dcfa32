"""The daemon's keyring: plain data about keys, and their material in secret memory, which is only lent.

A keyring is immutable; a reload makes a new keyring. States and dates are evaluated when a key is used, so that a key past its
deletion date is unusable at once, without a reload.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from keyferry.secret import Backing, Secret, SecretMemory, fill_random

from ..crypto.ciphertext_blob import KEY_SIZES
from .document import new_id, now

__all__ = [
    "CHECK",
    "DEVELOPMENT_ALIASES",
    "KEPT",
    "Key",
    "KeyVersion",
    "Keyring",
    "build",
    "development_keyring",
    "room_for",
    "sealed_keyring",
]

CHECK: Final = 32
DEVELOPMENT_ALIASES: Final = {"alias/dev": "Aliyun_AES_256", "alias/dev-sm4": "Aliyun_SM4"}
"""The keys of every agent with `--dev`, and their key specs."""
FILE: Final = "File"
KEPT: Final = "Kept"
DEVELOPMENT: Final = "Development"
NOWHERE: Final = "None"
"""The source of a keyring: its file, the service manager, `--dev`, or none yet."""


@dataclass(frozen=True, slots=True)
class KeyVersion:
    """One version of a key. `material` is lent, never read."""

    version_id: str
    created: str
    staged: bool
    disabled: bool
    material: Secret = field(repr=False)


@dataclass(frozen=True, slots=True)
class Key:
    """One master key: its metadata, its versions and its aliases."""

    key_id: str
    key_spec: str
    description: str
    origin: str
    created: str
    delete_date: str
    stored_state: str
    primary: KeyVersion
    versions: Mapping[str, KeyVersion]
    aliases: tuple[str, ...]

    def state(self) -> str:
        """Return the key's current state, with DescribeKey's names; "Deleted" past its deletion date."""
        if self.delete_date and datetime.now(UTC) >= datetime.fromisoformat(self.delete_date):
            return "Deleted"
        return self.stored_state

    def enabled(self) -> bool:
        """Return True if the key's current state is Enabled."""
        return self.state() == "Enabled"


class Keyring:
    """All keys, with look-ups by ID, alias or version. Owns the secret memory of their material."""

    def __init__(self, keys: Iterable[Key], memory: SecretMemory, check: Secret) -> None:
        self.keys = {key.key_id: key for key in keys}
        self.by_alias = {alias: key for key in self.keys.values() for alias in key.aliases}
        self.by_version = {
            version.version_id: (key, version) for key in self.keys.values() for version in key.versions.values()
        }
        self.memory = memory
        self.check = check
        """32 bytes after the key material, for its digest: `fdstore` verifies stored memory by them."""
        self.loaded_at = now()
        self.source = FILE
        self._dated = [key for key in self.keys.values() if key.delete_date]

    @property
    def is_sealed(self) -> bool:
        """Return True if this object stands for a keyring that has not been opened yet."""
        return self.source == NOWHERE

    @property
    def loaded_timestamp(self) -> float:
        """Return the time of the load, in seconds since 1970; 0 if no keyring was loaded."""
        return datetime.fromisoformat(self.loaded_at).timestamp() if self.loaded_at else 0.0

    def gone(self) -> set[str]:
        """Return the IDs of the loaded keys whose deletion date has come."""
        return {key.key_id for key in self._dated if key.state() == "Deleted"}

    def __repr__(self) -> str:
        return f"Keyring({len(self.keys)} keys)"


def room_for(description: list[dict[str, Any]]) -> int:
    """Return the bytes of memory for the material of all versions, and for the digest of 32 bytes after it (`fdstore`)."""
    return CHECK + sum(-(-KEY_SIZES[key["KeySpec"]] // 16) * 16 * len(key["KeyVersions"]) for key in description)


def build(description: list[dict[str, Any]], fill: Callable[[memoryview], None], memory: SecretMemory) -> Keyring:
    """Return a keyring made from a description (`loader.describe`). `fill` writes each version's material, in order.

    `memory` is fresh, and has the size that `room_for` returns.
    """
    keys = []
    for key in description:
        versions = {}
        for version in key["KeyVersions"]:
            material = memory.allocate(KEY_SIZES[key["KeySpec"]])
            with material.lend() as view:
                fill(view)
            version_id = version["KeyVersionId"]
            disabled = version.get("Disabled", False)
            versions[version_id] = KeyVersion(
                version_id, version["CreationDate"], version["Staged"], disabled, material
            )
        keys.append(
            Key(
                key_id=key["KeyId"],
                key_spec=key["KeySpec"],
                description=key["Description"],
                origin=key["Origin"],
                created=key["CreationDate"],
                delete_date=key["DeleteDate"],
                stored_state=key["KeyState"],
                primary=versions[key["PrimaryKeyVersion"]],
                versions=versions,
                aliases=tuple(key["Aliases"]),
            )
        )
    return Keyring(keys, memory, memory.allocate(CHECK))


def development_keyring(*, backing: Backing, require: bool, aliases: Mapping[str, str] | None = None) -> Keyring:
    """Return the keyring of `--dev`: fresh keys that are not stored anywhere.

    `aliases`: further aliases and their key specs, besides `DEVELOPMENT_ALIASES`.
    """
    description = []
    for alias, key_spec in {**DEVELOPMENT_ALIASES, **(aliases or {})}.items():
        version = {"KeyVersionId": new_id(), "CreationDate": now(), "Staged": False}
        description.append(
            {
                "KeyId": new_id(),
                "KeySpec": key_spec,
                "Description": "made for development; gone when the agent stops",
                "Origin": "Aliyun_KMS",
                "CreationDate": version["CreationDate"],
                "DeleteDate": "",
                "KeyState": "Enabled",
                "PrimaryKeyVersion": version["KeyVersionId"],
                "KeyVersions": [version],
                "Aliases": [alias],
            }
        )
    keyring = build(description, fill_random, SecretMemory(room_for(description), backing=backing, require=require))
    keyring.source = DEVELOPMENT
    return keyring


def sealed_keyring(*, backing: Backing, require: bool) -> Keyring:
    """Return the keyring of an agent that is sealed: it has no keys, and was never loaded."""
    keyring = build([], fill_random, SecretMemory(room_for([]), backing=backing, require=require))
    keyring.loaded_at, keyring.source = "", NOWHERE
    return keyring
