"""Recipients for tests: key pairs of both kinds, made once, and a way to unwrap that the product does not use."""

import functools
from typing import Any, NamedTuple

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keyferry import libcrypto
from keyferry.module import CryptographicModule
from keyferry.parameters import decode_base64, encode_base64
from keyferry.secret import SCRATCH_SIZES, SecretMemory
from keyferry.sm2_ciphertext import raw_to_der
from keyferry_agent.crypto import wrapping

HASHES: dict[str, hashes.HashAlgorithm] = {
    "RSAES_OAEP_SHA_256": hashes.SHA256(),
    "RSAES_OAEP_SHA_1": hashes.SHA1(),
}


class Recipient(NamedTuple):
    """A private key, and the three parameters that export a data key to it."""

    private: Any
    der: bytes
    wrapping_key_spec: str
    wrapping_algorithm: str

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as they go over the wire."""
        return {
            "PublicKeyBlob": encode_base64(self.der),
            "WrappingKeySpec": self.wrapping_key_spec,
            "WrappingAlgorithm": self.wrapping_algorithm,
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """The same as arguments of the client."""
        return {
            "public_key_blob": self.der,
            "wrapping_key_spec": self.wrapping_key_spec,
            "wrapping_algorithm": self.wrapping_algorithm,
        }

    def unwrap(self, exported: str) -> bytes:
        """The data key in an ExportedDataKey."""
        wrapped = decode_base64(exported)
        if self.wrapping_key_spec == "EC_SM2":
            opened = bytearray(len(wrapped) + 64)
            return bytes(opened[: self.private.decrypt_into(bytearray(raw_to_der(wrapped)), opened)])
        digest = HASHES[self.wrapping_algorithm]
        plaintext: bytes = self.private.decrypt(wrapped, padding.OAEP(padding.MGF1(digest), digest, None))
        return plaintext


@functools.cache
def rsa_private_key() -> rsa.RSAPrivateKey:
    """One RSA-2048 key for the whole run."""
    return rsa.generate_private_key(65537, 2048)


def spki(key: Any) -> bytes:
    """The DER SubjectPublicKeyInfo of one of `cryptography`'s private keys."""
    der: bytes = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return der


@functools.cache
def recipient(algorithm: str) -> Recipient:
    """A recipient for a WrappingAlgorithm."""
    if algorithm == "SM2PKE":
        key = libcrypto.generate_sm2()
        return Recipient(key, key.public_der(), "EC_SM2", algorithm)
    private = rsa_private_key()
    return Recipient(private, spki(private), "RSA_2048", algorithm)


ALGORITHMS = ("RSAES_OAEP_SHA_256", "RSAES_OAEP_SHA_1", "SM2PKE")


class RecipientFor:
    """Exports data keys of the test's own choice to a module."""

    def __init__(self, module: CryptographicModule) -> None:
        way = wrapping.find(module.wrapping_key_spec, module.wrapping_algorithm)
        assert way is not None
        self._recipient = wrapping.recipient(way, decode_base64(module.public_key_blob), sm2_fallback=False)

    def wrap(self, data_key: bytes) -> str:
        """An ExportedDataKey with this data key."""
        return encode_base64(wrap(self._recipient, data_key))


def wrap(to: wrapping.Recipient, data_key: bytes) -> bytes:
    """Return a data key encrypted for a recipient, as the agent encrypts it."""
    return to.wrap(memoryview(bytearray(data_key)), _scratch())


@functools.cache
def _scratch() -> SecretMemory:
    return SecretMemory(sum(SCRATCH_SIZES), require=False)
