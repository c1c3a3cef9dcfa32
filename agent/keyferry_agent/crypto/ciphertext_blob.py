"""CiphertextBlob, format 0x01: seals bytes under a master key, and opens them again. docs/ciphertext.md is the specification.

    KeyVersionId (36) ‖ 0x01 ‖ salt (32) ‖ commitment (32) ‖ ciphertext ‖ tag (16)

    one-time key ‖ commitment = HKDF(hash, ikm = CMK, salt, info)                                    RFC 5869
    ciphertext ‖ tag          = GCM(one-time key, nonce = 0, associated data)                        SP 800-38D, RFC 8998

The one-time key serves one message only, which is why its nonce may be constant. Format 0x01 is never redefined.
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
"""Bytes that a CiphertextBlob is longer than what is sealed in it: 117."""
MOST: Final = 6_144
"""Bytes that are ever sealed in one blob: what Encrypt takes. A longer one was not made here."""


class SealError(Exception):
    """The blob does not open: damaged, another key, another context. Never says which: that would be an oracle."""


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
    # OpenSSL's vector AES returns with the round keys in registers, and with plaintext: a core dump holds them, and so does
    # the stack after a signal. Another AES takes their place.
    _OTHER.encrypt(_NONCE, _NOTHING, None)


def _sm4(key: memoryview) -> SM4:
    return SM4(key)  # type: ignore[arg-type]  # takes any buffer; only its annotation says bytes


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
"""Bytes of a master key by KeySpec."""


def seal(
    key_spec: str,
    cmk: memoryview,
    version_id: str,
    key_id: str,
    context: Mapping[str, str],
    plaintext: memoryview,
    scratch: SecretMemory,
) -> bytes:
    """Seal `plaintext` under the master key `cmk`: the bytes of a CiphertextBlob, `OVERHEAD` longer.

    `version_id` has 36 ASCII characters. Intermediate keys live in `scratch`.
    """
    return bind(key_spec, version_id, key_id, context).seal(cmk, plaintext, scratch)


class Bound(NamedTuple):
    """All of a CiphertextBlob that is known before what it seals: its suite, its header, and what it is bound to."""

    suite: "_Suite"
    header: bytes
    associated: bytes

    def seal(self, cmk: memoryview, plaintext: memoryview, scratch: SecretMemory, salt: bytes | None = None) -> bytes:
        """Seal `plaintext` under the master key `cmk`. `salt` is random; a vector gives its own."""
        suite, salt = self.suite, salt or os.urandom(_SALT)
        size = suite.key_size
        with scratch.borrow(size + _COMMITMENT) as derived:
            HKDF(suite.hash, size + _COMMITMENT, salt, suite.info).derive_into(cmk, derived)
            sealed = suite.encrypt(derived[:size], plaintext, self.associated)
            return b"".join((self.header, salt, derived[size:], sealed))


def bind(key_spec: str, version_id: str, key_id: str, context: Mapping[str, str]) -> Bound:
    """What seals under one version of a key and one context: for as many plaintexts as there are."""
    header = version_id.encode("ascii") + bytes([FORMAT])
    if len(header) != _HEADER:
        raise ValueError("a KeyVersionId has 36 characters")
    return Bound(_SUITES[key_spec], header, associated_data(header, key_id, context))


def key_version_id(blob: bytes) -> str:
    """The KeyVersionId that a blob names, before anything is known to be authentic. Raises `SealError`."""
    if not OVERHEAD < len(blob) <= OVERHEAD + MOST or blob[_VERSION_ID] != FORMAT or not blob[:_VERSION_ID].isascii():
        raise SealError
    return blob[:_VERSION_ID].decode("ascii")


def plaintext_size(blob: bytes) -> int:
    """How many bytes are sealed in a blob."""
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
    """Open a blob, whose `key_version_id` led to `cmk`, into `out` of exactly `plaintext_size` bytes.

    Raises `SealError`; then what is in `out` is worth nothing.
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
