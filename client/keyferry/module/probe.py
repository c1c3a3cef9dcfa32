"""Tests a token when it is opened: its use of a throw-away key is better evidence than its own list of mechanisms."""

import contextlib
import os
from typing import Any, Final

import pkcs11
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .interface import NONCE_SIZE, ModuleError
from .token import Pkcs11Session, describe

__all__ = ["probe_token"]

_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "RSAES_OAEP_SHA_256": hashes.SHA256(),
    "RSAES_OAEP_SHA_1": hashes.SHA1(),  # noqa: S303 - OAEP does not need what SHA-1 lost; some tokens know nothing else
}


def probe_token(session: Pkcs11Session, public_key: rsa.RSAPublicKey) -> str:
    """Import a throw-away key, and use it in the token and in this process. Return the first WrappingAlgorithm that works.

    Raises `ModuleError`.
    """
    key_bytes, refusals = os.urandom(32), []
    for algorithm, digest in _HASHES.items():
        wrapped_key = public_key.encrypt(key_bytes, padding.OAEP(padding.MGF1(digest), digest, None))
        try:
            key = session.unwrap(wrapped_key, algorithm)
        except pkcs11.PKCS11Error as error:
            refusals.append(f"{algorithm}: {describe(error)}")
            continue
        try:
            _probe_key(session, key, key_bytes)
        finally:
            key.destroy()
        return algorithm
    raise ModuleError(f"the token does not unwrap an AES key into an object of its own ({'; '.join(refusals)})")


def _probe_key(session: Pkcs11Session, key: Any, key_bytes: bytes) -> None:
    with contextlib.suppress(pkcs11.PKCS11Error):
        if key[pkcs11.Attribute.VALUE]:
            raise ModuleError(
                "the token reports that an imported key cannot be read, but returns its value; use another token"
            )
    aes, nonce = AESGCM(key_bytes), os.urandom(NONCE_SIZE)
    try:
        ciphertext = session.encrypt(key, nonce, key_bytes, b"aad")
        plaintext = session.decrypt(key, nonce, aes.encrypt(nonce, b"", b"aad"), b"aad")
        is_compatible = plaintext == b"" and aes.decrypt(nonce, ciphertext, b"aad") == key_bytes
    except pkcs11.PKCS11Error as error:
        raise ModuleError(
            f"the token does not encrypt with AES-GCM under a nonce of 12 bytes: {describe(error)}"
        ) from None
    except InvalidTag:
        is_compatible = False
    if not is_compatible:
        raise ModuleError(
            "other modules cannot decrypt the token's AES-GCM ciphertexts; the token may choose the nonce itself"
        )
