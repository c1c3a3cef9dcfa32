"""A second implementation of CiphertextBlob, written from docs/ciphertext.md alone. It shares no code with the agent and no
library with it either: HKDF, GCM and the associated data are spelled out here, over the standard library's HMAC-SHA-256,
pycryptodomex's AES block, and gmssl's SM3 and SM4 block. Slow and readable: for tests, and for making their vectors.
"""

import hmac
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from Cryptodome.Cipher import AES
from gmssl import sm3
from gmssl.sm4 import SM4_ENCRYPT, CryptSM4

Block = Callable[[bytes], bytes]


class NotAuthentic(Exception):
    """The blob does not open under this key, key ID and context."""


def _hmac_sha256(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _sm3(message: bytes) -> bytes:
    return bytes.fromhex(sm3.sm3_hash(list(message)))  # a list of its own: sm3_hash appends its padding to it


def _hmac_sm3(key: bytes, message: bytes) -> bytes:
    """RFC 2104, over SM3's blocks of 64 bytes."""
    padded = (_sm3(key) if len(key) > 64 else key).ljust(64, b"\0")
    inner = _sm3(bytes(byte ^ 0x36 for byte in padded) + message)
    return _sm3(bytes(byte ^ 0x5C for byte in padded) + inner)


def _aes_block(key: bytes) -> Block:
    return AES.new(key, AES.MODE_ECB).encrypt


def _sm4_block(key: bytes) -> Block:
    cipher = CryptSM4()
    cipher.set_key(key, SM4_ENCRYPT)
    return lambda block: bytes(cipher.one_round(cipher.sk, list(block)))


class _Suite(NamedTuple):
    key_size: int
    hmac: Callable[[bytes, bytes], bytes]  # both hashes give 32 bytes
    block: Callable[[bytes], Block]
    info: bytes


SUITES = {
    "Aliyun_AES_256": _Suite(32, _hmac_sha256, _aes_block, b"keyferry CiphertextBlob 1 AES-256-GCM"),
    "Aliyun_SM4": _Suite(16, _hmac_sm3, _sm4_block, b"keyferry CiphertextBlob 1 SM4-GCM"),
}


def _hkdf(suite: _Suite, ikm: bytes, salt: bytes, length: int) -> bytes:
    """RFC 5869: extract, then expand."""
    prk = suite.hmac(salt, ikm)
    okm = previous = b""
    while len(okm) < length:
        previous = suite.hmac(prk, previous + suite.info + bytes([len(okm) // 32 + 1]))
        okm += previous
    return okm[:length]


def _multiply(x: int, y: int) -> int:
    """The product in GF(2^128) of SP 800-38D, 6.3: the leftmost bit is the coefficient of the lowest power."""
    product = 0
    for bit in range(127, -1, -1):
        if x >> bit & 1:
            product ^= y
        y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
    return product


def _counter_mode(block: Block, data: bytes) -> bytes:
    """SP 800-38D, 6.5, from the counter block after J0 = 12 zero bytes and the number 1."""
    count = range(2, -(-len(data) // 16) + 2)
    stream = b"".join(block(bytes(12) + struct.pack(">I", counter)) for counter in count)
    return bytes(a ^ b for a, b in zip(data, stream, strict=False))


def _tag(block: Block, aad: bytes, ciphertext: bytes) -> bytes:
    """SP 800-38D, 7.1: GHASH over both, each padded, and their lengths in bits; encrypted under J0."""
    h = int.from_bytes(block(bytes(16)), "big")
    padded = [part + bytes(-len(part) % 16) for part in (aad, ciphertext)]
    hashed = b"".join(padded) + struct.pack(">QQ", 8 * len(aad), 8 * len(ciphertext))
    y = 0
    for start in range(0, len(hashed), 16):
        y = _multiply(y ^ int.from_bytes(hashed[start : start + 16], "big"), h)
    return (y ^ int.from_bytes(block(bytes(12) + struct.pack(">I", 1)), "big")).to_bytes(16, "big")


def _string(text: str) -> bytes:
    utf8 = text.encode("utf-8")
    return struct.pack(">I", len(utf8)) + utf8


def associated_data(header: bytes, key_id: str, context: Mapping[str, str] | None) -> bytes:
    """The section "Associated data": `header` is the blob's first 37 bytes."""
    encoded = header + _string(key_id) + struct.pack(">I", len(context or {}))
    for key in sorted(context or {}, key=lambda text: text.encode("utf-8")):
        encoded += _string(key) + _string((context or {})[key])
    return encoded


def read_associated_data(encoded: bytes) -> tuple[bytes, str, dict[str, str]]:
    """Return header, key ID and context. Raises ValueError, also for data that `associated_data` never returns."""
    position = 37

    def take(size: int) -> bytes:
        nonlocal position
        position += size
        if position > len(encoded):
            raise ValueError("the associated data is cut off")
        return encoded[position - size : position]

    def string() -> str:
        return take(int.from_bytes(take(4), "big")).decode("utf-8")

    key_id = string()
    parts = [(string(), string()) for _ in range(int.from_bytes(take(4), "big"))]
    header, context = encoded[:37], dict(parts)
    if associated_data(header, key_id, context) != encoded:
        raise ValueError("the associated data is not in its one form")
    return header, key_id, context


def _derive(suite: _Suite, cmk: bytes, salt: bytes) -> tuple[Block, bytes]:
    """The block cipher under the one-time key, and the commitment."""
    if len(cmk) != suite.key_size:
        raise ValueError("the master key has another length")
    okm = _hkdf(suite, cmk, salt, suite.key_size + 32)
    return suite.block(okm[: suite.key_size]), okm[suite.key_size :]


def seal_blob(
    key_spec: str,
    cmk: bytes,
    version_id: str,
    key_id: str,
    context: Mapping[str, str] | None,
    plaintext: bytes,
    salt: bytes,
    format_byte: int = 0x01,
) -> bytes:
    """Return the CiphertextBlob, before Base64, with this salt. Only blobs to be refused have another format byte."""
    header = version_id.encode("ascii") + bytes([format_byte])
    block, commitment = _derive(SUITES[key_spec], cmk, salt)
    ciphertext = _counter_mode(block, plaintext)
    return header + salt + commitment + ciphertext + _tag(block, associated_data(header, key_id, context), ciphertext)


def open_blob(key_spec: str, cmk: bytes, key_id: str, context: Mapping[str, str] | None, blob: bytes) -> bytes:
    """The plaintext of a CiphertextBlob after Base64. Raises `NotAuthentic`."""
    if len(blob) < 36 + 1 + 32 + 32 + 1 + 16 or blob[36] != 0x01:
        raise NotAuthentic
    header, salt, commitment, ciphertext, tag = blob[:37], blob[37:69], blob[69:101], blob[101:-16], blob[-16:]
    block, expected = _derive(SUITES[key_spec], cmk, salt)
    if commitment != expected or tag != _tag(block, associated_data(header, key_id, context), ciphertext):
        raise NotAuthentic
    return _counter_mode(block, ciphertext)
