"""Access keys in a keyring's document: the credentials by which callers of a gateway sign their requests."""

import re
import secrets
import string
from dataclasses import dataclass, field
from typing import Any, Final

from .description import AccessKeyDescription
from .reading import KeyringError, ObjectReader, check_description

__all__ = [
    "ACTIVE",
    "INACTIVE",
    "SECRET_LENGTH",
    "AccessKeyEntry",
    "check_access_key_id",
    "check_secret",
    "new_access_key_id",
    "new_secret",
    "random_text",
]

ACTIVE: Final = "Active"
INACTIVE: Final = "Inactive"
ALPHABET: Final = (string.ascii_letters + string.digits).encode()
_PREFIX: Final = "LTAI"
_TEMPORARY_PREFIX: Final = "STS."
"""The cloud's IDs of access keys and of temporary credentials begin so."""
_ID_LENGTH: Final = 20
"""Characters of an ID after its prefix."""
SECRET_LENGTH: Final = 30
"""Characters of a secret, as in the cloud: 178 bits."""
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SECRET: Final = re.compile(rb"[!-~]{16,128}")
"""Printable ASCII without white space, so that a secret can be copied from a line of text."""


@dataclass
class AccessKeyEntry:
    """One access key. `token` is the SecurityToken of temporary credentials; empty without one."""

    access_key_id: str
    created: str
    secret: bytearray = field(repr=False)
    token: bytearray = field(default_factory=bytearray, repr=False)
    enabled: bool = True
    description: str = ""

    @property
    def material(self) -> list[bytearray]:
        """The bytes for secret memory, in the order of `AccessKeyDescription.material_sizes`.

        An `&` follows the secret, so that the keys of both signature schemes are views of one place.
        """
        secret = self.secret + b"&"
        return [secret, self.token] if self.token else [secret]

    def describe(self) -> AccessKeyDescription:
        """Return the access key without its secret and token."""
        return AccessKeyDescription(
            self.access_key_id, self.created, self.enabled, self.description, len(self.secret), len(self.token)
        )

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a JSON object, which contains the secret."""
        token = {"SecurityToken": self.token.decode()} if self.token else {}
        return {
            "AccessKeyId": self.access_key_id,
            "AccessKeySecret": self.secret.decode(),
            **token,
            "Status": ACTIVE if self.enabled else INACTIVE,
            "Description": self.description,
            "CreationDate": self.created,
        }

    @classmethod
    def from_json(cls, reader: ObjectReader) -> "AccessKeyEntry":
        """Read and check an entry. Raises `KeyringError`, which does not quote the secret."""
        entry = cls(
            access_key_id=check_access_key_id(reader.string("AccessKeyId"), f"{reader.path}.AccessKeyId: "),
            created=reader.date("CreationDate"),
            secret=check_secret(reader.string("AccessKeySecret"), f"{reader.path}.AccessKeySecret"),
            enabled=reader.one_of("Status", (ACTIVE, INACTIVE)) == ACTIVE,
            description=reader.string("Description"),
        )
        if token := reader.string("SecurityToken", default=""):
            entry.token = check_secret(token, f"{reader.path}.SecurityToken")
        reader.done()
        check_description(entry.description)
        return entry


def new_access_key_id(*, temporary: bool = False) -> str:
    """Return the ID of a new access key, or of new temporary credentials."""
    prefix = _TEMPORARY_PREFIX if temporary else _PREFIX
    return f"{prefix}{random_text(_ID_LENGTH).decode()}"


def new_secret() -> bytearray:
    """Return the secret of a new access key."""
    return random_text(SECRET_LENGTH)


def random_text(length: int) -> bytearray:
    """Return random letters and digits from the kernel, each with the same probability."""
    return bytearray(secrets.choice(ALPHABET) for _ in range(length))


def check_access_key_id(text: str, where: str = "") -> str:
    """Return the ID of an access key: 1 to 128 ASCII letters, digits, `.`, `_` and `-`. Raises `KeyringError`."""
    if not _ID.fullmatch(text):
        raise KeyringError(f"{where}an access key ID has 1 to 128 ASCII letters, digits, '.', '_' and '-'")
    return text


def check_secret(text: str | bytes | bytearray, where: str) -> bytearray:
    """Return a secret or token: 16 to 128 printable ASCII characters without white space. Raises `KeyringError`.

    The error does not quote the text.
    """
    secret = bytearray(text.encode(errors="replace") if isinstance(text, str) else text)
    if not _SECRET.fullmatch(secret):
        raise KeyringError(f"{where}: 16 to 128 printable ASCII characters without white space are expected")
    return secret
