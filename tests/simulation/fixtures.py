"""The fixtures of every simulated agent: the same few master keys, in keyrings and configurations in sequence.

All of them are constants, so the seed alone decides a simulation. Only the recipients' key pairs are fresh in each
process: no event depends on their values.
"""

import functools
import random
from collections.abc import Mapping
from typing import Final, NamedTuple

from reference.blob_decoder import seal_blob
from support.keys import Recipient, recipient

from keyferry_agent.crypto.public_key import fingerprint
from keyferry_agent.keyring.description import KeyDescription, VersionDescription

__all__ = [
    "CONFIGURATIONS",
    "CONTEXTS",
    "RINGS",
    "Blob",
    "Grant",
    "MasterKey",
    "Ring",
    "RingKey",
    "Version",
    "blobs",
    "described",
    "key_of_version",
    "pin",
    "recipients",
]

EPOCH: Final = 1_769_860_800
"""When every simulation begins, in seconds since 1970: 2026-01-31T12:00:00Z."""
DELETED_AFTER: Final = 6
"""Seconds after the beginning, the deletion date of alias/going."""
MADE: Final = "2026-01-01T00:00:00Z"
CONTEXTS: Final[tuple[dict[str, str], ...]] = ({}, {"tenant": "acme"}, {"tenant": "acme", "purpose": "\u5bc6\u94a5"})

_random: Final = random.Random(20260131)


class Version(NamedTuple):
    """One version of a master key."""

    version_id: str
    material: bytes


class MasterKey(NamedTuple):
    """A master key, with all versions that it will ever have."""

    key_id: str
    spec: str
    versions: tuple[Version, ...]


class RingKey(NamedTuple):
    """A master key as one keyring has it. `primary` and `versions` count in the key's own."""

    key: MasterKey
    aliases: tuple[str, ...]
    state: str = "Enabled"
    versions: int = 1
    delete_date: str = ""

    @property
    def primary(self) -> Version:
        """The version that encrypts: the newest one, here."""
        return self.key.versions[self.versions - 1]


Ring = tuple[RingKey, ...]


def _id() -> str:
    digits = _random.randbytes(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8{digits[17:20]}-{digits[20:]}"


def _key(spec: str, versions: int) -> MasterKey:
    size = 16 if spec == "Aliyun_SM4" else 32
    return MasterKey(_id(), spec, tuple(Version(_id(), _random.randbytes(size)) for _ in range(versions)))


ORDERS, PAY, OFF = _key("Aliyun_AES_256", 3), _key("Aliyun_SM4", 1), _key("Aliyun_AES_256", 1)
GOING, STRANGE = _key("Aliyun_AES_256", 1), _key("Aliyun_AES_256", 1)
_DATE: Final = "2026-01-31T12:00:06Z"
_GOING: Final = RingKey(GOING, ("alias/going",), "PendingDeletion", delete_date=_DATE)

RINGS: Final[tuple[Ring, ...]] = (
    (
        RingKey(ORDERS, ("alias/orders",)),
        RingKey(PAY, ("alias/pay",)),
        RingKey(OFF, ("alias/off",), "Disabled"),
        _GOING,
    ),
    (
        RingKey(ORDERS, ("alias/orders",), versions=2),
        RingKey(PAY, ("alias/pay",)),
        RingKey(OFF, ("alias/off",)),
        _GOING,
    ),
    (
        RingKey(ORDERS, (), versions=2),
        RingKey(PAY, ("alias/pay", "alias/orders"), "Disabled"),
        RingKey(OFF, ("alias/off",)),
    ),
)


class Grant(NamedTuple):
    """A grant of a configuration. `keys` are aliases, or `*`."""

    name: str
    uid: int
    actions: tuple[str, ...]
    keys: tuple[str, ...] = ("*",)
    recipients: tuple[str, ...] = ()
    context: Mapping[str, str] = {}


@functools.cache
def recipients() -> dict[str, Recipient]:
    """Modules, by their WrappingAlgorithm."""
    return {name: recipient(name) for name in ("RSAES_OAEP_SHA_256", "RSAES_OAEP_SHA_1", "SM2PKE")}


def pin(algorithm: str) -> str:
    """The pin of a recipient's public key."""
    return fingerprint(recipients()[algorithm].der)


APP, ADMIN, PINNED, TENANT, LATER, NOBODY = range(1001, 1007)
USERS: Final = (APP, ADMIN, PINNED, TENANT, LATER, NOBODY)
_EXPORT: Final = ("GenerateAndExportDataKey", "ExportDataKey")

# Of a grant's recipients, the algorithm stands for the pin of its key.
CONFIGURATIONS: Final[tuple[tuple[Grant, ...], ...]] = (
    (
        Grant("app", APP, (*_EXPORT, "Encrypt", "Decrypt", "DescribeKey", "ListKeys"), ("alias/orders",)),
        Grant("admin", ADMIN, ("*",)),
        Grant(
            "pinned",
            PINNED,
            (*_EXPORT, "Encrypt", "Decrypt", "GenerateDataKey"),
            ("alias/orders",),
            ("RSAES_OAEP_SHA_256",),
        ),
        Grant("tenant", TENANT, ("Encrypt", "Decrypt", "ReEncrypt*"), context={"tenant": "acme"}),
    ),
    (
        Grant("app", APP, (*_EXPORT, "Encrypt", "DescribeKey"), ("alias/orders",)),
        Grant("admin", ADMIN, ("*",), ("alias/o*",)),
        Grant("pinned", PINNED, (*_EXPORT,), ("alias/orders",), ("SM2PKE",)),
        Grant("later", LATER, ("Generate*", "ListAliases"), ("alias/pay", "alias/off")),
    ),
)


def described(ring: Ring) -> list[KeyDescription]:
    """Return the keys of a keyring as its loader describes them."""
    return [
        KeyDescription(
            key_id=entry.key.key_id,
            key_spec=entry.key.spec,
            created=MADE,
            primary=entry.primary.version_id,
            versions=tuple(
                VersionDescription(version.version_id, MADE) for version in entry.key.versions[: entry.versions]
            ),
            aliases=tuple(entry.aliases),
            state=entry.state,
            delete_date=entry.delete_date,
        )
        for entry in ring
    ]


def toml(grants: tuple[Grant, ...]) -> str:
    """Return grants in the form of a configuration."""
    text = ""
    for grant in grants:
        text += f'[[grant]]\nname = "{grant.name}"\nto = {{ uid = {grant.uid} }}\n'
        text += f"actions = {[f'kms:{action}' for action in grant.actions]}\nkeys = {list(grant.keys)}\n"
        if grant.recipients:
            text += f"recipients = {[pin(algorithm) for algorithm in grant.recipients]}\n"
        if grant.context:
            text += "".join(f'encryption_context.{key} = "{value}"\n' for key, value in grant.context.items())
    return text


class Blob(NamedTuple):
    """A CiphertextBlob that a client kept from earlier. `opens`: whether it is whole."""

    key: MasterKey
    version: Version
    context: Mapping[str, str]
    plaintext: bytes
    blob: bytes
    opens: bool = True


def key_of_version(version_id: str) -> tuple[MasterKey, Version]:
    """The master key that a version is of."""
    return next(
        (key, version)
        for key in (ORDERS, PAY, OFF, GOING, STRANGE)
        for version in key.versions
        if version.version_id == version_id
    )


@functools.cache
def blobs() -> tuple[Blob, ...]:
    """Some for each version, under each context; of a key that no keyring has; and one that is damaged."""
    made = []
    for key in (ORDERS, PAY, OFF, GOING, STRANGE):
        for version in key.versions:
            for context in CONTEXTS[:2]:
                plaintext = _random.randbytes(32)
                salt = _random.randbytes(32)
                blob = seal_blob(key.spec, version.material, version.version_id, key.key_id, context, plaintext, salt)
                made.append(Blob(key, version, context, plaintext, blob))
    whole = made[0]
    damaged = whole.blob[:-1] + bytes([whole.blob[-1] ^ 1])
    return (*made, whole._replace(blob=damaged, opens=False))
