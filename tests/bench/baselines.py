"""Everything that is timed inside one process, as a step that is repeated. `worker` runs them by name.

The *bare loop* computes GenerateAndExportDataKey without its protection: one data key, sealed under a
master key exactly as a CiphertextBlob is (HKDF, AES-256-GCM, docs/ciphertext.md), encrypted to a public key that is parsed
once, both in Base64. No socket, no parameters, no caller, no grants, no record; keys are ordinary Python objects.
"""

import os
from binascii import b2a_base64
from collections.abc import Callable
from typing import Final

from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from gmssl import sm2
from support.keys import RecipientFor

from keyferry import libcrypto
from keyferry.module import SoftwareModule
from keyferry.sm2_ciphertext import der_to_raw
from keyferry_agent.crypto.aad import associated_data

__all__ = ["CMK", "CONTEXT", "KEY_ID", "LOOPS", "Step", "bare"]

Step = Callable[[], object]

CMK: Final = bytes(range(32))
CONTEXT: Final = {"tenant": "acme"}
_INFO: Final = b"keyferry CiphertextBlob 1 AES-256-GCM"
KEY_ID: Final = "00000000-0000-4000-8000-000000000000"
_HEADER: Final = KEY_ID.encode() + b"\x01"
_AAD: Final = associated_data(_HEADER, KEY_ID, CONTEXT)
_NONCE: Final = bytes(12)
_MIB: Final = bytes(1 << 20)
_OAEP: Final = padding.OAEP(padding.MGF1(SHA256()), SHA256(), None)


def _seal(data_key: bytes) -> bytes:
    salt = os.urandom(32)
    derived = HKDF(SHA256(), 64, salt, _INFO).derive(CMK)
    sealed = AESGCM(derived[:32]).encrypt(_NONCE, data_key, _AAD)
    return b"".join((_HEADER, salt, derived[32:], sealed))


def bare(wrap: Callable[[bytes], bytes], size: int) -> Callable[[], tuple[bytes, bytes]]:
    """Return one iteration of the bare loop, with the given last step."""

    def step() -> tuple[bytes, bytes]:
        data_key = os.urandom(size)
        blob = _seal(data_key)
        return b2a_base64(blob, newline=False), b2a_base64(wrap(data_key), newline=False)

    return step


def _bare_rsa(size: int) -> Step:
    public = rsa.generate_private_key(65537, 2048).public_key()
    return bare(lambda data_key: public.encrypt(data_key, _OAEP), size)


def _bare_sm2(size: int) -> Step:
    key = libcrypto.generate_sm2()
    return bare(lambda data_key: der_to_raw(key.encrypt(bytearray(data_key))), size)


def _gmssl_sm2(size: int) -> Step:
    der = libcrypto.generate_sm2().public_der()
    key = sm2.CryptSM2(private_key="", public_key=der[-64:].hex())
    return bare(key.encrypt, size)


def _rsa_decryption(_size: int) -> Step:
    private = rsa.generate_private_key(65537, 2048)
    wrapped = private.public_key().encrypt(bytes(32), _OAEP)
    return lambda: private.decrypt(wrapped, _OAEP)


def _module_import(size: int) -> Step:
    module, exported = _module(size)
    return lambda: module.forget(module.import_data_key(exported))


def _module(size: int) -> tuple[SoftwareModule, str]:
    module = SoftwareModule.generate("RSA_2048")
    return module, RecipientFor(module).wrap(os.urandom(size))


def _module_encrypt(size: int) -> Step:
    module, exported = _module(size)
    key = module.import_data_key(exported)
    return lambda: module.encrypt(key, _MIB, b"aad")


def _module_decrypt(size: int) -> Step:
    module, exported = _module(size)
    key = module.import_data_key(exported)
    sealed = module.encrypt(key, _MIB, b"aad")
    return lambda: module.decrypt(key, sealed, b"aad")


def _aead_encrypt(size: int) -> Step:
    key = AESGCM(os.urandom(size))
    return lambda: key.encrypt(os.urandom(12), _MIB, b"aad")


def _aead_decrypt(size: int) -> Step:
    key, nonce = AESGCM(os.urandom(size)), os.urandom(12)
    sealed = key.encrypt(nonce, _MIB, b"aad")
    return lambda: key.decrypt(nonce, sealed, b"aad")


LOOPS: Final[dict[str, Callable[[int], Step]]] = {
    "bare RSA_2048": _bare_rsa,
    "bare EC_SM2": _bare_sm2,
    "gmssl EC_SM2": _gmssl_sm2,
    "RSA decryption": _rsa_decryption,
    "module import": _module_import,
    "module encrypt": _module_encrypt,
    "module decrypt": _module_decrypt,
    "AEAD encrypt": _aead_encrypt,
    "AEAD decrypt": _aead_decrypt,
}
"""By name: from the bytes of a data key to the step that is repeated."""
