"""Strict checks of a recipient's public key, before a more liberal library uses it.

Each kind of key is accepted in one encoding only: the usual DER SubjectPublicKeyInfo. Refused with a reason are other curves
and sizes, trailing bytes, BER, explicit parameters, compressed points, points off the curve, and RSA exponents and moduli that
are weak or that would make a single encryption cost a hundred times as much.
"""

import hashlib
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

__all__ = ["PublicKeyError", "check_rsa_2048", "check_sm2", "fingerprint", "on_sm2_curve"]

_RSA_BITS: Final = 2048
_MAX_EXPONENT: Final = 2**32
"""Limit of an RSA exponent. One encryption with an exponent as long as the modulus takes 78 times as long, so that a caller
could stall the agent with such keys.
"""

# SEQUENCE { SEQUENCE { OID id-ecPublicKey, OID sm2p256v1 }, BIT STRING { 04 ‖ x ‖ y } }: the first 27 bytes are constant.
_SM2_PREFIX: Final = bytes.fromhex("3059301306072a8648ce3d020106082a811ccf5501822d03420004")
_SM2_SIZE: Final = 91

# GB/T 32918.5-2017, the recommended curve.
_P: Final = 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF00000000FFFFFFFFFFFFFFFF
_A: Final = _P - 3
_B: Final = 0x28E9FA9E9D9F5E344D5A9E4BCF6509A7F39789F515AB8F92DDBCBD414D940E93


class PublicKeyError(ValueError):
    """The key is not acceptable. The message contains the reason, and can be returned to the caller."""


def fingerprint(der: bytes) -> str:
    """Return a public key's fingerprint, as in a grant's `recipients`: "sha256:" and the hex SHA-256 of the DER."""
    return "sha256:" + hashlib.sha256(der).hexdigest()


def check_rsa_2048(der: bytes) -> None:
    """Raise `PublicKeyError` unless this is the DER of an RSA key of 2048 bits with an odd exponent from 3 to 2^32."""
    try:
        key = load_der_public_key(der)
    except UnsupportedAlgorithm:
        raise PublicKeyError("it is not an RSA key, as WrappingKeySpec says.") from None
    except ValueError:
        # The library does not distinguish the causes: it also refuses even exponents, and exponents below 3.
        raise PublicKeyError(
            "it is not the strict DER SubjectPublicKeyInfo of a public key, has bytes after it, or a weak exponent."
        ) from None
    if not isinstance(key, RSAPublicKey):
        raise PublicKeyError("it is not an RSA key, as WrappingKeySpec says.")
    if key.key_size != _RSA_BITS:
        raise PublicKeyError(f"it is an RSA key of {key.key_size} bits; RSA_2048 is expected.")
    numbers = key.public_numbers()
    if not numbers.e & 1 or not 3 <= numbers.e <= _MAX_EXPONENT:
        raise PublicKeyError("its public exponent is not an odd number from 3 to 2^32.")
    if not numbers.n & 1:
        raise PublicKeyError("its modulus is even.")
    if key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != der:
        raise PublicKeyError("it is not in the one DER encoding of a SubjectPublicKeyInfo.")


def check_sm2(der: bytes) -> None:
    """Raise `PublicKeyError` unless this is the DER of an SM2 key: named curve, uncompressed point on the curve."""
    if not der.startswith(_SM2_PREFIX):
        raise PublicKeyError("it is not the DER SubjectPublicKeyInfo of an uncompressed key on the SM2 curve.")
    if len(der) != _SM2_SIZE:
        raise PublicKeyError(f"it has {len(der)} bytes; the DER of an SM2 key has {_SM2_SIZE}.")
    point = der[len(_SM2_PREFIX) :]
    if not on_sm2_curve(int.from_bytes(point[:32], "big"), int.from_bytes(point[32:], "big")):
        raise PublicKeyError("its point is not on the SM2 curve.")


def on_sm2_curve(x: int, y: int) -> bool:
    """Return True if (x, y) is a point of the SM2 curve: coordinates below p that satisfy y² = x³ + ax + b."""
    return 0 <= x < _P and 0 <= y < _P and (y * y - (x * x * x + _A * x + _B)) % _P == 0
