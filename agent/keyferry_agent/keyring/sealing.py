"""Sealing with age (https://age-encryption.org), so that the `age` program can open a keyring in an emergency.

A keyring is sealed to recipients (X25519 `age1...`, SSH `ssh-ed25519 ...`), one per host and an offline one, or to one
passphrase. pyrage seals to recipients; `keyferry.age_passphrase` seals to a passphrase, because pyrage measures the work
factor. What opens a keyring is an `Unsealer`: an age identity file, an SSH private key, or a passphrase file.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import pyrage

from keyferry import age_passphrase, new_files, private_files
from keyferry.age_passphrase import PassphraseError

from .document import KeyringError

__all__ = ["Identity", "Unsealer", "check_recipient", "count_recipients", "new_identity", "read_passphrase", "seal"]

_AGE_IDENTITY: Final = "AGE-SECRET-KEY-1"
_PEM: Final = "-----BEGIN"
_RECIPIENT_STANZAS: Final = (b"-> X25519 ", b"-> ssh-")
_IDENTITY_MOST: Final = 65_536
_SHOWN: Final = 24


class Unsealer:
    """What opens a keyring. Read from a file, whose kind is told from its content. Its repr shows nothing of it."""

    __slots__ = ("_identities", "passphrase")

    def __init__(self, identities: list[Any], passphrase: str | None) -> None:
        self._identities = identities
        self.passphrase = passphrase

    def __repr__(self) -> str:
        return "Unsealer(passphrase)" if self.passphrase is not None else "Unsealer(identity)"

    @classmethod
    def read(cls, path: Path, owners: Collection[int] = ()) -> "Unsealer":
        """Read an age identity file, an unencrypted SSH private key, or a passphrase file. Raises `KeyringError`.

        `owners`: further users that root accepts as the file's owner.
        """
        content = _read(path, owners)
        try:
            if content.startswith(_PEM):
                return cls([pyrage.ssh.Identity.from_buffer(content.encode())], None)
            lines = [line.strip() for line in content.splitlines()]
            if any(line.startswith(_AGE_IDENTITY) for line in lines):
                keys = [line for line in lines if line and not line.startswith("#")]
                return cls([pyrage.x25519.Identity.from_str(key) for key in keys], None)
        except pyrage.IdentityError:
            raise KeyringError(f"{path}: not an age identity or an unencrypted SSH private key") from None
        return cls([], _passphrase(path, content))

    def unseal(self, sealed: bytes) -> bytes | bytearray:
        """Open a sealed keyring. Raises `KeyringError` for a wrong identity or passphrase, or damage."""
        try:
            if self.passphrase is not None:
                return age_passphrase.unseal(sealed, self.passphrase)
            return bytes(pyrage.decrypt(sealed, self._identities))
        except (pyrage.DecryptError, PassphraseError) as error:
            raise KeyringError(f"the keyring does not open: {error}") from None

    def opens(self, sealed: bytes) -> bool:
        """Whether it opens what was just sealed. A passphrase, slow on purpose, is taken at its word."""
        if self.passphrase is not None:
            return age_passphrase.work_factor(sealed) is not None
        try:
            self.unseal(sealed)
        except KeyringError:
            return False
        return True


def seal(payload: bytes, recipients: list[str], passphrase: str | None) -> bytes:
    """Seal to recipients, or where there are none, to a passphrase. Raises `KeyringError`."""
    if recipients:
        return bytes(pyrage.encrypt(payload, [check_recipient(recipient) for recipient in recipients]))
    if passphrase is None:
        raise KeyringError(
            "the keyring names no recipients, and was not opened with a passphrase: "
            "`keyring reseal` it to all that are to open it"
        )
    try:
        return age_passphrase.seal(payload, passphrase)
    except PassphraseError as error:
        raise KeyringError(str(error)) from None


def count_recipients(sealed: bytes) -> int:
    """How many recipients a file is sealed to, as far as its header tells: not which."""
    header = sealed.split(b"\n---", 1)[0].split(b"\n")
    return sum(line.startswith(_RECIPIENT_STANZAS) for line in header)


def check_recipient(recipient: str) -> Any:
    """Parse `age1...` or `ssh-ed25519 ...`. Raises `KeyringError`."""
    try:
        if recipient.startswith("ssh-"):
            return pyrage.ssh.Recipient.from_str(recipient)
        return pyrage.x25519.Recipient.from_str(recipient)
    except (pyrage.RecipientError, UnicodeError):  # UnicodeError: an argument that is not text
        if _AGE_IDENTITY in recipient or "PRIVATE KEY" in recipient:  # and whatever is shown may be logged
            raise KeyringError("an identity was given as a recipient: it is secret; give its public half") from None
        shown = recipient if len(recipient) <= _SHOWN else f"{recipient[:_SHOWN]}..."
        raise KeyringError(f"{shown!r} is no recipient: expected age1... or an SSH public key") from None


class Identity:
    """A new age identity. Its repr shows nothing of it."""

    __slots__ = ("_identity", "recipient")

    def __init__(self) -> None:
        self._identity = pyrage.x25519.Identity.generate()
        self.recipient = str(self._identity.to_public())

    def write(self, path: Path) -> None:
        """Write the identity to a new file of mode 0600, which appears whole, or not at all. Raises `KeyringError`."""
        try:
            new_files.create(path, f"# public key: {self.recipient}\n{self._identity}\n".encode())
        except FileExistsError:
            raise KeyringError(f"{path} exists; an identity is never overwritten") from None
        except OSError as error:
            raise KeyringError(f"{path}: {error.strerror}") from None


def new_identity(path: Path) -> str:
    """Generate an age identity into a new file, and return its recipient. Raises `KeyringError`."""
    identity = Identity()
    identity.write(path)
    return identity.recipient


def read_passphrase(path: Path, owners: Collection[int] = ()) -> str:
    """Read a passphrase file: its first line. `owners` as for `Unsealer.read`. Raises `KeyringError`."""
    return _passphrase(path, _read(path, owners))


def _passphrase(path: Path, content: str) -> str:
    passphrase = content.split("\n", 1)[0].rstrip("\r")
    if not passphrase:
        raise KeyringError(f"{path}: the first line is empty; a passphrase is expected there")
    return passphrase


def _read(path: Path, owners: Collection[int]) -> str:
    try:
        with open(path, "rb") as file:  # which may be a pipe
            private_files.check(file.fileno(), path, secret=True, owners=owners)
            content = file.read(_IDENTITY_MOST + 1)
        if len(content) > _IDENTITY_MOST:
            raise KeyringError(f"{path}: longer than any identity or passphrase")
        return content.decode()
    except OSError as error:
        raise KeyringError(f"{path}: {error.strerror}") from None
    except private_files.PrivateFileError as error:
        raise KeyringError(str(error)) from None
    except UnicodeDecodeError:
        raise KeyringError(f"{path}: not text; an age identity, an SSH key or a passphrase is expected") from None
