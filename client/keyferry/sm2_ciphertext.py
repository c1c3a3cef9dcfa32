"""The two forms of an SM2 ciphertext, and the way from one to the other.

raw   `04 ‖ x ‖ y ‖ C3 ‖ C2` (C1C3C2, GB/T 32918.4-2016): what travels in ExportedDataKey; 97 bytes longer than the data
DER   `SEQUENCE { INTEGER x, INTEGER y, OCTET STRING C3, OCTET STRING C2 }` (GM/T 0009-2012): what OpenSSL and many modules take

Both readers are strict: one ciphertext has exactly one text in each form. Neither looks inside C2; that x ‖ y is on the
curve, and that C3 is right, is for whoever decrypts to check.
"""

from typing import Final

__all__ = ["RAW_OVERHEAD", "der_to_raw", "raw_to_der"]

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


def raw_to_der(raw: bytes) -> bytes:
    """Convert C1C3C2 with its 04 prefix to the DER of GM/T 0009. Raises ValueError."""
    if len(raw) <= RAW_OVERHEAD or raw[0] != 0x04:
        raise ValueError("not a raw SM2 ciphertext: expected 04, two coordinates, C3 and at least one byte of C2")
    x, y = raw[1 : 1 + _COORDINATE], raw[1 + _COORDINATE : _POINT]
    return _tagged(
        _SEQUENCE,
        _integer(x)
        + _integer(y)
        + _tagged(_OCTET_STRING, raw[_POINT:RAW_OVERHEAD])
        + _tagged(_OCTET_STRING, raw[RAW_OVERHEAD:]),
    )


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
