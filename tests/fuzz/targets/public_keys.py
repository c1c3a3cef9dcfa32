"""Public keys: an accepted key is the one encoding that two other parsers read as the same key."""

from contextlib import suppress
from typing import Any

from Cryptodome.Util.asn1 import DerBitString, DerInteger, DerNull, DerObjectId, DerSequence
from support.keys import wrap

from keyferry import libcrypto
from keyferry.protocol.rpc import pem_to_der
from keyferry_agent.crypto import wrapping
from keyferry_agent.crypto.public_key import PublicKeyError, check_rsa_2048, check_sm2

from ..memory_bound import assert_memory_bounded

_OAEP = wrapping.find("RSA_2048", "RSAES_OAEP_SHA_256")
_SM2PKE = wrapping.find("EC_SM2", "SM2PKE")
_SM2_HEAD = bytes.fromhex("3059301306072a8648ce3d020106082a811ccf5501822d03420004")


def public_key(data: bytes) -> None:
    """The DER of a SubjectPublicKeyInfo, for both kinds of key; or a PEM, which the client takes the armour off."""
    with suppress(ValueError):
        pem_to_der(data)
    as_rsa, as_sm2 = assert_memory_bounded(
        lambda: [_accepts(check, data) for check in (check_rsa_2048, check_sm2)], len(data), times=64
    )
    assert as_rsa == _is_rsa(data)
    assert not (as_rsa and as_sm2)
    if as_rsa:
        assert _OAEP is not None
        assert len(_wrapped(_OAEP, data)) == 256
    if as_sm2:
        assert data.startswith(_SM2_HEAD)
        assert libcrypto.public_key(data).is_a(b"SM2")
        assert _SM2PKE is not None
        assert len(_wrapped(_SM2PKE, data)) == 97 + 32
    elif data.startswith(_SM2_HEAD) and len(data) == 91:
        assert not _libcrypto_takes(data), "a point that only libcrypto takes"


def _accepts(check: object, data: bytes) -> bool:
    assert callable(check)
    try:
        check(data)
    except PublicKeyError as error:
        assert len(str(error)) < 200
        return False
    return True


def _wrapped(way: wrapping.Wrapping, der: bytes) -> bytes:
    return wrap(wrapping.recipient(way, der, sm2_fallback=False), bytes(32))


def _is_rsa(data: bytes) -> bool:
    """By pycryptodomex's reader of DER, and written anew: the one DER of it. (Its reader of keys refuses more: an exponent that
    has a factor in common with the modulus, which hurts only whoever sends such a key.)
    """
    try:
        outer: Any = DerSequence().decode(data, strict=True)
        inner: Any = DerSequence().decode(DerBitString().decode(outer[1], strict=True).value, strict=True)
        n, e = inner
    except (ValueError, IndexError, TypeError):
        return False
    if not isinstance(n, int) or not isinstance(e, int):
        return False
    if n.bit_length() != 2048 or n < 0 or not n & 1 or not (e & 1 and 3 <= e <= 2**32):
        return False
    algorithm = DerSequence([DerObjectId("1.2.840.113549.1.1.1"), DerNull()])
    numbers = DerSequence([DerInteger(n), DerInteger(e)])
    return bool(DerSequence([algorithm, DerBitString(numbers.encode())]).encode() == data)


def _libcrypto_takes(data: bytes) -> bool:
    try:
        libcrypto.public_key(data)
    except libcrypto.LibcryptoError:
        return False
    return True
