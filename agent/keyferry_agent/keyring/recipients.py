"""Recipients of a keyring: one line of text each, checked in full before pyrage reads it.

pyrage reads everything after an SSH key as its comment, also a second key on the next line, and seals to the first key only.
So a recipient is one key on one line here, with an optional comment after an SSH key. Two texts of one key are one recipient.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any, Final, NamedTuple

import pyrage

from keyferry import private_files
from keyferry.content import RECIPIENT, SECRETS, SSH_PUBLIC_KEY, byte_order_mark, resemblance

from .document import KeyringError

__all__ = [
    "STANZAS",
    "SUPPORTED",
    "Recipient",
    "added",
    "distinct",
    "missing",
    "parse",
    "read_file",
    "shortened",
    "without",
]

STANZAS: Final = (b"-> X25519 ", b"-> ssh-", b"-> p256tag ")
"""Prefixes of the line for each recipient in the header of a sealed file."""
SUPPORTED: Final = "supported are age1... (X25519), age1tag1..., ssh-ed25519 and ssh-rsa"

_STANDARD: Final = "-"
_MAX_FILE_BYTES: Final = 1 << 20
_MAX_SHOWN: Final = 24
"""Most characters that a message shows of a text that is not a recipient."""
_MAX_WHOLE: Final = 64
"""Most characters of a recipient that a message shows whole: an X25519 recipient has 62."""
_MAX_LISTED: Final = 4
_COMMENT: Final = "#"
_SSH_KEY: Final = re.compile(r"(?:sk-)?(?:ssh|ecdsa)-[\w.@-]+\s+AAAA")
_AGE_KEY: Final = re.compile(r"(?<![0-9a-z])age1[0-9a-z]{30,}", re.IGNORECASE)
_SSH_TYPES: Final = ("ssh-ed25519", "ssh-rsa")
_TAG: Final = "age1tag"
"""Prefix of recipients of hardware keys, to which pyrage 1.4 can seal."""
_PLUGIN: Final = re.compile(r"age1([a-z0-9+._-]{1,24})")
"""The beginning of the recipients of a plugin, with the plugin's name in the characters that age allows."""
_POST_QUANTUM: Final = ("age1pq", "age1tagpq")
"""Prefixes of post-quantum recipients. age does not seal to them together with other kinds, and their identities are not
supported here.
"""


class Recipient(NamedTuple):
    """One key that a keyring is sealed to."""

    text: str
    """The recipient as one line, with the comment of an SSH key."""
    key: str
    """The key without a comment: equal for all texts of one key."""
    parsed: Any
    """The recipient as pyrage's object."""


def parse(text: str) -> Recipient:
    """Parse the text of one recipient, without the white space around it.

    Raises `KeyringError`, whose message contains no secret, and at most a short part of the text.
    """
    text = text.strip()
    likeness = resemblance(text.encode(errors="replace"))
    if (likeness is not None and likeness.kind in SECRETS) or "PRIVATE KEY" in text:  # a message may be logged
        raise KeyringError("an identity was given as a recipient: an identity is secret; name its recipient")
    if len(_SSH_KEY.findall(text)) + len(_AGE_KEY.findall(text)) > 1 or len(text.splitlines()) > 1:
        raise KeyringError(
            f"{_shown(text)} is more than one line or recipient; repeat --recipient for each, or use --recipients-file"
        )
    try:
        return _ssh(text) if text.startswith("ssh-") else _age(text)
    except (pyrage.RecipientError, UnicodeError) as error:  # UnicodeError: an argument that is not text
        raise KeyringError(f"{_shown(text)} is not a recipient{_reason(text, str(error))}") from None


def distinct(recipients: Iterable[Recipient]) -> list[str]:
    """Return the texts of recipients in their order, with only the first text of each key."""
    texts: dict[str, str] = {}
    for recipient in recipients:
        texts.setdefault(recipient.key, recipient.text)
    return list(texts.values())


def missing(recipients: Collection[str], others: Collection[str]) -> list[str]:
    """Return the recipients that are not in `others`. Two texts of one key are one recipient."""
    keys = {_key(text) for text in others}
    return [text for text in recipients if _key(text) not in keys]


def added(before: list[str], new_recipients: Collection[Recipient]) -> list[str]:
    """Return the recipients `before`, followed by the named ones. Raises `KeyringError` for a recipient that is in `before`."""
    if not before:
        raise KeyringError("the keyring is sealed to a passphrase: `keyring reseal` seals it to recipients instead")
    keys = {_key(text) for text in before}
    if duplicates := [recipient.text for recipient in new_recipients if recipient.key in keys]:
        raise KeyringError(f"{shortened(duplicates)}: a recipient of the keyring already")
    return [*before, *distinct(new_recipients)]


def without(before: list[str], removed_recipients: Collection[Recipient]) -> list[str]:
    """Return the recipients `before` without the named ones.

    Raises `KeyringError` for a recipient that is not in `before`, and if no recipient would be left.
    """
    if strangers := missing([recipient.text for recipient in removed_recipients], before):
        raise KeyringError(f"{shortened(strangers)}: not a recipient of the keyring; `keyring recipients` lists them")
    keys = {recipient.key for recipient in removed_recipients}
    remainder = [text for text in before if _key(text) not in keys]
    if not remainder:
        raise KeyringError("that removes every recipient, and nothing would open the keyring; nothing was changed")
    return remainder


def shortened(recipients: Collection[str]) -> str:
    """Return recipients for a message: at most four, and only the ends of long ones. An SSH key has its comment at the end."""
    texts = [text if len(text) <= _MAX_WHOLE else f"{text[:_MAX_SHOWN]}...{text[-_MAX_SHOWN:]}" for text in recipients]
    omitted_count = len(texts) - _MAX_LISTED
    return ", ".join(texts[:_MAX_LISTED]) + (f" and {omitted_count} more" if omitted_count > 0 else "")


def _key(text: str) -> str:
    """Return the `Recipient.key` of a text, or the text itself if an earlier version stored two keys as one recipient."""
    try:
        return parse(text).key
    except KeyringError:
        return text


def read_file(path: str, owners: Collection[int] = ()) -> list[Recipient]:
    """Read a recipients file, as `age -R` does: one recipient on each line, with empty lines and `#` comments between them.

    "-" is standard input. `owners`: further users that root accepts as the file's owner. Raises `KeyringError`, also where
    other users can write the file.
    """
    recipients = []
    for number, line in enumerate(_lines(path, owners), 1):
        if line.strip() and not line.lstrip().startswith(_COMMENT):
            try:
                recipients.append(parse(line))
            except KeyringError as error:
                raise KeyringError(f"{_name(path)}, line {number}: {error}") from None
    if not recipients:
        raise KeyringError(f"{_name(path)}: contains no recipient; one on each line is expected")
    return recipients


def _lines(path: str, owners: Collection[int]) -> list[str]:
    try:
        with open(0 if path == _STANDARD else path, "rb", closefd=path != _STANDARD) as file:
            if path != _STANDARD:
                private_files.check(file.fileno(), path, owners=owners)
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyringError(f"{_name(path)}: {error.strerror}") from None
    except private_files.PrivateFileError as error:
        raise KeyringError(str(error)) from None
    if len(content) > _MAX_FILE_BYTES:
        raise KeyringError(f"{_name(path)}: longer than {_MAX_FILE_BYTES} bytes")
    if encoding := byte_order_mark(content):
        raise KeyringError(f"{_name(path)}: begins with a byte order mark ({encoding}); save it as UTF-8 without one")
    try:
        return content.decode().split("\n")
    except UnicodeDecodeError:
        raise KeyringError(f"{_name(path)}: not text; recipients are expected, one on each line") from None


def _name(path: str) -> str:
    return "standard input" if path == _STANDARD else path


def _ssh(text: str) -> Recipient:
    key_type, *others = text.split(None, 2)
    key = f"{key_type} {others[0] if others else ''}"
    line = " ".join([key_type, *others])
    if not line.isprintable():
        raise UnicodeError("it contains control characters")
    return Recipient(line, key, pyrage.ssh.Recipient.from_str(line))


def _age(text: str) -> Recipient:
    module = pyrage.x25519
    if text.lower().rpartition("1")[0] == _TAG:
        module = getattr(pyrage, "tag", None)
        if module is None:
            raise pyrage.RecipientError("age1tag1... takes pyrage 1.4 or newer")
    return Recipient(text.lower(), text.lower(), module.Recipient.from_str(text))


def _reason(text: str, error: str) -> str:
    """Return the reason why a text is not a recipient, as the end of the message of `parse`."""
    kind = text.lower().rpartition("1")[0]
    likeness = resemblance(text.encode(errors="replace"))
    if "pyrage 1.4" in error:
        reason = f": {error}"
    elif kind in _POST_QUANTUM:
        reason = f" that is supported: it is a hybrid post-quantum recipient ({kind}1...); {SUPPORTED}"
    elif (plugin := _PLUGIN.fullmatch(kind)) and kind != _TAG:
        reason = f" that is supported: it is a recipient of the age plugin {plugin.group(1)!r}; {SUPPORTED}"
    elif "RsaModulus" in error:
        reason = ": its RSA key is too short or too long; one of 2,048 to 4,096 bits is expected"
    elif likeness is not None and likeness.kind == SSH_PUBLIC_KEY and likeness.key_type in _SSH_TYPES:
        reason = ": it is damaged, or has text before the key; expected age1... or an SSH public key"
    elif likeness is not None and likeness.kind != RECIPIENT:
        reason = f" that is supported: it looks like {likeness}; {SUPPORTED}"
    else:
        reason = f": expected age1... or an SSH public key; {SUPPORTED}"
    return reason


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...")
