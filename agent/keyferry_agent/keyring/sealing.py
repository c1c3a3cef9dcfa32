"""Sealing with age (https://age-encryption.org), so that the `age` program can open a keyring in an emergency.

A keyring is sealed to recipients (`recipients.py`), one per host and an offline one, or to one passphrase. pyrage seals to
recipients. `keyferry.age_passphrase` seals to a passphrase, because pyrage would measure the machine to choose the work factor.
An `Unsealer` opens a keyring with an age identity file, an SSH private key, or a passphrase file.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import pyrage

from keyferry import age_passphrase, content, new_files, passphrase, private_files
from keyferry.age_passphrase import PassphraseError, SealedToRecipientsError
from keyferry.descriptors import open_to_read

from .document import KeyringError
from .recipients import STANZAS, parse

__all__ = ["Identity", "Unsealer", "count_recipients", "new_identity", "read_passphrase", "recipients_of", "seal"]

_AGE_IDENTITY: Final = "AGE-SECRET-KEY-1"
_PEM: Final = b"-----BEGIN"
_COMMENT: Final = "#"
_MAX_IDENTITY_BYTES: Final = 65_536
_SSH_TYPES: Final = ("", "ssh-ed25519", "ssh-rsa")
_SUPPORTED: Final = (
    "an age identity (X25519), an SSH key of type ssh-ed25519 or ssh-rsa, or a passphrase opens a keyring"
)

_UNSUPPORTED: Final = {
    content.AGE_FILE: "encrypted identities are not supported; write the identity to a file with `age -d`",
    content.PQ_IDENTITY: "post-quantum identities are not supported",
    content.PLUGIN_IDENTITY: "identities of age plugins are not supported",
    content.ENCRYPTED_KEY: "encrypted keys are not supported; write a copy without a passphrase with `ssh-keygen -p`",
    content.PEM_KEY: "`ssh-keygen -p -f FILE` converts a PKCS#8 file of an RSA key to the form of OpenSSH",
    content.PUTTY_KEY: "PuTTYgen converts it to the form of OpenSSH",
    content.PUBLIC_KEY: "a public key cannot open a keyring; name the private key",
    content.SSH_PUBLIC_KEY: "a public key cannot open a keyring; name the private key",
    content.RECIPIENT: "a recipient cannot open a keyring; name its identity",
}
"""The advice in a message, for each kind of file that contains no supported identity."""


class Unsealer:
    """The identities or the passphrase that open a keyring, read from a file whose kind is detected. The repr has no secret."""

    __slots__ = ("_advice", "_assumption", "_identities", "passphrase")

    def __init__(
        self, identities: list[Any], passphrase: str | None, *, assumption: str = "", advice: str = ""
    ) -> None:
        self._identities = identities
        self.passphrase = passphrase
        self._assumption = assumption
        self._advice = advice

    def __repr__(self) -> str:
        return "Unsealer(passphrase)" if self.passphrase is not None else "Unsealer(identity)"

    @classmethod
    def read(cls, path: Path, owners: Collection[int] = ()) -> "Unsealer":
        """Read an age identity file, an unencrypted SSH private key, or a passphrase file. Raises `KeyringError`.

        `owners`: further users that root accepts as the file's owner.
        """
        data = _read(path, owners)
        if data.startswith(_PEM):
            return cls([_ssh_identity(path, data)], None, assumption=f"{path} was taken for an SSH private key")
        text = _text(path, data)
        if identities := _age_identities(path, text):
            return cls(identities, None, assumption=f"{path} was taken for an age identity")
        return cls(
            [],
            _passphrase(path, data),
            assumption=f"{path} contains no supported identity, so it was taken for a passphrase",
            advice=_remark(data),
        )

    def unseal(self, sealed_bytes: bytes) -> bytes | bytearray:
        """Return the content of a sealed keyring. Raises `KeyringError` for a wrong identity or passphrase, or damage."""
        try:
            if self.passphrase is not None:
                return age_passphrase.unseal(sealed_bytes, self.passphrase)
            if age_passphrase.work_factor(sealed_bytes) is not None:
                raise KeyringError(
                    f"the keyring does not open: {self._assumption}; this keyring is sealed to a passphrase"
                )
            return bytes(pyrage.decrypt(sealed_bytes, self._identities))
        except SealedToRecipientsError:
            reason = f"{self._assumption}; this keyring is sealed to recipients{self._advice}"
        except PassphraseError as error:
            reason = f"{error}; {self._assumption}{self._advice}" if self._advice else str(error)
        except pyrage.DecryptError as error:
            reason = str(error)
        raise KeyringError(f"the keyring does not open: {reason}")

    def opens(self, sealed_bytes: bytes) -> bool:
        """Return True if this unsealer can open `sealed_bytes`. For a passphrase, only the header is checked."""
        if self.passphrase is not None:
            return age_passphrase.work_factor(sealed_bytes) is not None
        try:
            self.unseal(sealed_bytes)
        except KeyringError:
            return False
        return True


def seal(payload: bytes, recipients: list[str], passphrase: str | None) -> bytes:
    """Return the sealed payload: sealed to the recipients, or to the passphrase if `recipients` is empty.

    Raises `KeyringError`.
    """
    if recipients:
        return _seal_to_recipients(payload, recipients)
    if passphrase is None:
        raise KeyringError(
            "the keyring names no recipients, and was not opened with a passphrase; run `keyring reseal` with all recipients"
        )
    try:
        return age_passphrase.seal(payload, passphrase)
    except PassphraseError as error:
        raise KeyringError(str(error)) from None


def _seal_to_recipients(payload: bytes, recipients: list[str]) -> bytes:
    """Return the payload sealed to the recipients. Raises `KeyringError`.

    The recipients in the sealed file are counted: a keyring must not name a recipient that cannot open the file.
    """
    try:
        pyrage_recipients = [parse(recipient).parsed for recipient in recipients]
    except KeyringError as error:
        raise KeyringError(f"{error}; the keyring names it; run `keyring reseal` with all recipients") from None
    try:
        sealed_bytes = bytes(pyrage.encrypt(payload, pyrage_recipients))
    except pyrage.EncryptError as error:
        raise KeyringError(f"age cannot seal to these recipients together: {error}") from None
    if count_recipients(sealed_bytes) != len(recipients):
        raise KeyringError(
            f"nothing was written: the keyring would be sealed to {count_recipients(sealed_bytes)} of {len(recipients)} "
            "recipients"
        )
    return sealed_bytes


def count_recipients(sealed_bytes: bytes) -> int:
    """Return the number of recipients in the header of a sealed file. The header does not reveal which recipients they are."""
    header = sealed_bytes.split(b"\n---", 1)[0].split(b"\n")
    return sum(line.startswith(STANZAS) for line in header)


class Identity:
    """A new age identity. Its repr does not contain the secret."""

    __slots__ = ("_identity", "recipient")

    def __init__(self) -> None:
        self._identity = pyrage.x25519.Identity.generate()
        self.recipient = str(self._identity.to_public())

    def write(self, path: Path) -> None:
        """Write the identity atomically to a new file of mode 0600. Raises `KeyringError`."""
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


def recipients_of(path: Path, owners: Collection[int] = ()) -> list[str]:
    """Return the recipients of the identities in a file: age identities, or an SSH key. `owners` as for `Unsealer.read`.

    Raises `KeyringError`, also for a passphrase, which has no recipient.
    """
    data = _read(path, owners)
    if data.startswith(_PEM):
        _ssh_identity(path, data)
        return [_ssh_recipient(data)]
    if identities := _age_identities(path, _text(path, data)):
        return [str(identity.to_public()) for identity in identities]
    raise KeyringError(f"{path}: contains no identity, and only an identity has a recipient{_remark(data)}")


def _ssh_recipient(data: bytes) -> str:
    """Return the public half of an SSH private key that pyrage has read."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - the loader does without

    load = serialization.load_ssh_private_key if b"OPENSSH" in data else serialization.load_pem_private_key
    key = load(data, None).public_key()
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def read_passphrase(path: Path, owners: Collection[int] = ()) -> str:
    """Read the passphrase to seal with from a file that contains nothing else. `owners` as for `Unsealer.read`.

    Raises `KeyringError`, also for a file that looks like an identity, a key or a recipient.
    """
    try:
        return passphrase.of_new_file(_read(path, owners))
    except ValueError as error:
        raise KeyringError(f"{path}: {error}") from None


def _ssh_identity(path: Path, data: bytes) -> Any:
    try:
        return pyrage.ssh.Identity.from_buffer(data)
    except pyrage.IdentityError:
        raise KeyringError(f"{path}: not an age identity or an unencrypted SSH private key{_remark(data)}") from None


def _age_identities(path: Path, text: str) -> list[Any]:
    """Return the identities in an age identity file, or an empty list for another kind of file. Raises `KeyringError`."""
    identities = []
    lines = [line.strip() for line in text.splitlines()]
    if not any(line.startswith(_AGE_IDENTITY) for line in lines):
        return []
    for number, line in enumerate(lines, 1):
        if line and not line.startswith(_COMMENT):
            try:
                identities.append(pyrage.x25519.Identity.from_str(line))
            except pyrage.IdentityError:
                raise KeyringError(
                    f"{path}, line {number}: not an age identity or a comment{_remark(line.encode())}"
                ) from None
    return identities


def _remark(data: bytes) -> str:
    """Return the end of a message: the kind that the content resembles, and advice; an empty text for a passphrase."""
    reasons = []
    if encoding := content.byte_order_mark(data):
        reasons.append(f"it begins with a byte order mark ({encoding}): save it as UTF-8 without one")
    likeness = content.resemblance(data)
    if likeness is not None:
        reasons.append(f"it looks like {likeness}: {_advice(likeness)}")
    return f"; {'; '.join(reasons)}" if reasons else ""


def _advice(likeness: content.Resemblance) -> str:
    if likeness.key_type not in _SSH_TYPES and likeness.kind == content.OPENSSH_KEY:
        return f"keys of this type are not supported; {_SUPPORTED}"
    if likeness.encrypted:
        return _UNSUPPORTED[content.ENCRYPTED_KEY]
    if likeness.kind in _UNSUPPORTED:
        return f"{_UNSUPPORTED[likeness.kind]}; {_SUPPORTED}"
    if likeness.kind == content.AGE_IDENTITY:
        return "an identity is one line in upper case, without quotes or other text"
    return _SUPPORTED


def _passphrase(path: Path, data: bytes) -> str:
    try:
        return passphrase.of_file(data)
    except ValueError as error:
        raise KeyringError(f"{path}: {error}") from None


def _text(path: Path, data: bytes) -> str:
    if len(data) > _MAX_IDENTITY_BYTES:
        raise KeyringError(f"{path}: longer than any identity or passphrase")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise KeyringError(
            f"{path}: not text; an age identity, an SSH key or a passphrase is expected{_remark(data)}"
        ) from None


def _read(path: Path, owners: Collection[int]) -> bytes:
    """Return the content of a file or a pipe: at most one byte more than `_MAX_IDENTITY_BYTES`. Raises `KeyringError`."""
    try:
        # A pipe that another user made is read from its descriptor, because its path cannot be opened.
        with open_to_read(path) as file:
            private_files.check(file.fileno(), path, secret=True, owners=owners)
            return file.read(_MAX_IDENTITY_BYTES + 1)
    except OSError as error:
        raise KeyringError(f"{path}: {error.strerror}") from None
    except private_files.PrivateFileError as error:
        raise KeyringError(str(error)) from None
