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
    "MAX_PLAINTEXT_SIZE",
    "OVERHEAD",
    "BlobError",
    "Bound",
    "bind",
    "decrypt_into",
    "key_version_id",
    "plaintext_size",
]

FORMAT: Final = 0x01
_VERSION_ID_SIZE: Final = 36
_HEADER_SIZE: Final = _VERSION_ID_SIZE + 1
_SALT_SIZE: Final = 32
_COMMITMENT_SIZE: Final = 32
_TAG_SIZE: Final = 16
_NONCE: Final = bytes(12)
_ZERO_KEY: Final = bytes(32)
OVERHEAD: Final = _HEADER_SIZE + _SALT_SIZE + _COMMITMENT_SIZE + _TAG_SIZE
"""Bytes that a CiphertextBlob is longer than its plaintext: 117."""
MAX_PLAINTEXT_SIZE: Final = 6_144
"""Most bytes of plaintext in one blob: the limit of Encrypt. A longer blob was not made by an agent."""


class BlobError(Exception):
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


def _aes_decrypt_into(key: memoryview, ciphertext: memoryview, aad: bytes, out: memoryview) -> None:
    try:
        AESGCM(key).decrypt_into(_NONCE, ciphertext, aad, out)
    finally:
        _clear_registers()


_SCRUB_KEY: Final = AESGCM(_ZERO_KEY)


def _clear_registers() -> None:
    # OpenSSL's vector AES leaves the round keys and plaintext in registers. A core dump contains the registers, and so does
    # the stack after a signal. An encryption under another key overwrites them.
    _SCRUB_KEY.encrypt(_NONCE, _ZERO_KEY, None)


def _sm4(key: memoryview) -> SM4:
    return SM4(key)  # type: ignore[arg-type]  # accepts any buffer, although its annotation is bytes


def _sm4_encrypt(key: memoryview, plaintext: memoryview, aad: bytes) -> bytes:
    encryptor = Cipher(_sm4(key), modes.GCM(_NONCE)).encryptor()
    encryptor.authenticate_additional_data(aad)
    return encryptor.update(plaintext) + encryptor.finalize() + encryptor.tag


def _sm4_decrypt_into(key: memoryview, ciphertext: memoryview, aad: bytes, out: memoryview) -> None:
    decryptor = Cipher(_sm4(key), modes.GCM(_NONCE, bytes(ciphertext[-_TAG_SIZE:]))).decryptor()
    decryptor.authenticate_additional_data(aad)
    decryptor.update_into(ciphertext[:-_TAG_SIZE], out)
    decryptor.finalize()


_SUITES: Final = {
    "Aliyun_AES_256": _Suite(32, SHA256(), b"keyferry CiphertextBlob 1 AES-256-GCM", _aes_encrypt, _aes_decrypt_into),
    "Aliyun_SM4": _Suite(16, SM3(), b"keyferry CiphertextBlob 1 SM4-GCM", _sm4_encrypt, _sm4_decrypt_into),
}
KEY_SIZES: Final[Mapping[str, int]] = {spec: suite.key_size for spec, suite in _SUITES.items()}
"""Bytes of a master key, by KeySpec."""


class Bound(NamedTuple):
    """The parts of a CiphertextBlob that do not depend on its plaintext: the suite, the header and the associated data."""

    suite: "_Suite"
    header: bytes
    associated: bytes

    def encrypt(
        self, cmk: memoryview, plaintext: memoryview, scratch: SecretMemory, salt: bytes | None = None
    ) -> bytes:
        """Encrypt `plaintext` under the master key `cmk`; return a CiphertextBlob, which is `OVERHEAD` bytes longer.

        Intermediate keys are in `scratch`. `salt` is random, except in test vectors.
        """
        suite, salt = self.suite, salt or os.urandom(_SALT_SIZE)
        size = suite.key_size
        with scratch.borrow(size + _COMMITMENT_SIZE) as key_bytes:
            HKDF(suite.hash, size + _COMMITMENT_SIZE, salt, suite.info).derive_into(cmk, key_bytes)
            ciphertext = suite.encrypt(key_bytes[:size], plaintext, self.associated)
            return b"".join((self.header, salt, key_bytes[size:], ciphertext))


def bind(key_spec: str, version_id: str, key_id: str, context: Mapping[str, str]) -> Bound:
    """Return the `Bound` for one key version and one EncryptionContext, reusable for any number of plaintexts."""
    header = version_id.encode("ascii") + bytes([FORMAT])
    if len(header) != _HEADER_SIZE:
        raise ValueError("a KeyVersionId has 36 characters")
    return Bound(_SUITES[key_spec], header, associated_data(header, key_id, context))


def key_version_id(blob: bytes) -> str:
    """Return the KeyVersionId in a blob, which is not authenticated yet. Raises `BlobError`."""
    if (
        not OVERHEAD < len(blob) <= OVERHEAD + MAX_PLAINTEXT_SIZE
        or blob[_VERSION_ID_SIZE] != FORMAT
        or not blob[:_VERSION_ID_SIZE].isascii()
    ):
        raise BlobError
    return blob[:_VERSION_ID_SIZE].decode("ascii")


def plaintext_size(blob: bytes) -> int:
    """Return the number of bytes of plaintext in a blob."""
    return len(blob) - OVERHEAD


def decrypt_into(
    key_spec: str,
    cmk: memoryview,
    blob: bytes,
    key_id: str,
    context: Mapping[str, str],
    out: memoryview,
    scratch: SecretMemory,
) -> None:
    """Decrypt a blob under `cmk`, the key version that it names, into `out` of exactly `plaintext_size` bytes.

    Raises `BlobError`; the content of `out` is then undefined and must not be used.
    """
    suite = _SUITES[key_spec]
    view = memoryview(blob)
    salt, commitment = (
        view[_HEADER_SIZE : _HEADER_SIZE + _SALT_SIZE],
        view[_HEADER_SIZE + _SALT_SIZE : _HEADER_SIZE + _SALT_SIZE + _COMMITMENT_SIZE],
    )
    ciphertext = view[_HEADER_SIZE + _SALT_SIZE + _COMMITMENT_SIZE :]
    with scratch.borrow(suite.key_size + _COMMITMENT_SIZE) as key_bytes:
        HKDF(suite.hash, len(key_bytes), bytes(salt), suite.info).derive_into(cmk, key_bytes)
        if not hmac.compare_digest(key_bytes[suite.key_size :], commitment):
            raise BlobError
        try:
            suite.decrypt_into(
                key_bytes[: suite.key_size],
                ciphertext,
                associated_data(bytes(view[:_HEADER_SIZE]), key_id, context),
                out,
            )
        except InvalidTag:
            raise BlobError from None
