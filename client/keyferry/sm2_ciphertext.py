"""Converts between the forms of an SM2 ciphertext.

raw   `04 ‖ x ‖ y ‖ C3 ‖ C2` (C1C3C2, GB/T 32918.4-2016), the form of ExportedDataKey; 97 bytes longer than the data
DER   `SEQUENCE { INTEGER x, INTEGER y, OCTET STRING C3, OCTET STRING C2 }` (GM/T 0009-2012), for OpenSSL and many modules
SDF   `x (64) ‖ y (64) ‖ M (32) ‖ L (4) ‖ C (L)`, the C structure ECCCipher of GM/T 0018 (2012, and 2023), for hardware modules
      that import through SDF_ImportKeyWithISK_ECC; M is C3, C is C2. docs/modules.md gives the source of each detail

joined   C1, C2 and C3 one after another in either order, with the point C1 in one of three forms, for other libraries.
      The raw form is one of these six. The ciphertext does not contain its form, so the caller has to pass it

All readers are strict: in each form, one ciphertext has exactly one encoding. No reader examines C2 or checks C3: only
decryption can. Joined forms are checked for x ‖ y being on the curve. Only that check distinguishes a bare point from one with
its 04, and shows that a compressed x belongs to a point. For raw, DER and SDF, decryption checks the point.
"""

import struct
from typing import Final, Literal, TypeAlias

__all__ = [
    "RAW_OVERHEAD",
    "Order",
    "PointForm",
    "der_to_raw",
    "joined_to_raw",
    "raw_to_der",
    "raw_to_joined",
    "raw_to_sdf",
    "sdf_to_raw",
]

Order: TypeAlias = Literal["C1C3C2", "C1C2C3"]
"""GB/T 32918.4-2016 has C1C3C2. C1C2C3 is the order of the draft of 2010, and the default of libraries that began with it."""
PointForm: TypeAlias = Literal["uncompressed", "bare", "compressed"]
"""`04 ‖ x ‖ y`; `x ‖ y`; `02 ‖ x` where y is even, `03 ‖ x` where it is odd (GB/T 32918.1-2016, 4.2.9)."""

_COORDINATE_BYTES: Final = 32
_C3_BYTES: Final = 32
_POINT_BYTES: Final = 1 + 2 * _COORDINATE_BYTES
RAW_OVERHEAD: Final = _POINT_BYTES + _C3_BYTES
"""Bytes that the raw form adds to the data: 97."""

_P: Final = 0xFFFFFFFE_FFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFF_00000000_FFFFFFFF_FFFFFFFF
_B: Final = 0x28E9FA9E_9D9F5E34_4D5A9E4B_CF6509A7_F39789F5_15AB8F92_DDBCBD41_4D940E93
"""The curve of GB/T 32918.5-2017: y² = x³ - 3x + b modulo p."""
_FIRST_BYTES: Final = {"uncompressed": b"\x04", "compressed": b"\x02\x03", "hybrid": b"\x06\x07"}
"""First bytes of each form. Hybrid points (y and its parity) are named, and not read: no known implementation makes them."""
_ORDERS: Final = ("C1C3C2", "C1C2C3")
_C1_SIZES: Final = {"uncompressed": _POINT_BYTES, "bare": _POINT_BYTES - 1, "compressed": 1 + _COORDINATE_BYTES}

_INTEGER: Final = 0x02
_OCTET_STRING: Final = 0x04
_SEQUENCE: Final = 0x30
_MAX_LENGTH_BYTES: Final = 2
"""Most bytes of a DER length: enough for 64 KiB, which is more than a message can hold."""

_ECC_CIPHER: Final = struct.Struct("=64s64s32sI")
"""ECCCipher up to its C. The structure is passed in memory, so L has the host's byte order; no member needs padding."""
_UNUSED: Final = bytes(64 - _COORDINATE_BYTES)
"""ECCCipher has fields for coordinates of 512 bits. A 256-bit coordinate is at the end of its field, big-endian, after these
zeros."""


def raw_to_der(raw: bytes) -> bytes:
    """Convert C1C3C2 with its 04 prefix to the DER of GM/T 0009. Raises ValueError, also for more than 64 KiB."""
    x, y, c3, c2 = _split(raw)
    body = _integer(x) + _integer(y) + _tagged(_OCTET_STRING, c3) + _tagged(_OCTET_STRING, c2)
    if len(body) >= 1 << 8 * _MAX_LENGTH_BYTES:
        raise ValueError("the SM2 ciphertext is longer than 64 KiB, which this DER cannot hold")
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
        raise ValueError(f"L of the ECCCipher is {length}, but {len(ecc_cipher) - size} bytes of C follow")
    if not x.startswith(_UNUSED) or not y.startswith(_UNUSED):
        raise ValueError("a coordinate of an ECCCipher is longer than 256 bits, or not at the end of its 64 bytes")
    return b"".join((b"\x04", x[len(_UNUSED) :], y[len(_UNUSED) :], c3, ecc_cipher[size:]))


def der_to_raw(der: bytes) -> bytes:
    """Convert the DER of GM/T 0009 to C1C3C2 with its 04 prefix. Raises ValueError, also for any other encoding (BER)."""
    body, trailer = _take(_SEQUENCE, der)
    if trailer:
        raise ValueError(f"{len(trailer)} bytes follow the SM2 ciphertext")
    x, body = _take(_INTEGER, body)
    y, body = _take(_INTEGER, body)
    c3, body = _take(_OCTET_STRING, body)
    c2, body = _take(_OCTET_STRING, body)
    if body or len(c3) != _C3_BYTES or not c2:
        raise ValueError("not an SM2 ciphertext: expected x, y, 32 bytes of C3 and at least one byte of C2")
    return b"\x04" + _coordinate(x) + _coordinate(y) + c3 + c2


def raw_to_joined(raw: bytes, *, order: Order, point: PointForm = "uncompressed") -> bytes:
    """Convert C1C3C2 with its 04 prefix to another order, or another form of the point C1. Raises ValueError."""
    _check_form(order, point)
    x, y, c3, c2 = _split(raw)
    _check_point(x, y)
    c1 = {"uncompressed": b"\x04" + x + y, "bare": x + y, "compressed": bytes([2 + y[-1] % 2]) + x}[point]
    return c1 + (c3 + c2 if order == "C1C3C2" else c2 + c3)


def joined_to_raw(ciphertext: bytes, *, order: Order, point: PointForm = "uncompressed") -> bytes:
    """Convert C1, C2 and C3 in another order, or with another form of the point C1, to C1C3C2 with its 04 prefix.

    Raises ValueError, also for a point that is in another form than `point`, or is not on the curve. An `order` that is not
    the ciphertext's own cannot be noticed here; decryption fails then.
    """
    _check_form(order, point)
    size = _C1_SIZES[point]
    if len(ciphertext) <= size + _C3_BYTES:
        raise ValueError(f"not an SM2 ciphertext: expected {size} bytes of C1, 32 of C3 and at least one byte of C2")
    c1, after_point = ciphertext[:size], ciphertext[size:]
    c3, c2 = (
        (after_point[:_C3_BYTES], after_point[_C3_BYTES:])
        if order == "C1C3C2"
        else (after_point[-_C3_BYTES:], after_point[:-_C3_BYTES])
    )
    return b"".join((b"\x04", *_read_point(c1, point), c3, c2))


def _check_form(order: str, point: str) -> None:
    if order not in _ORDERS or point not in _C1_SIZES:
        raise ValueError(
            f"unknown form {order!r}, {point!r}; expected an order of {_ORDERS} and a point of {tuple(_C1_SIZES)}"
        )


def _read_point(c1: bytes, form: PointForm) -> tuple[bytes, bytes]:
    """Return x and y of a point that must be in this form."""
    if form == "bare":
        x, y = c1[:_COORDINATE_BYTES], c1[_COORDINATE_BYTES:]
    else:
        if c1[0] not in (valid_bytes := _FIRST_BYTES[form]):
            form_name = next(
                (f", which is {name}" for name, first_byte in _FIRST_BYTES.items() if c1[0] in first_byte), ""
            )
            first_bytes = valid_bytes.hex(" ").replace(" ", " or ")
            raise ValueError(
                f"the point C1 begins with {c1[0]:02x}{form_name}; in the {form} form it begins with {first_bytes}"
            )
        x = c1[1 : 1 + _COORDINATE_BYTES]
        y = c1[1 + _COORDINATE_BYTES :] if form == "uncompressed" else _other_coordinate(x, is_odd=c1[0] == 0x03)
    _check_point(x, y)
    return x, y


def _check_point(x: bytes, y: bytes) -> None:
    """Raise ValueError if the coordinates are not of a point on the curve. Not constant-time: both coordinates are public."""
    x_value, y_value = int.from_bytes(x, "big"), int.from_bytes(y, "big")
    if x_value >= _P or y_value >= _P or y_value * y_value % _P != _right_side(x_value):
        raise ValueError("the point C1 is not on the curve: it is in another form, or damaged")


def _right_side(x: int) -> int:
    return (x * x * x - 3 * x + _B) % _P


def _other_coordinate(x: bytes, *, is_odd: bool) -> bytes:
    """Return y of a compressed point, or a number that `_check_point` refuses where the curve has no point with this x."""
    # p is 3 modulo 4, which makes this power a square root, if there is one. It is never 0: the order of the curve is odd.
    root = pow(_right_side(int.from_bytes(x, "big")), (_P + 1) // 4, _P)
    return (root if root % 2 == is_odd else _P - root).to_bytes(_COORDINATE_BYTES, "big")


def _split(raw: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Split C1C3C2 with its 04 prefix: x, y, C3, C2."""
    if len(raw) <= RAW_OVERHEAD or raw[0] != 0x04:
        raise ValueError("not a raw SM2 ciphertext: expected 04, two coordinates, C3 and at least one byte of C2")
    return (
        raw[1 : 1 + _COORDINATE_BYTES],
        raw[1 + _COORDINATE_BYTES : _POINT_BYTES],
        raw[_POINT_BYTES:RAW_OVERHEAD],
        raw[RAW_OVERHEAD:],
    )


def _tagged(tag: int, body: bytes) -> bytes:
    if len(body) < 0x80:
        return bytes([tag, len(body)]) + body
    length = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + body


def _integer(coordinate: bytes) -> bytes:
    body = coordinate.lstrip(b"\0")
    return _tagged(_INTEGER, body if body and body[0] < 0x80 else b"\0" + body)


def _take(tag: int, data: bytes) -> tuple[bytes, bytes]:
    """Return the content of the first element, which must have this tag, and the bytes after the element."""
    if len(data) < 2 or data[0] != tag:
        raise ValueError(f"expected an element with DER tag {tag:#04x}")
    length, start = data[1], 2
    if length >= 0x80:
        start += length & 0x7F
        length_bytes = data[2:start]
        length = int.from_bytes(length_bytes, "big")
        if (
            not 1 <= len(length_bytes) <= _MAX_LENGTH_BYTES
            or length < 0x80
            or length_bytes[0] == 0
            or start > len(data)
        ):
            raise ValueError("a DER length is not in its shortest form")
    if start + length > len(data):
        raise ValueError("a DER element is cut off")
    return data[start : start + length], data[start + length :]


def _coordinate(body: bytes) -> bytes:
    if not body or body[0] >= 0x80 or (body[0] == 0 and len(body) > 1 and body[1] < 0x80):
        raise ValueError("a coordinate is not a non-negative integer in its shortest form")
    value = body.lstrip(b"\0")
    if len(value) > _COORDINATE_BYTES:
        raise ValueError("a coordinate is longer than 32 bytes")
    return value.rjust(_COORDINATE_BYTES, b"\0")
