"""The content of a keyring file: its JSON, strictly checked. docs/keyring.md is the specification.

The names are the API's. `Material` is Base64 of the raw key, so that in an emergency, an operator with `age` and the right
identity can read everything without this program.
"""

import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from keyferry.parameters import encode_base64, unique_pairs

from ..crypto.ciphertext_blob import KEY_SIZES
from .access_keys import AccessKeyEntry
from .description import KeyDescription, KeyringDescription, VersionDescription
from .reading import DATE_FORMAT, KeyringError, ObjectReader, check_description
from .receipt_keys import ReceiptKeyEntry

__all__ = [
    "ALIAS",
    "STATES",
    "Document",
    "KeyEntry",
    "KeyringError",
    "VersionEntry",
    "check_alias",
    "check_description",
    "iso",
    "new_id",
    "now",
]

FORMAT: Final = "keyferry-keyring"
VERSIONS: Final = (1, 2)
"""Versions of the format. Only version 2 has `Hosts`, `AccessKeys`, `ReceiptKeys` and sections that this program does not know.

A keyring without them is written as version 1, which earlier programs read.
"""
STATES: Final = ("Enabled", "Disabled", "PendingDeletion", "PendingImport")
ORIGINS: Final = ("Aliyun_KMS", "EXTERNAL")
ALIAS: Final = "alias/"
_MAX_ALIAS_LENGTH: Final = 255
_RESERVED: Final = "acs"


@dataclass
class VersionEntry:
    """One version of a key. A staged version can decrypt, but has never been primary. A disabled version cannot decrypt."""

    version_id: str
    created: str
    material: bytearray = field(repr=False)
    staged: bool = False
    disabled: bool = False


@dataclass
class KeyEntry:
    """One master key. Dates are UTC in ISO 8601, to the second."""

    key_id: str
    key_spec: str
    created: str
    versions: list[VersionEntry]
    primary: str
    state: str = "Enabled"
    description: str = ""
    origin: str = "Aliyun_KMS"
    delete_date: str = ""

    def describe(self, aliases: Iterable[str] = ()) -> KeyDescription:
        """Return the key without its material."""
        versions = tuple(
            VersionDescription(version.version_id, version.created, version.staged, version.disabled)
            for version in self.versions
        )
        return KeyDescription(
            key_id=self.key_id,
            key_spec=self.key_spec,
            created=self.created,
            primary=self.primary,
            versions=versions,
            aliases=tuple(aliases),
            state=self.state,
            description=self.description,
            origin=self.origin,
            delete_date=self.delete_date,
        )


@dataclass
class Document:
    """A whole keyring: keys in the order of their creation, and alias -> key ID.

    `recipients` is empty when the keyring is sealed to a passphrase. The document contains the recipients because age does not
    reveal them, and every change seals the keyring again. `hosts`: the recipient of each host of a fleet, by the host's name.
    `other_sections`: sections that this program does not know. They are kept as they are, and may contain secrets.
    """

    recipients: list[str]
    keys: list[KeyEntry] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    access_keys: list[AccessKeyEntry] = field(default_factory=list)
    receipt_keys: list[ReceiptKeyEntry] = field(default_factory=list)
    other_sections: dict[str, Any] = field(default_factory=dict, repr=False)

    def find(self, key_id: str) -> KeyEntry:
        """Return the key with this ID or alias. Raises `KeyringError`."""
        owner = self.aliases.get(key_id, key_id)
        for key in self.keys:
            if key.key_id == owner:
                return key
        raise KeyringError(f"the keyring has no key or alias {key_id!r}")

    def aliases_by_key(self) -> dict[str, list[str]]:
        """Return the sorted aliases of each key that has at least one."""
        by_key: dict[str, list[str]] = {}
        for alias, owner in sorted(self.aliases.items()):
            by_key.setdefault(owner, []).append(alias)
        return by_key

    def describe(self) -> KeyringDescription:
        """Return all that the daemon keeps of the document but the material."""
        aliases = self.aliases_by_key()
        return KeyringDescription(
            keys=tuple(key.describe(aliases.get(key.key_id, ())) for key in self.keys),
            access_keys=tuple(access_key.describe() for access_key in self.access_keys),
            receipt_keys=tuple(key.describe() for key in self.receipt_keys),
        )

    def material(self) -> Iterator[bytearray]:
        """Yield the secret bytes of all keys, in the order of `KeyringDescription.material_sizes`."""
        for key in self.keys:
            yield from (version.material for version in key.versions)
        for access_key in self.access_keys:
            yield from access_key.material
        for receipt_key in self.receipt_keys:
            yield from (version.material for version in receipt_key.versions)

    def purge(self) -> None:
        """Remove the keys whose deletion date has come, and their aliases."""
        date = now()
        expired_ids = {key.key_id for key in self.keys if key.delete_date and key.delete_date <= date}
        if expired_ids:
            self.keys = [key for key in self.keys if key.key_id not in expired_ids]
            self.aliases = {alias: owner for alias, owner in self.aliases.items() if owner not in expired_ids}

    def to_json(self) -> bytes:
        """Return the document as JSON, which contains key material."""
        sections = {
            "Hosts": self.hosts,
            "AccessKeys": [access_key.to_json() for access_key in self.access_keys],
            "ReceiptKeys": [key.to_json() for key in self.receipt_keys],
            **self.other_sections,
        }
        optional = {name: section for name, section in sections.items() if section or name in self.other_sections}
        return json.dumps(
            {
                "Format": FORMAT,
                "Version": 2 if optional else 1,
                "Recipients": self.recipients,
                "Keys": [_to_json(key) for key in self.keys],
                "Aliases": self.aliases,
                **optional,
            },
            indent=1,
        ).encode()

    @classmethod
    def from_json(cls, data: bytes | bytearray) -> "Document":
        """Decode and check a document. Raises `KeyringError`, which never quotes a value that could be key material."""
        try:
            raw = json.loads(data, object_pairs_hook=unique_pairs)
        except (ValueError, RecursionError):
            raise KeyringError("the keyring does not hold JSON") from None
        if not isinstance(raw, dict) or raw.get("Format") != FORMAT:
            raise KeyringError(f'the content is not a keyring: "Format" is not "{FORMAT}"')
        version = raw.get("Version")
        if type(version) is not int or version not in VERSIONS:  # to Python, true and 1.0 are 1
            version_text = (
                f"format version {version}" if type(version) is int else "a format version that is not a number"
            )
            raise KeyringError(f"the keyring has {version_text}; this program knows versions 1 and 2: upgrade it")
        reader = ObjectReader("keyring", raw)
        document = cls(recipients=reader.strings("Recipients"), keys=[_key(entry) for entry in reader.objects("Keys")])
        document.aliases = reader.mapping("Aliases")
        if version > 1:
            document.hosts = reader.mapping("Hosts", default={})
            document.access_keys = [
                AccessKeyEntry.from_json(entry) for entry in reader.objects("AccessKeys", default=[])
            ]
            document.receipt_keys = [
                ReceiptKeyEntry.from_json(entry) for entry in reader.objects("ReceiptKeys", default=[])
            ]
            document.other_sections = reader.unknown("Format", "Version")
        else:
            reader.done("Format", "Version")
        document._check()
        return document

    def _check(self) -> None:
        receipt_versions = [version.version_id for key in self.receipt_keys for version in key.versions]
        key_ids = {key.key_id for key in self.keys}
        for name, values in (
            ("KeyId", [key.key_id for key in self.keys] + [key.key_id for key in self.receipt_keys]),
            ("KeyVersionId", [version.version_id for key in self.keys for version in key.versions] + receipt_versions),
            ("AccessKeyId", [access_key.access_key_id for access_key in self.access_keys]),
            ("KeySpec of a receipt key", [key.key_spec for key in self.receipt_keys]),
        ):
            if len(set(values)) != len(values):
                raise KeyringError(f"keyring: the same {name} twice")
        for alias, owner in self.aliases.items():
            check_alias(alias)
            if owner not in key_ids:
                raise KeyringError(f"keyring: {alias} points to a key that is not there")


def _to_json(key: KeyEntry) -> dict[str, Any]:
    """Return a key with its material. The document has the aliases of all keys in one place."""
    fields = key.describe().to_json()
    del fields["Aliases"]
    for version, version_fields in zip(key.versions, fields["KeyVersions"], strict=True):
        version_fields["Material"] = encode_base64(version.material)
    return fields


def _key(reader: ObjectReader) -> KeyEntry:
    spec = reader.one_of("KeySpec", tuple(KEY_SIZES))
    key = KeyEntry(
        key_id=reader.uuid("KeyId"),
        key_spec=spec,
        state=reader.one_of("KeyState", STATES),
        description=reader.string("Description"),
        origin=reader.one_of("Origin", ORIGINS),
        created=reader.date("CreationDate"),
        delete_date=reader.date("DeleteDate", may_be_empty=True),
        primary=reader.string("PrimaryKeyVersion"),
        versions=[_version(entry, KEY_SIZES[spec]) for entry in reader.objects("KeyVersions")],
    )
    reader.done()
    check_description(key.description)
    if key.primary not in {version.version_id for version in key.versions if not (version.staged or version.disabled)}:
        raise KeyringError(f"{reader.path}: PrimaryKeyVersion is not a version of the key, or is staged or disabled")
    if (key.state == "PendingDeletion") != bool(key.delete_date):
        raise KeyringError(f"{reader.path}: DeleteDate and the state PendingDeletion go together")
    return key


def _version(reader: ObjectReader, size: int) -> VersionEntry:
    version = VersionEntry(
        version_id=reader.uuid("KeyVersionId"),
        created=reader.date("CreationDate"),
        staged=reader.boolean("Staged"),
        material=reader.base64("Material", range(size, size + 1)),
        disabled=reader.boolean("Disabled", default=False),
    )
    reader.done()
    return version


def check_alias(alias: str) -> None:
    """Raise `KeyringError` unless an alias is `alias/NAME`, with 1 to 255 letters, digits, `_`, `-` and `/` in NAME.

    The names `alias/acs...` are reserved for the cloud, and refused too.
    """
    name = alias.removeprefix(ALIAS)
    letters = name.replace("_", "").replace("-", "").replace("/", "")
    if (
        not alias.startswith(ALIAS)
        or not 1 <= len(name) <= _MAX_ALIAS_LENGTH
        or (letters and not (letters.isascii() and letters.isalnum()))
    ):
        raise KeyringError(f"{alias!r} is not an alias: expected alias/NAME, NAME of letters, digits, _ - and /")
    if name.startswith(_RESERVED):
        raise KeyringError(f"{alias!r}: names that begin with alias/acs are the cloud's own")


def new_id() -> str:
    """Return a fresh ID for a key or a version: a random UUID of 36 characters."""
    return str(uuid.uuid4())


def now() -> str:
    """Return the current time in the format of documents."""
    return iso(datetime.now(UTC))


def iso(moment: datetime) -> str:
    """Return a time in UTC in the format of documents. Texts in this format sort in the order of time."""
    return moment.strftime(DATE_FORMAT)
