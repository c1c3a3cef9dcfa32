"""Reads the first line of a file's content, and recognises the content's kind: an identity, a key, an age file, a recipient.

A passphrase file is checked before a keyring or module is sealed with it. A message about a file that opens nothing names the
file's kind. The functions recognise files that people confuse. They do not check that a key is valid, and their results contain
nothing of a secret.
"""

import re
from base64 import b64decode
from binascii import Error as Base64Error
from typing import Final, NamedTuple

__all__ = [
    "AGE_FILE",
    "AGE_IDENTITY",
    "CERTIFICATE",
    "DER_KEY",
    "ENCRYPTED_KEY",
    "OPENSSH_KEY",
    "PEM",
    "PEM_KEY",
    "PKCS1_PUBLIC_KEY",
    "PLUGIN_IDENTITY",
    "PQ_IDENTITY",
    "PRIVATE_KEYS",
    "PUBLIC_KEY",
    "PUTTY_KEY",
    "RECIPIENT",
    "SECRETS",
    "SSH_PUBLIC_KEY",
    "Resemblance",
    "base64_text",
    "byte_order_mark",
    "der_kind",
    "first_line",
    "first_line_end",
    "resemblance",
]

AGE_IDENTITY: Final = "an age identity (AGE-SECRET-KEY-1...)"
PQ_IDENTITY: Final = "a post-quantum age identity (AGE-SECRET-KEY-PQ-1...)"
PLUGIN_IDENTITY: Final = "an identity of an age plugin (AGE-PLUGIN-...)"
AGE_FILE: Final = "an age file: a keyring, a module, or an identity that `age -p` encrypted"
OPENSSH_KEY: Final = "an OpenSSH private key"
ENCRYPTED_KEY: Final = "a private key that is encrypted with a passphrase"
PEM_KEY: Final = "a private key in PEM"
DER_KEY: Final = "a private key in DER"
PUTTY_KEY: Final = "a PuTTY private key"
PUBLIC_KEY: Final = "a public key"
PKCS1_PUBLIC_KEY: Final = "a public key in the form of PKCS#1"
CERTIFICATE: Final = "a certificate"
PEM: Final = "a PEM file"
SSH_PUBLIC_KEY: Final = "an SSH public key"
RECIPIENT: Final = "an age recipient (age1...)"

PRIVATE_KEYS: Final = frozenset({OPENSSH_KEY, ENCRYPTED_KEY, PEM_KEY, DER_KEY, PUTTY_KEY})
SECRETS: Final = PRIVATE_KEYS | {AGE_IDENTITY, PQ_IDENTITY, PLUGIN_IDENTITY}

_MARKS: Final = (
    (b"\xef\xbb\xbf", "UTF-8"),
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"\0\0\xfe\xff", "UTF-32"),
)
_PATTERNS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), name)
    for pattern, name in (
        (rb"age-secret-key-pq-", PQ_IDENTITY),
        (rb"age-secret-key-", AGE_IDENTITY),
        (rb"age-plugin-", PLUGIN_IDENTITY),
        (rb"-----BEGIN AGE ENCRYPTED FILE", AGE_FILE),
        (rb"age-encryption\.org/", AGE_FILE),
        (rb"-----BEGIN OPENSSH PRIVATE KEY", OPENSSH_KEY),
        (rb"-----BEGIN ENCRYPTED PRIVATE KEY", ENCRYPTED_KEY),
        (rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----\s+Proc-Type: 4,ENCRYPTED", ENCRYPTED_KEY),
        (rb"---- ?BEGIN [A-Z0-9 ]*PRIVATE KEY", PEM_KEY),
        (rb"PuTTY-User-Key-File-", PUTTY_KEY),
        (rb"-----BEGIN RSA PUBLIC KEY", PKCS1_PUBLIC_KEY),
        (rb"---- ?BEGIN [A-Z0-9 ]*PUBLIC KEY", PUBLIC_KEY),
        (rb"-----BEGIN [A-Z0-9 ]*CERTIFICATE", CERTIFICATE),
        (rb"-----BEGIN", PEM),
        (rb"(?:^|\s)(?:sk-)?(?:ssh|ecdsa)-[A-Za-z0-9_.@-]+\s+AAAA", SSH_PUBLIC_KEY),
        (rb"(?:^|[\s\"'=])age1[a-z0-9]{6,}", RECIPIENT),
    )
)
"""The first pattern that the content contains decides. So secrets precede public keys, and kinds precede their families."""
_SSH_TYPE: Final = re.compile(rb"(?:sk-)?(?:ssh|ecdsa)-[A-Za-z0-9_.@-]+(?=\s+AAAA)")
_OPENSSH_BODY: Final = re.compile(rb"-----BEGIN OPENSSH PRIVATE KEY-----([A-Za-z0-9+/=\s]*)")
_OPENSSH_MAGIC: Final = b"openssh-key-v1\0"
_SSH_TYPES: Final = frozenset(
    f"{prefix}{name}{end}"
    for name in ("ssh-ed25519", "ssh-rsa", "ssh-dss", *(f"ecdsa-sha2-nistp{bits}" for bits in (256, 384, 521)))
    for prefix, end in (("", ""), ("sk-", "@openssh.com"), ("", "-cert-v01@openssh.com"))
)
_OPENSSH_TYPE: Final = re.compile(rb"\0\0\0[\x07-\x40]((?:sk-)?(?:ssh|ecdsa)-[A-Za-z0-9_.@-]+)")


_SHAPES: Final = (
    (b"\x30\x03", PUBLIC_KEY),  # SubjectPublicKeyInfo: algorithm, key
    (b"\x02\x02", PKCS1_PUBLIC_KEY),  # RSAPublicKey: modulus, exponent
    (b"\x02" * 9, DER_KEY),  # RSAPrivateKey
    (b"\x02\x30\x04", DER_KEY),  # PKCS #8 PrivateKeyInfo: version, algorithm, key
    (b"\x02\x04", DER_KEY),  # ECPrivateKey: version, key
    (b"\x30\x04", ENCRYPTED_KEY),  # PKCS #8 EncryptedPrivateKeyInfo
    (b"\x30\x30\x03", CERTIFICATE),  # also a request for one
)
"""The first tags inside the outer SEQUENCE. The first `_COMPLETE_SHAPES` entries list all of the tags."""
_COMPLETE_SHAPES: Final = 2
_SEQUENCE: Final = 0x30
_LONG_FORM: Final = 0x80
_MAX_LENGTH_BYTES: Final = 3
_MAX_TAGS: Final = 16


class Resemblance(NamedTuple):
    """The kind that a content resembles, one of the constants above, with details for a message."""

    kind: str
    key_type: str = ""
    """The type of an SSH key, where it can be read, such as "ecdsa-sha2-nistp256"; else empty."""
    encrypted: bool = False
    """True for a private key that is encrypted with a passphrase."""

    def __str__(self) -> str:
        details = [f"type {self.key_type}"] if self.key_type else []
        if self.encrypted and self.kind != ENCRYPTED_KEY:
            details.append("encrypted with a passphrase")
        return f"{self.kind} ({', '.join(details)})" if details else self.kind


def first_line(content: bytes, meaning: str) -> str:
    """Return the first line of a content, without its line ending. `meaning` is its name in messages, such as "a passphrase".

    Raises ValueError if the line is empty or is not text in UTF-8. The message shows nothing of the content.
    """
    try:
        line = content[: first_line_end(content)].decode()
    except UnicodeDecodeError:
        raise ValueError(f"not text in UTF-8; {meaning} is expected in the first line") from None
    if not line:
        raise ValueError(f"the first line is empty; {meaning} is expected there")
    return line


def first_line_end(content: bytes | bytearray) -> int:
    """Return the length of the first line, without its line ending (LF or CRLF). Copies nothing of a secret."""
    end = content.find(b"\n")
    end = len(content) if end < 0 else end
    while end and content[end - 1] == ord("\r"):
        end -= 1
    return end


def byte_order_mark(content: bytes) -> str | None:
    """Return the encoding of the byte order mark at the beginning of the content, or None if it has no such mark."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return encoding
    return None


def resemblance(content: bytes) -> Resemblance | None:
    """Return the kind that a content resembles, and None for any other content, such as a passphrase."""
    if kind := der_kind(content):
        return Resemblance(kind)
    encoding = byte_order_mark(content)
    if encoding in ("UTF-16", "UTF-32"):
        content = content.decode(encoding, errors="replace").encode(errors="replace")
    elif b"\0" in content[:2]:  # UTF-16 without a byte order mark
        content = content.replace(b"\0", b"")
    for pattern, kind in _PATTERNS:
        if pattern.search(content):
            return _with_details(kind, content)
    encoded_kind = der_kind(base64_text(content))
    return Resemblance(encoded_kind) if encoded_kind else None


def der_kind(der: bytes) -> str | None:
    """Return the kind of key in a DER encoding by its structure alone, and None for other bytes."""
    tags = _tags(der)
    for index, (shape, kind) in enumerate(_SHAPES):
        if tags == shape or (index >= _COMPLETE_SHAPES and tags.startswith(shape)):
            return kind
    return None


def base64_text(content: bytes) -> bytes:
    """Return the bytes of Base64 text on one line or several, and no bytes for any other content."""
    try:
        return b64decode(b"".join(content.split()), validate=True)
    except Base64Error:
        return b""


def _tags(der: bytes) -> bytes:
    """Return the tags inside one SEQUENCE that is as long as the bytes, and no bytes for anything else."""
    start, end = _content_span(der, 0)
    if not der.startswith(bytes([_SEQUENCE])) or end != len(der):
        return b""
    tags = bytearray()
    while start < end and len(tags) < _MAX_TAGS:
        tags.append(der[start])
        _, start = _content_span(der, start)
    return bytes(tags) if start == end else b""


def _content_span(der: bytes, at: int) -> tuple[int, int]:
    """Return the start and the end of the content of the element at `at`. The end may exceed the length of the bytes."""
    length = der[at + 1] if at + 1 < len(der) else len(der)
    if length < _LONG_FORM:
        return at + 2, at + 2 + length
    size = min(length - _LONG_FORM, _MAX_LENGTH_BYTES + 1)
    start = at + 2 + size
    return start, start + int.from_bytes(der[at + 2 : start], "big")


def _with_details(kind: str, content: bytes) -> Resemblance:
    if kind == SSH_PUBLIC_KEY:
        match = _SSH_TYPE.search(content)
        return Resemblance(kind, _known_type(match.group().decode()) if match else "")
    if kind != OPENSSH_KEY:
        return Resemblance(kind, encrypted=kind == ENCRYPTED_KEY)
    body = _OPENSSH_BODY.search(content)
    key = base64_text(body.group(1)) if body else b""
    if not key.startswith(_OPENSSH_MAGIC):
        return Resemblance(kind)
    key_type = _OPENSSH_TYPE.search(key)
    is_encrypted = not key.startswith(_OPENSSH_MAGIC + b"\0\0\0\x04none")
    return Resemblance(kind, _known_type(key_type.group(1).decode()) if key_type else "", is_encrypted)


def _known_type(key_type: str) -> str:
    """Return a key type of OpenSSH unchanged, and an empty text for any other: that is text of a file that may be a secret."""
    return key_type if key_type in _SSH_TYPES else ""
