"""The three forms of an SM2 ciphertext, and the ways from one to another.

raw   `04 ‖ x ‖ y ‖ C3 ‖ C2` (C1C3C2, GB/T 32918.4-2016): what travels in ExportedDataKey; 97 bytes longer than the data
DER   `SEQUENCE { INTEGER x, INTEGER y, OCTET STRING C3, OCTET STRING C2 }` (GM/T 0009-2012): what OpenSSL and many modules take
SDF   `x (64) ‖ y (64) ‖ M (32) ‖ L (4) ‖ C (L)`, the C structure ECCCipher of GM/T 0018 (2012, and 2023): what hardware modules
      take that import through SDF_ImportKeyWithISK_ECC; M is C3, C is C2. docs/modules.md says where each detail is from

All readers are strict: one ciphertext has exactly one text in each form. None looks inside C2; that x ‖ y is on the
curve, and that C3 is right, is for whoever decrypts to check.
"""

import struct
from typing import Final

__all__ = ["RAW_OVERHEAD", "der_to_raw", "raw_to_der", "raw_to_sdf", "sdf_to_raw"]

_COORDINATE: Final = 32
_C3: Final = 32
_POINT: Final = 1 + 2 * _COORDINATE
RAW_OVERHEAD: Final = _POINT + _C3
"""Bytes that the raw form adds to the data: 97."""

_INTEGER: Final = 0x02
_OCTET_STRING: Final = 0x04
_SEQUENCE: Final = 0x30
_LONGEST_LENGTH: Final = 2
"""Bytes that a DER length may take here: enough for 64 KiB, which is more than a message carries."""

_ECC_CIPHER: Final = struct.Struct("=64s64s32sI")
"""ECCCipher up to its C. The structure is passed in memory, so L has the host's byte order; no member needs padding."""
_UNUSED: Final = bytes(64 - _COORDINATE)
"""ECCCipher has room for coordinates of 512 bits. One of 256 is a big-endian number at the end of it, after these zeros."""


def raw_to_der(raw: bytes) -> bytes:
    """Convert C1C3C2 with its 04 prefix to the DER of GM/T 0009. Raises ValueError, also for more than 64 KiB."""
    x, y, c3, c2 = _split(raw)
    body = _integer(x) + _integer(y) + _tagged(_OCTET_STRING, c3) + _tagged(_OCTET_STRING, c2)
    if len(body) >= 1 << 8 * _LONGEST_LENGTH:
        raise ValueError("an SM2 ciphertext of more than 64 KiB")
    return _tagged(_SEQUENCE, body)


def raw_to_sdf(raw: bytes) -> bytes:
    """Convert C1C3C2 with its 04 prefix to the ECCCipher of GM/T 0018, as this host has it in memory. Raises ValueError."""
    x, y, c3, c2 = _split(raw)
    return _ECC_CIPHER.pack(_UNUSED + x, _UNUSED + y, c3, len(c2)) + c2


def sdf_to_raw(ecc_cipher: bytes) -> bytes:
    """Convert an ECCCipher of GM/T 0018, exactly 164 + L bytes of it, to C1C3C2 with its 04 prefix. Raises ValueError."""
    size = _ECC_CIPHER.size
    if len(ecc_cipher) <= size:
        raise ValueError("not an ECCCipher: expected x, y, M, L and at least one byte of C")
    x, y, c3, length = _ECC_CIPHER.unpack_from(ecc_cipher)
    if length != len(ecc_cipher) - size:
        raise ValueError(f"an ECCCipher whose L is {length}, with {len(ecc_cipher) - size} bytes of C")
    if not x.startswith(_UNUSED) or not y.startswith(_UNUSED):
        raise ValueError("a coordinate of an ECCCipher is longer than 256 bits, or not at the end of its 64 bytes")
    return b"".join((b"\x04", x[len(_UNUSED) :], y[len(_UNUSED) :], c3, ecc_cipher[size:]))


def der_to_raw(der: bytes) -> bytes:
    """Convert the DER of GM/T 0009 to C1C3C2 with its 04 prefix. Raises ValueError, also for any other encoding (BER)."""
    body, rest = _take(_SEQUENCE, der)
    if rest:
        raise ValueError("bytes after the SM2 ciphertext")
    x, body = _take(_INTEGER, body)
    y, body = _take(_INTEGER, body)
    c3, body = _take(_OCTET_STRING, body)
    c2, body = _take(_OCTET_STRING, body)
    if body or len(c3) != _C3 or not c2:
        raise ValueError("not an SM2 ciphertext: expected x, y, 32 bytes of C3 and at least one byte of C2")
    return b"\x04" + _coordinate(x) + _coordinate(y) + c3 + c2


def _split(raw: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Split C1C3C2 with its 04 prefix: x, y, C3, C2."""
    if len(raw) <= RAW_OVERHEAD or raw[0] != 0x04:
        raise ValueError("not a raw SM2 ciphertext: expected 04, two coordinates, C3 and at least one byte of C2")
    return raw[1 : 1 + _COORDINATE], raw[1 + _COORDINATE : _POINT], raw[_POINT:RAW_OVERHEAD], raw[RAW_OVERHEAD:]


def _tagged(tag: int, body: bytes) -> bytes:
    if len(body) < 0x80:
        return bytes([tag, len(body)]) + body
    length = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + body


def _integer(coordinate: bytes) -> bytes:
    body = coordinate.lstrip(b"\0")
    return _tagged(_INTEGER, body if body and body[0] < 0x80 else b"\0" + body)


def _take(tag: int, data: bytes) -> tuple[bytes, bytes]:
    """Split off one element with this tag; give its content, and what follows it."""
    if len(data) < 2 or data[0] != tag:
        raise ValueError(f"expected DER tag {tag:#04x}")
    length, start = data[1], 2
    if length >= 0x80:
        start += length & 0x7F
        length_bytes = data[2:start]
        length = int.from_bytes(length_bytes, "big")
        if not 1 <= len(length_bytes) <= _LONGEST_LENGTH or length < 0x80 or length_bytes[0] == 0 or start > len(data):
            raise ValueError("a DER length is not in its shortest form")
    if start + length > len(data):
        raise ValueError("a DER element is cut off")
    return data[start : start + length], data[start + length :]


def _coordinate(body: bytes) -> bytes:
    if not body or body[0] >= 0x80 or (body[0] == 0 and len(body) > 1 and body[1] < 0x80):
        raise ValueError("a coordinate is not a non-negative integer in its shortest form")
    value = body.lstrip(b"\0")
    if len(value) > _COORDINATE:
        raise ValueError("a coordinate is longer than 32 bytes")
    return value.rjust(_COORDINATE, b"\0")
