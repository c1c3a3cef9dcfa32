"""SM2 public-key encryption for hosts whose libcrypto was built without SM2. Opt-in (`sm2_fallback = "gmssl"`), and slow.

Only gmssl's curve arithmetic is used. This module never calls gmssl's own `encrypt`. That function takes its nonce from a
Mersenne Twister, from which data keys were recovered; it does not check points, and returns None when a mask is zero. Here the
nonce comes from the operating system, the key is on the curve (`public_key` checked it), and for a zero mask a new nonce is
drawn (GB/T 32918.4-2016).

Some properties remain worse than libcrypto's: pure-Python arithmetic takes about 8 ms, holds the interpreter's lock, is not
constant time, and leaves the data key and the nonce in ordinary memory.
"""

import hmac
import secrets
from typing import Final

from cryptography.hazmat.primitives.hashes import SM3, Hash
from gmssl.sm2 import CryptSM2, default_ecc_table

from keyferry.sm2_ciphertext import RAW_OVERHEAD

from .public_key import on_sm2_curve

__all__ = ["decrypt", "encrypt"]

_N: Final = int(default_ecc_table["n"], 16)
_G: Final[str] = default_ecc_table["g"]
_multiply: Final = CryptSM2("", "")._kg  # noqa: SLF001 - gmssl has no public name for it


def encrypt(point: bytes, plaintext: memoryview | bytearray) -> bytes:
    """Encrypt to the public key `x ‖ y` (64 bytes, on the curve); return `04 ‖ x1 ‖ y1 ‖ C3 ‖ C2`.

    Raises ValueError for an empty plaintext.
    """
    if not plaintext:
        raise ValueError("there is nothing to encrypt")
    while True:
        ciphertext = _encrypt(point, plaintext, 1 + secrets.randbelow(_N - 1))
        if ciphertext is not None:
            return ciphertext


def _encrypt(point: bytes, plaintext: memoryview | bytearray, k: int) -> bytes | None:
    """Encrypt under the nonce k in [1, n-1]. Return None if the mask is all zero, so that a new k has to be drawn."""
    c1 = bytes.fromhex(_multiply(k, _G))
    shared_point = bytes.fromhex(_multiply(k, point.hex()))
    mask = _kdf(shared_point, len(plaintext))
    if not any(mask):
        return None
    c2 = bytes(a ^ b for a, b in zip(plaintext, mask, strict=True))
    c3 = Hash.hash(SM3(), shared_point[:32] + bytes(plaintext) + shared_point[32:])
    return b"\x04" + c1 + c3 + c2


def decrypt(d: int, raw: bytes) -> bytes:
    """Decrypt `04 ‖ x1 ‖ y1 ‖ C3 ‖ C2` with the private key `d`; only for the self-test at start. Raises ValueError."""
    c1, c3, c2 = raw[1:65], raw[65:RAW_OVERHEAD], raw[RAW_OVERHEAD:]
    if raw[:1] != b"\x04" or not on_sm2_curve(int.from_bytes(c1[:32], "big"), int.from_bytes(c1[32:], "big")):
        raise ValueError("C1 is not a point of the curve")
    shared_point = bytes.fromhex(_multiply(d, c1.hex()))
    mask = _kdf(shared_point, len(c2))
    if not any(mask):
        raise ValueError("the mask is all zero, or C2 is empty")
    plaintext = bytes(a ^ b for a, b in zip(c2, mask, strict=True))
    if not hmac.compare_digest(Hash.hash(SM3(), shared_point[:32] + plaintext + shared_point[32:]), c3):
        raise ValueError("C3 does not match")
    return plaintext


def _kdf(shared_point: bytes, size: int) -> bytes:
    """Return `size` bytes of the key derivation of GB/T 32918.4-2016, 5.4.3: SM3 over the input and a counter from 1."""
    blocks = (Hash.hash(SM3(), shared_point + counter.to_bytes(4, "big")) for counter in range(1, -(-size // 32) + 1))
    return b"".join(blocks)[:size]
