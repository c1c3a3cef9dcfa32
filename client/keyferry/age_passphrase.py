"""Seal to a passphrase in the format of age (https://c2sp.org/age, the scrypt recipient), with a chosen work factor.

The work factor of a new file is `WORK_FACTOR`, regardless of the machine's load. Opening a file accepts every work factor up to
`MAX_WORK_FACTOR`. The module measures no speed, so whether a file opens does not depend on load. The `age` program opens these
files, and this module opens those of `age -p`, armored ones too.

A header with a scrypt stanza has exactly that stanza, of fixed lengths, so one regular expression is the whole parser.
Requires the `cryptography` package (extra `module`).
"""

import os
import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from cryptography.exceptions import InternalError, InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from .openssl_configuration import configuration, cryptography_failure

__all__ = [
    "MAX_WORK_FACTOR",
    "MIN_STRONG_WORK_FACTOR",
    "WORK_FACTOR",
    "PassphraseError",
    "SealedToRecipientsError",
    "memory_mib",
    "seal",
    "unseal",
    "work_factor",
]

WORK_FACTOR: Final = 18
"""Base-two logarithm of scrypt's N in new files, as in those of `age -p`: 256 MiB of memory, 0.5 s of processor time."""
MIN_STRONG_WORK_FACTOR: Final = 17
"""Files below this work factor are opened, and callers warn about them."""
MAX_WORK_FACTOR: Final = 22
"""The limit of the `age` program too: 4 GiB of memory and 16 s of processor time are the most that a file can demand."""

_FILE_KEY_SIZE: Final = 16
_NONCE_SIZE: Final = 16
_TAG_SIZE: Final = 16
_CHUNK_SIZE: Final = 64 * 1024
_SEALED_CHUNK_SIZE: Final = _CHUNK_SIZE + _TAG_SIZE
_WRAP_NONCE: Final = bytes(12)
_SCRYPT_LABEL: Final = b"age-encryption.org/v1/scrypt"
_VERSION: Final = b"age-encryption.org/v1\n"
_SCRYPT_LINE: Final = b"-> scrypt "
_BASE64: Final = rb"[A-Za-z0-9+/]"
_HEADER: Final = re.compile(
    re.escape(_VERSION)
    + rb"-> scrypt (%b{22}) ([1-9][0-9]{0,8})\n(%b{43})\n---(?= (%b{43})\n)" % (_BASE64, _BASE64, _BASE64)
)
"""Groups: salt, work factor, wrapped file key, MAC. The MAC covers the bytes of the whole match."""
_MAC_LINE_REST: Final = len(b" ") + 43 + len(b"\n")
_ARMOR_BEGIN: Final = b"-----BEGIN AGE ENCRYPTED FILE-----"
_ARMOR_END: Final = b"-----END AGE ENCRYPTED FILE-----"
_ARMOR_COLUMNS: Final = 64
_WHITESPACE: Final = b" \t\r\n"


class PassphraseError(Exception):
    """The file does not open with this passphrase. The message contains nothing secret."""


class SealedToRecipientsError(PassphraseError):
    """No passphrase opens the file, because it is sealed to recipients."""


class _Header(NamedTuple):
    salt: bytes
    work_factor: int
    wrapped_key: bytes
    covered: bytes
    mac: bytes
    payload: memoryview


def seal(payload: bytes | bytearray, passphrase: str) -> bytes:
    """Seal a payload to a passphrase with `WORK_FACTOR`. Raises `PassphraseError` where memory is short."""
    with _openssl():
        return _seal(payload, passphrase, WORK_FACTOR)


def unseal(sealed_bytes: bytes, passphrase: str) -> bytearray:
    """Return the payload of a sealed file, in a buffer that the caller can overwrite.

    Raises `PassphraseError` for a wrong passphrase, a damaged file, a work factor above `MAX_WORK_FACTOR`, or short memory.
    """
    header = _parse(_without_armor(sealed_bytes))
    if header.work_factor > MAX_WORK_FACTOR:
        raise PassphraseError(
            f"work factor {header.work_factor} is too high: at most {MAX_WORK_FACTOR} "
            f"({memory_mib(MAX_WORK_FACTOR)} MiB of memory) is accepted; seal the file again with a lower one"
        )
    with _openssl(), _key(_FILE_KEY_SIZE) as file_key:
        with _wrap_key(passphrase, header.salt, header.work_factor) as wrap_key:
            try:
                ChaCha20Poly1305(wrap_key).decrypt_into(_WRAP_NONCE, header.wrapped_key, None, file_key)
            except InvalidTag:
                raise PassphraseError("wrong passphrase, or a damaged header") from None
        try:
            _mac(file_key, header.covered).verify(header.mac)
        except InvalidSignature:
            raise PassphraseError("the header is damaged") from None
        return _open_payload(file_key, header.payload)


def work_factor(sealed_bytes: bytes) -> int | None:
    """Return the work factor in the header of a file that is sealed to a passphrase, and None for any other bytes."""
    try:
        return _parse(_without_armor(sealed_bytes)).work_factor
    except PassphraseError:
        return None


def memory_mib(factor: int) -> int:
    """Return the memory that scrypt allocates for a work factor, in MiB, rounded up."""
    return max(1, (1 << factor) // 1024)


def _seal(payload: bytes | bytearray, passphrase: str, factor: int) -> bytes:
    salt, nonce = os.urandom(16), os.urandom(_NONCE_SIZE)
    with _key(_FILE_KEY_SIZE) as file_key:
        file_key[:] = os.urandom(_FILE_KEY_SIZE)
        with _wrap_key(passphrase, salt, factor) as wrap_key:
            wrapped_key = ChaCha20Poly1305(wrap_key).encrypt(_WRAP_NONCE, file_key, None)
        header = b"%b-> scrypt %b %d\n%b\n---" % (_VERSION, _encode(salt), factor, _encode(wrapped_key))
        mac = _mac(file_key, header).finalize()
        with _derived(file_key, nonce, b"payload") as payload_key:
            cipher = ChaCha20Poly1305(payload_key)
            last_index = max(0, len(payload) - 1) // _CHUNK_SIZE
            view = memoryview(payload)
            chunks = [
                cipher.encrypt(_chunk_nonce(i, i == last_index), view[i * _CHUNK_SIZE : (i + 1) * _CHUNK_SIZE], None)
                for i in range(last_index + 1)
            ]
    return b"".join([header, b" ", _encode(mac), b"\n", nonce, *chunks])


def _parse(sealed_bytes: bytes) -> _Header:
    match = _HEADER.match(sealed_bytes)
    if match is None:
        if not sealed_bytes.startswith(_VERSION):
            raise PassphraseError("not a file that age sealed")
        if b"\n" + _SCRYPT_LINE not in sealed_bytes.split(b"\n---", 1)[0]:
            raise SealedToRecipientsError("the file is not sealed to a passphrase")
        raise PassphraseError("the header is damaged: one scrypt stanza is expected, and no other")
    salt, factor, wrapped_key, mac = match.groups()
    return _Header(
        _decode(salt),
        int(factor),
        _decode(wrapped_key),
        match.group(),
        _decode(mac),
        memoryview(sealed_bytes)[match.end() + _MAC_LINE_REST :],
    )


def _open_payload(file_key: bytearray, payload: memoryview) -> bytearray:
    nonce, body = payload[:_NONCE_SIZE], payload[_NONCE_SIZE:]
    last_index = max(0, len(body) - 1) // _SEALED_CHUNK_SIZE
    last_size = len(body) - last_index * _SEALED_CHUNK_SIZE
    # Only an empty payload has an empty last chunk: otherwise one payload would have two forms.
    if last_size < _TAG_SIZE or (last_size == _TAG_SIZE and last_index > 0):
        raise PassphraseError("the content is cut off")
    plaintext = bytearray(len(body) - (last_index + 1) * _TAG_SIZE)
    with _derived(file_key, bytes(nonce), b"payload") as payload_key, memoryview(plaintext) as view:
        cipher = ChaCha20Poly1305(payload_key)
        try:
            for i in range(last_index + 1):
                cipher.decrypt_into(
                    _chunk_nonce(i, i == last_index),
                    body[i * _SEALED_CHUNK_SIZE : (i + 1) * _SEALED_CHUNK_SIZE],
                    None,
                    view[i * _CHUNK_SIZE : (i + 1) * _CHUNK_SIZE],
                )
        except InvalidTag:
            view[:] = bytes(len(view))  # the chunks decrypted before were authentic, and are secret
            raise PassphraseError("the content is damaged or cut off") from None
    return plaintext


@contextmanager
def _openssl() -> Iterator[None]:
    """Name the configuration of OpenSSL where it does not offer an algorithm. Raises `PassphraseError`."""
    try:
        yield
    except (InternalError, UnsupportedAlgorithm) as error:
        raise PassphraseError(cryptography_failure(error)) from None


def _chunk_nonce(number: int, is_last: bool) -> bytes:
    return number.to_bytes(11, "big") + (b"\1" if is_last else b"\0")


@contextmanager
def _key(size: int) -> Iterator[bytearray]:
    """Lend a buffer for a key, and overwrite it at the end of the block."""
    key = bytearray(size)
    try:
        yield key
    finally:
        key[:] = bytes(size)


@contextmanager
def _wrap_key(passphrase: str, salt: bytes, factor: int) -> Iterator[bytearray]:
    try:
        passphrase_bytes = bytearray(passphrase.encode())
    except UnicodeEncodeError:  # whose attributes hold the passphrase
        raise PassphraseError("the passphrase is not text") from None
    with _key(32) as key:
        try:
            Scrypt(_SCRYPT_LABEL + salt, 32, 1 << factor, 8, 1).derive_into(passphrase_bytes, key)
        except MemoryError:
            if not _offers_hash():
                raise PassphraseError(
                    f"this OpenSSL's configuration offers no SHA-256 for scrypt ({configuration()})"
                ) from None
            raise PassphraseError(f"not enough memory: work factor {factor} takes {memory_mib(factor)} MiB") from None
        finally:
            passphrase_bytes[:] = bytes(len(passphrase_bytes))
        yield key


def _offers_hash() -> bool:
    """Return whether OpenSSL offers the hash of scrypt: the library reports all of scrypt's failures as too little memory."""
    try:
        HKDF(SHA256(), 32, b"", b"").derive(b"")
    except (InternalError, UnsupportedAlgorithm):
        return False
    return True


@contextmanager
def _derived(file_key: bytearray, salt: bytes, info: bytes) -> Iterator[bytearray]:
    with _key(32) as key:
        HKDF(SHA256(), 32, salt, info).derive_into(file_key, key)
        yield key


def _mac(file_key: bytearray, header: bytes) -> HMAC:
    with _derived(file_key, b"", b"header") as key:
        mac = HMAC(key, SHA256())
    mac.update(header)
    return mac


def _encode(data: bytes) -> bytes:
    return b64encode(data).rstrip(b"=")


def _decode(text: bytes) -> bytes:
    data = b64decode(text + b"=" * (-len(text) % 4))
    if _encode(data) != text:
        raise PassphraseError("the header is damaged: its Base64 is not canonical")
    return data


def _without_armor(sealed_bytes: bytes) -> bytes:
    """Return the binary form of an armored file (strict PEM), and any other bytes unchanged."""
    text = sealed_bytes.strip(_WHITESPACE)
    if not text.startswith(b"-----BEGIN"):
        return sealed_bytes
    lines = text.replace(b"\r\n", b"\n").split(b"\n")
    try:
        data = b64decode(b"".join(lines[1:-1]), validate=True)
    except Base64Error:
        raise PassphraseError("the armor is damaged") from None
    # Comparing with the one form that these bytes have refuses every other: short and empty lines, and stray bits.
    if lines != [_ARMOR_BEGIN, *_wrapped(b64encode(data)), _ARMOR_END]:
        raise PassphraseError("the armor is damaged")
    return data


def _wrapped(text: bytes) -> Iterator[bytes]:
    return (text[start : start + _ARMOR_COLUMNS] for start in range(0, len(text), _ARMOR_COLUMNS))
