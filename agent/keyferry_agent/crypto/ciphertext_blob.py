"""CiphertextBlob, format 0x01: encryption of bytes under a master key, and decryption. docs/ciphertext.md specifies it.

    KeyVersionId (36) ‖ 0x01 ‖ salt (32) ‖ commitment (32) ‖ ciphertext ‖ tag (16)

    one-time key ‖ commitment = HKDF(hash, ikm = CMK, salt, info)                                    RFC 5869
    ciphertext ‖ tag          = GCM(one-time key, nonce = 0, associated data)                        SP 800-38D, RFC 8998

The one-time key encrypts only one message, so its nonce may be constant. Format 0x01 is never redefined.
"""

import hmac
import os
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import SM4
from cryptography.hazmat.primitives.hashes import SHA256, SM3, HashAlgorithm
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keyferry.secret import SecretMemory

from .aad import associated_data

__all__ = [
    "FORMAT",
    "KEY_SIZES",
    "MOST",
    "OVERHEAD",
    "Bound",
    "SealError",
    "bind",
    "key_version_id",
    "open_into",
    "plaintext_size",
    "seal",
]

FORMAT: Final = 0x01
_VERSION_ID: Final = 36
_HEADER: Final = _VERSION_ID + 1
_SALT: Final = 32
_COMMITMENT: Final = 32
_TAG: Final = 16
_NONCE: Final = bytes(12)
_NOTHING: Final = bytes(32)
OVERHEAD: Final = _HEADER + _SALT + _COMMITMENT + _TAG
"""Bytes that a CiphertextBlob is longer than its plaintext: 117."""
MOST: Final = 6_144
"""Most bytes of plaintext in one blob: the limit of Encrypt. A longer blob was not made by an agent."""


class SealError(Exception):
    """The blob does not decrypt: it is damaged, or was made under another key or EncryptionContext.

    The error does not distinguish the causes: that would be an oracle.
    """


class _Suite(NamedTuple):
    """The algorithms of one key spec. To add a key spec: a line in `_SUITES`, and its vectors."""

    key_size: int
    hash: HashAlgorithm
    info: bytes
    encrypt: Callable[[memoryview, memoryview, bytes], bytes]
    decrypt_into: Callable[[memoryview, memoryview, bytes, memoryview], None]


def _aes_encrypt(key: memoryview, plaintext: memoryview, aad: bytes) -> bytes:
    try:
        return AESGCM(key).encrypt(_NONCE, plaintext, aad)
    finally:
        _clear_registers()


def _aes_decrypt_into(key: memoryview, sealed: memoryview, aad: bytes, out: memoryview) -> None:
    try:
        AESGCM(key).decrypt_into(_NONCE, sealed, aad, out)
    finally:
        _clear_registers()


_OTHER: Final = AESGCM(_NOTHING)


def _clear_registers() -> None:
    # OpenSSL's vector AES leaves the round keys and plaintext in registers. A core dump contains the registers, and so does
    # the stack after a signal. An encryption under another key overwrites them.
    _OTHER.encrypt(_NONCE, _NOTHING, None)


def _sm4(key: memoryview) -> SM4:
    return SM4(key)  # type: ignore[arg-type]  # accepts any buffer, although its annotation is bytes


def _sm4_encrypt(key: memoryview, plaintext: memoryview, aad: bytes) -> bytes:
    encryptor = Cipher(_sm4(key), modes.GCM(_NONCE)).encryptor()
    encryptor.authenticate_additional_data(aad)
    return encryptor.update(plaintext) + encryptor.finalize() + encryptor.tag


def _sm4_decrypt_into(key: memoryview, sealed: memoryview, aad: bytes, out: memoryview) -> None:
    decryptor = Cipher(_sm4(key), modes.GCM(_NONCE, bytes(sealed[-_TAG:]))).decryptor()
    decryptor.authenticate_additional_data(aad)
    decryptor.update_into(sealed[:-_TAG], out)
    decryptor.finalize()


_SUITES: Final = {
    "Aliyun_AES_256": _Suite(32, SHA256(), b"keyferry CiphertextBlob 1 AES-256-GCM", _aes_encrypt, _aes_decrypt_into),
    "Aliyun_SM4": _Suite(16, SM3(), b"keyferry CiphertextBlob 1 SM4-GCM", _sm4_encrypt, _sm4_decrypt_into),
}
KEY_SIZES: Final[Mapping[str, int]] = {spec: suite.key_size for spec, suite in _SUITES.items()}
"""Bytes of a master key, by KeySpec."""


def seal(
    key_spec: str,
    cmk: memoryview,
    version_id: str,
    key_id: str,
    context: Mapping[str, str],
    plaintext: memoryview,
    scratch: SecretMemory,
) -> bytes:
    """Encrypt `plaintext` under the master key `cmk`; return a CiphertextBlob, which is `OVERHEAD` bytes longer.

    `version_id` has 36 ASCII characters. Intermediate keys are in `scratch`.
    """
    return bind(key_spec, version_id, key_id, context).seal(cmk, plaintext, scratch)


class Bound(NamedTuple):
    """The parts of a CiphertextBlob that do not depend on its plaintext: the suite, the header and the associated data."""

    suite: "_Suite"
    header: bytes
    associated: bytes

    def seal(self, cmk: memoryview, plaintext: memoryview, scratch: SecretMemory, salt: bytes | None = None) -> bytes:
        """Encrypt `plaintext` under the master key `cmk`; return a CiphertextBlob. `salt` is random, except in test vectors."""
        suite, salt = self.suite, salt or os.urandom(_SALT)
        size = suite.key_size
        with scratch.borrow(size + _COMMITMENT) as derived:
            HKDF(suite.hash, size + _COMMITMENT, salt, suite.info).derive_into(cmk, derived)
            sealed = suite.encrypt(derived[:size], plaintext, self.associated)
            return b"".join((self.header, salt, derived[size:], sealed))


def bind(key_spec: str, version_id: str, key_id: str, context: Mapping[str, str]) -> Bound:
    """Return the `Bound` for one key version and one EncryptionContext, reusable for any number of plaintexts."""
    header = version_id.encode("ascii") + bytes([FORMAT])
    if len(header) != _HEADER:
        raise ValueError("a KeyVersionId has 36 characters")
    return Bound(_SUITES[key_spec], header, associated_data(header, key_id, context))


def key_version_id(blob: bytes) -> str:
    """Return the KeyVersionId in a blob, which is not authenticated yet. Raises `SealError`."""
    if not OVERHEAD < len(blob) <= OVERHEAD + MOST or blob[_VERSION_ID] != FORMAT or not blob[:_VERSION_ID].isascii():
        raise SealError
    return blob[:_VERSION_ID].decode("ascii")


def plaintext_size(blob: bytes) -> int:
    """Return the number of bytes of plaintext in a blob."""
    return len(blob) - OVERHEAD


def open_into(
    key_spec: str,
    cmk: memoryview,
    blob: bytes,
    key_id: str,
    context: Mapping[str, str],
    out: memoryview,
    scratch: SecretMemory,
) -> None:
    """Decrypt a blob under `cmk`, the key version that it names, into `out` of exactly `plaintext_size` bytes.

    Raises `SealError`; the content of `out` is then undefined and must not be used.
    """
    suite = _SUITES[key_spec]
    view = memoryview(blob)
    salt, commitment = view[_HEADER : _HEADER + _SALT], view[_HEADER + _SALT : _HEADER + _SALT + _COMMITMENT]
    sealed = view[_HEADER + _SALT + _COMMITMENT :]
    with scratch.borrow(suite.key_size + _COMMITMENT) as derived:
        HKDF(suite.hash, len(derived), bytes(salt), suite.info).derive_into(cmk, derived)
        if not hmac.compare_digest(derived[suite.key_size :], commitment):
            raise SealError
        try:
            suite.decrypt_into(
                derived[: suite.key_size], sealed, associated_data(bytes(view[:_HEADER]), key_id, context), out
            )
        except InvalidTag:
            raise SealError from None
