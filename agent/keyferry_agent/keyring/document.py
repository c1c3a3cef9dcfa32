"""The content of a keyring file: its JSON, strictly checked. docs/keyring.md is the specification.

The names are the API's. `Material` is Base64 of the raw key, so that in an emergency, an operator with `age` and the right
identity can read everything without this program.
"""

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from keyferry.parameters import decode_base64, encode_base64, unique_pairs

from ..crypto.ciphertext_blob import KEY_SIZES
from .description import KeyDescription, VersionDescription

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
VERSION: Final = 1
STATES: Final = ("Enabled", "Disabled", "PendingDeletion", "PendingImport")
ORIGINS: Final = ("Aliyun_KMS", "EXTERNAL")
ALIAS: Final = "alias/"
_MAX_ALIAS_LENGTH: Final = 255
_RESERVED: Final = "acs"
_MAX_DESCRIPTION_LENGTH: Final = 8_192
_MAX_SHOWN: Final = 24
"""Most unknown fields that a message names, and most characters of each."""
_DATE: Final = "%Y-%m-%dT%H:%M:%SZ"


class KeyringError(Exception):
    """The keyring cannot be read, is not valid, or does not allow the change. The message is for the operator."""


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
    reveal them, and every change seals the keyring again.
    """

    recipients: list[str]
    keys: list[KeyEntry] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)

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

    def describe(self) -> list[KeyDescription]:
        """Return all keys without their material."""
        aliases = self.aliases_by_key()
        return [key.describe(aliases.get(key.key_id, ())) for key in self.keys]

    def purge(self) -> None:
        """Remove the keys whose deletion date has come, and their aliases."""
        date = now()
        expired_ids = {key.key_id for key in self.keys if key.delete_date and key.delete_date <= date}
        if expired_ids:
            self.keys = [key for key in self.keys if key.key_id not in expired_ids]
            self.aliases = {alias: owner for alias, owner in self.aliases.items() if owner not in expired_ids}

    def to_json(self) -> bytes:
        """Return the document as JSON, which contains key material."""
        return json.dumps(
            {
                "Format": FORMAT,
                "Version": VERSION,
                "Recipients": self.recipients,
                "Keys": [_to_json(key) for key in self.keys],
                "Aliases": self.aliases,
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
        if type(version) is not int or version != VERSION:  # to Python, true and 1.0 are 1
            version_text = (
                f"format version {version}" if type(version) is int else "a format version that is not a number"
            )
            raise KeyringError(f"the keyring has {version_text}; this program knows version {VERSION}: upgrade it")
        reader = _Reader("keyring", raw)
        document = cls(recipients=reader.strings("Recipients"), keys=[_key(entry) for entry in reader.objects("Keys")])
        document.aliases = reader.mapping("Aliases")
        reader.done("Format", "Version")
        document._check()
        return document

    def _check(self) -> None:
        ids = [key.key_id for key in self.keys]
        versions = [version.version_id for key in self.keys for version in key.versions]
        for name, values in (("KeyId", ids), ("KeyVersionId", versions)):
            if len(set(values)) != len(values):
                raise KeyringError(f"keyring: the same {name} twice")
        key_ids = set(ids)
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


def _key(reader: "_Reader") -> KeyEntry:
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


def _version(reader: "_Reader", size: int) -> VersionEntry:
    material = reader.string("Material")
    try:
        key_bytes = bytearray(decode_base64(material))
    except ValueError:
        key_bytes = bytearray()
    if len(key_bytes) != size:
        raise KeyringError(f"{reader.path}.Material: not the Base64 of {size} bytes")
    version = VersionEntry(
        version_id=reader.uuid("KeyVersionId"),
        created=reader.date("CreationDate"),
        staged=reader.boolean("Staged"),
        material=key_bytes,
        disabled=reader.boolean("Disabled", default=False),
    )
    reader.done()
    return version


class _Reader:
    """Reads the fields of one JSON object by name and type; `done` refuses fields that were not read."""

    def __init__(self, path: str, raw: Any) -> None:
        if not isinstance(raw, dict):
            raise KeyringError(f"{path}: an object is expected")
        self.path = path
        self._raw = raw
        self._taken: set[str] = set()

    def _take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        self._taken.add(name)
        value = self._raw.get(name, default)
        if not isinstance(value, kind):
            raise KeyringError(f"{self.path}.{name}: missing, or of the wrong type")
        return value

    def string(self, name: str) -> str:
        value: str = self._take(name, str)
        return value

    def boolean(self, name: str, *, default: bool | None = None) -> bool:
        value: bool = self._take(name, bool, default)
        return value

    def strings(self, name: str) -> list[str]:
        values: list[str] = self._take(name, list)
        if not all(isinstance(value, str) for value in values):
            raise KeyringError(f"{self.path}.{name}: strings are expected")
        return values

    def mapping(self, name: str) -> dict[str, str]:
        values: dict[str, str] = self._take(name, dict)
        if not all(isinstance(value, str) for value in values.values()):
            raise KeyringError(f"{self.path}.{name}: strings are expected")
        return values

    def objects(self, name: str) -> list["_Reader"]:
        return [_Reader(f"{self.path}.{name}[{i}]", entry) for i, entry in enumerate(self._take(name, list))]

    def one_of(self, name: str, values: tuple[str, ...]) -> str:
        value = self.string(name)
        if value not in values:
            raise KeyringError(f"{self.path}.{name}: one of {', '.join(values)} is expected")
        return value

    def uuid(self, name: str) -> str:
        value = self.string(name)
        try:
            if str(uuid.UUID(value)) == value:
                return value
        except ValueError:
            pass
        raise KeyringError(f"{self.path}.{name}: a lower-case UUID is expected")

    def date(self, name: str, *, may_be_empty: bool = False) -> str:
        value = self.string(name)
        try:
            if not (may_be_empty and not value) and datetime.strptime(value, _DATE).strftime(_DATE) != value:  # noqa: DTZ007
                raise ValueError  # strptime also accepts 2026-1-1
        except ValueError:
            raise KeyringError(f"{self.path}.{name}: a date like 2026-01-31T12:00:00Z is expected") from None
        return value

    def done(self, *extra_names: str) -> None:
        unknown_names = self._raw.keys() - self._taken - set(extra_names)
        if unknown_names:
            names = sorted(name[:_MAX_SHOWN] for name in unknown_names)[:_MAX_SHOWN]
            raise KeyringError(f"{self.path}: unknown fields {names}: written by a newer program?")


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


def check_description(description: str) -> None:
    """Raise `KeyringError` unless a description has at most 8,192 characters, all of them printable."""
    if len(description) > _MAX_DESCRIPTION_LENGTH or not description.isprintable():
        raise KeyringError(f"a description has at most {_MAX_DESCRIPTION_LENGTH} characters, all of them printable")


def new_id() -> str:
    """Return a fresh ID for a key or a version: a random UUID of 36 characters."""
    return str(uuid.uuid4())


def now() -> str:
    """Return the current time in the format of documents."""
    return iso(datetime.now(UTC))


def iso(moment: datetime) -> str:
    """Return a time in UTC in the format of documents. Texts in this format sort in the order of time."""
    return moment.strftime(_DATE)
