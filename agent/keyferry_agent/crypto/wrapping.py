"""Wrapping: encryption of a data key under a cryptographic module's public key. One table defines all algorithms.

To add a wrapping algorithm: a line in `TABLE`, its check in `public_key`, its vectors, and its row in PROTOCOL.md.
"""

import functools
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

from keyferry import libcrypto
from keyferry.sm2_ciphertext import der_to_raw

from .public_key import check_rsa_2048, check_sm2, fingerprint

__all__ = ["TABLE", "Recipient", "Wrapping", "WrappingError", "find", "pairs", "recipient"]

_RSA_BYTES: Final = 256
_MAX_CACHED_KEYS: Final = 1_024
"""Most parsed public keys in the cache: parsing takes five times as long as wrapping; one key takes about 4 KiB."""


class WrappingError(Exception):
    """This system does not offer the algorithm. The message names the missing algorithm, and can be returned to the caller."""


class Wrapping(NamedTuple):
    """One pair of WrappingKeySpec and WrappingAlgorithm."""

    name: str
    capacity: int  # most bytes of a data key
    offload: bool  # takes half a millisecond or more, so it must not run on the event loop
    check: Callable[[bytes], None]
    wrapper: Callable[[libcrypto.Key], "Wrap"]
    missing: Callable[[], str | None]  # returns the algorithm that libcrypto lacks, for `libcrypto.why_missing`


Wrap: TypeAlias = Callable[[memoryview], bytes]


class Recipient(NamedTuple):
    """A module's public key, checked and loaded."""

    wrapping: Wrapping
    fingerprint: str
    wrap: Wrap
    """Encrypts a data key of at most `wrapping.capacity` bytes."""


def _oaep(name: str, digest: bytes, digest_size: int, digest_name: str) -> Wrapping:
    """Return the wrapping of RSAES-OAEP with one hash."""
    options = libcrypto.oaep(digest)

    def missing() -> str | None:
        if libcrypto.has_oaep(digest):
            return None
        return digest_name if libcrypto.has_oaep(b"sha256") else "RSA"

    capacity = _RSA_BYTES - 2 * digest_size - 2
    return Wrapping(
        name, capacity, offload=False, check=check_rsa_2048, wrapper=lambda key: key.encryptor(options), missing=missing
    )


def _missing_sm2() -> str | None:
    return None if libcrypto.has_sm2() else "SM2"


def _sm2(key: libcrypto.Key) -> Wrap:
    encrypt = key.encryptor()
    return lambda data_key: der_to_raw(encrypt(data_key))


TABLE: Final = {
    ("RSA_2048", "RSAES_OAEP_SHA_256"): _oaep("RSA_2048 with RSAES_OAEP_SHA_256", b"sha256", 32, "SHA-256"),
    ("RSA_2048", "RSAES_OAEP_SHA_1"): _oaep("RSA_2048 with RSAES_OAEP_SHA_1", b"sha1", 20, "SHA-1"),
    # The cloud accepts up to 6,047 bytes of plaintext for SM2PKE.
    ("EC_SM2", "SM2PKE"): Wrapping(
        "EC_SM2 with SM2PKE", 6_047, offload=True, check=check_sm2, wrapper=_sm2, missing=_missing_sm2
    ),
}


def find(key_spec: str, algorithm: str) -> Wrapping | None:
    """Return the wrapping for a WrappingKeySpec and a WrappingAlgorithm; None for a pair that does not match."""
    return TABLE.get((key_spec, algorithm))


def pairs() -> str:
    """Return the names of all pairs, for an error message."""
    return ", ".join(wrapping.name for wrapping in TABLE.values())


@functools.lru_cache(maxsize=_MAX_CACHED_KEYS)
def recipient(wrapping: Wrapping, der: bytes, *, sm2_fallback: bool) -> Recipient:
    """Check and load a public key.

    Raises `PublicKeyError` for an unacceptable key, `WrappingError` if the system does not offer the algorithm, and
    `LibcryptoError` if libcrypto fails with an acceptable key: that is not the caller's mistake.
    """
    wrapping.check(der)
    missing = wrapping.missing()
    if missing is None:
        return Recipient(wrapping, fingerprint(der), wrapping.wrapper(libcrypto.public_key(der)))
    if wrapping.wrapper is not _sm2 or not sm2_fallback:
        raise WrappingError(f"{wrapping.name} is not available without {missing}: {libcrypto.why_missing(missing)}.")
    from . import sm2_gmssl  # noqa: PLC0415 - takes 15 ms to import, and most systems never need it

    return Recipient(wrapping, fingerprint(der), functools.partial(sm2_gmssl.encrypt, der[-64:]))
