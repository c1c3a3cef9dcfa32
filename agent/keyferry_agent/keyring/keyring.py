"""The daemon's keyring: plain data about keys, and their material in secret memory, which is only lent.

A keyring is immutable; a reload makes a new keyring. States and dates are evaluated when a key is used, so that a key past its
deletion date is unusable at once, without a reload.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from keyferry.secret import Backing, Secret, SecretMemory, fill_random

from ..crypto.ciphertext_blob import KEY_SIZES
from .access_keys import SECRET_LENGTH, new_secret
from .description import (
    RECEIPT_MATERIAL_BYTES,
    AccessKeyDescription,
    KeyDescription,
    KeyringDescription,
    ReceiptKeyDescription,
    VersionDescription,
)
from .document import new_id, now

__all__ = [
    "DEVELOPMENT_ALIASES",
    "KEPT",
    "AccessKey",
    "Key",
    "KeyVersion",
    "Keyring",
    "ReceiptKey",
    "build_keyring",
    "development_keyring",
    "required_bytes",
    "sealed_keyring",
]

CHECK_SIZE: Final = 32
"""Bytes after the key material that hold its digest (`fdstore`)."""
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

    def describe(self) -> VersionDescription:
        """Return the version without its material."""
        return VersionDescription(self.version_id, self.created, self.staged, self.disabled)


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

    def describe(self) -> KeyDescription:
        """Return the key without its material."""
        return KeyDescription(
            key_id=self.key_id,
            key_spec=self.key_spec,
            created=self.created,
            primary=self.primary.version_id,
            versions=tuple(version.describe() for version in self.versions.values()),
            aliases=self.aliases,
            state=self.stored_state,
            description=self.description,
            origin=self.origin,
            delete_date=self.delete_date,
        )

    def enabled(self) -> bool:
        """Return True if the key's current state is Enabled."""
        return self.state() == "Enabled"


@dataclass(frozen=True, slots=True)
class AccessKey:
    """One access key of a gateway. An `&` follows the secret. `token` is None for an access key without one."""

    description: AccessKeyDescription
    secret: Secret = field(repr=False)
    token: Secret | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class ReceiptKey:
    """One receipt key. `materials` has the material of each version: an Ed25519 seed, or an SM2 private scalar."""

    description: ReceiptKeyDescription
    materials: Mapping[str, Secret] = field(repr=False)


class Keyring:
    """All keys, with look-ups by ID, alias or version. Owns the secret memory of their material."""

    def __init__(
        self,
        keys: Iterable[Key],
        memory: SecretMemory,
        check: Secret,
        access_keys: Iterable[AccessKey] = (),
        receipt_keys: Iterable[ReceiptKey] = (),
    ) -> None:
        self.keys = {key.key_id: key for key in keys}
        self.access_keys = {access_key.description.access_key_id: access_key for access_key in access_keys}
        self.receipt_keys = {key.description.key_id: key for key in receipt_keys}
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

    def describe(self) -> KeyringDescription:
        """Return all keys without their material."""
        return KeyringDescription(
            tuple(key.describe() for key in self.keys.values()),
            tuple(access_key.description for access_key in self.access_keys.values()),
            tuple(key.description for key in self.receipt_keys.values()),
        )

    def material(self) -> Iterator[Secret]:
        """Yield all pieces of material, in the order of `KeyringDescription.material_sizes`."""
        for key in self.keys.values():
            yield from (version.material for version in key.versions.values())
        for access_key in self.access_keys.values():
            yield from [access_key.secret, access_key.token] if access_key.token else [access_key.secret]
        for receipt_key in self.receipt_keys.values():
            yield from receipt_key.materials.values()

    def __repr__(self) -> str:
        return f"Keyring({len(self.keys)} keys)"


def required_bytes(description: KeyringDescription) -> int:
    """Return the bytes of memory for the material of these keys, and for the digest of 32 bytes after it (`fdstore`)."""
    return CHECK_SIZE + description.allocated_bytes


def build_keyring(description: KeyringDescription, fill: Callable[[memoryview], None], memory: SecretMemory) -> Keyring:
    """Return a keyring with these keys. `fill` writes each piece of material, in the order of the description.

    `memory` is fresh, and has the size that `required_bytes` returns.
    """

    def filled(size: int) -> Secret:
        material = memory.allocate(size)
        with material.lend() as view:
            fill(view)
        return material

    keys = []
    for key in description.keys:
        versions = {
            version.version_id: KeyVersion(*version, filled(KEY_SIZES[key.key_spec])) for version in key.versions
        }
        keys.append(
            Key(
                key_id=key.key_id,
                key_spec=key.key_spec,
                description=key.description,
                origin=key.origin,
                created=key.created,
                delete_date=key.delete_date,
                stored_state=key.state,
                primary=versions[key.primary],
                versions=versions,
                aliases=key.aliases,
            )
        )
    access_keys = []
    for access_key in description.access_keys:
        secret, *token = [filled(size) for size in access_key.material_sizes]
        access_keys.append(AccessKey(access_key, secret, token[0] if token else None))
    receipt_keys = [
        ReceiptKey(
            receipt_key, {version.version_id: filled(RECEIPT_MATERIAL_BYTES) for version in receipt_key.versions}
        )
        for receipt_key in description.receipt_keys
    ]
    return Keyring(keys, memory, memory.allocate(CHECK_SIZE), access_keys, receipt_keys)


def development_keyring(
    *, backing: Backing, require: bool, aliases: Mapping[str, str] | None = None, access_key_id: str = ""
) -> Keyring:
    """Return the keyring of `--dev`: fresh keys that are not stored anywhere.

    `aliases`: further aliases and their key specs, besides `DEVELOPMENT_ALIASES`. `access_key_id`: the ID of an access key with
    a fresh secret; without it, the keyring has no access key.
    """
    keys = []
    fillers: list[Callable[[memoryview], None]] = []
    for alias, key_spec in {**DEVELOPMENT_ALIASES, **(aliases or {})}.items():
        version = VersionDescription(new_id(), now())
        description = "made for development; gone when the agent stops"
        keys.append(
            KeyDescription(
                new_id(), key_spec, version.created, version.version_id, (version,), (alias,), description=description
            )
        )
        fillers.append(fill_random)
    access_keys = []
    if access_key_id:
        access_keys.append(AccessKeyDescription(access_key_id, now(), True, "", SECRET_LENGTH, 0))
        fillers.append(_fill_secret)
    content = KeyringDescription(tuple(keys), tuple(access_keys))
    memory = SecretMemory(required_bytes(content), backing=backing, require=require)

    def fill(view: memoryview) -> None:
        fillers.pop(0)(view)

    keyring = build_keyring(content, fill, memory)
    keyring.source = DEVELOPMENT
    return keyring


def _fill_secret(view: memoryview) -> None:
    """Write the secret of a new access key, with an `&` after it."""
    view[:] = new_secret() + b"&"


def sealed_keyring(*, backing: Backing, require: bool) -> Keyring:
    """Return the keyring of an agent that is sealed: it has no keys, and was never loaded."""
    empty = KeyringDescription()
    keyring = build_keyring(empty, fill_random, SecretMemory(required_bytes(empty), backing=backing, require=require))
    keyring.loaded_at, keyring.source = "", NOWHERE
    return keyring
