"""The forms of an SM2 ciphertext (C1 ‖ C3 ‖ C2, DER, the ECCCipher of GM/T 0018): each has one text, and no other is read."""

import ctypes
import sys
from collections.abc import Callable
from typing import Literal

import pytest
from Cryptodome.Util.asn1 import DerOctetString, DerSequence
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.sm2_example import C1_X, C1_Y, C2, C3, DER, MESSAGE, RAW

from keyferry.sm2_ciphertext import RAW_OVERHEAD, der_to_raw, raw_to_der, raw_to_sdf, sdf_to_raw

small = st.integers(0, 2**72).map(lambda value: value.to_bytes(32, "big"))
high = st.binary(min_size=31, max_size=31).map(lambda rest: b"\x80" + rest)
coordinates = st.binary(min_size=32, max_size=32) | small | high


@settings(deadline=None)
@given(coordinates, coordinates, st.binary(min_size=32, max_size=32), st.binary(min_size=1, max_size=300))
@example(bytes(32), b"\xff" * 32, bytes(32), bytes(1))
@example(bytes(31) + b"\x7f", bytes(31) + b"\x80", bytes(32), bytes(6_047))
@example(b"\0\x7f" + bytes(30), b"\0\x80" + bytes(30), bytes(32), bytes(65_000))
def test_der_agrees_with_another_encoder(x: bytes, y: bytes, c3: bytes, c2: bytes) -> None:
    raw = b"\x04" + x + y + c3 + c2
    numbers = [int.from_bytes(coordinate, "big") for coordinate in (x, y)]
    der = DerSequence([*numbers, DerOctetString(c3), DerOctetString(c2)]).encode()
    assert (raw_to_der(raw), der_to_raw(der)) == (der, raw)


@settings(deadline=None, max_examples=1_000)
@given(st.integers(0, len(DER)), st.integers(0, 3), st.binary(max_size=3))
def test_accepted_der_is_canonical(position: int, dropped: int, inserted: bytes) -> None:
    """A changed byte makes the DER invalid, or the DER of another ciphertext."""
    changed = DER[:position] + inserted + DER[position + dropped :]
    try:
        raw = der_to_raw(changed)
    except ValueError:
        return
    assert raw_to_der(raw) == changed


def sequence(x: str = f"0220{C1_X}", y: str = f"022100{C1_Y}", c3: str = f"0420{C3}", c2: str = f"0413{C2}") -> bytes:
    """The DER of the standard's ciphertext with some of its elements, in hex, replaced."""
    body = bytes.fromhex(x + y + c3 + c2)
    return bytes([0x30, len(body)]) + body


NOT_DER = {
    **{f"cut off after {size} bytes": DER[:size] for size in range(len(DER))},
    "a SET": b"\x31" + DER[1:],
    "the length of the SEQUENCE in two bytes": bytes.fromhex("30817C") + DER[2:],
    "a length of two bytes with a zero before it": b"\x30\x82\0" + raw_to_der(RAW + bytes(100))[2:],
    "longer than 64 KiB": bytes.fromhex(f"3083010070 0220{C1_X} 022100{C1_Y} 0420{C3} 0483010000") + bytes(2**16),
    "the length of the SEQUENCE indefinite": bytes.fromhex("3080") + DER[2:] + bytes(2),
    "the length of the SEQUENCE cut off": bytes.fromhex("308201"),
    "the length of x in two bytes": sequence(x=f"028120{C1_X}"),
    "the length of C3 in two bytes": sequence(c3=f"048120{C3}"),
    "the length of C2 in three bytes": sequence(c2=f"04820013{C2}"),
    "a length beyond the end": sequence(c2=f"0414{C2}"),
    "x empty": sequence(x="0200"),
    "x with a leading zero": sequence(x=f"022100{C1_X}"),
    "x of 33 bytes": sequence(x=f"022101{C1_X}"),
    "x of 33 bytes and a sign byte": sequence(x=f"022200FF{C1_X}"),
    "y negative": sequence(y=f"0220{C1_Y}"),
    "C3 of 31 bytes": sequence(c3=f"041F{C3[:-2]}"),
    "C3 of 33 bytes": sequence(c3=f"0421{C3}00"),
    "C3 a BIT STRING": sequence(c3=f"0320{C3}"),
    "C3 missing": sequence(c3=""),
    "C2 empty": sequence(c2="0400"),
    "C2 missing": sequence(c2=""),
    "C2 in pieces": sequence(c2=f"24150413{C2}"),
    "a fifth element": sequence(c2=f"0413{C2}0500"),
    "a byte more in the SEQUENCE": sequence(c2=f"0413{C2}00"),
    "a byte after it": DER + b"\0",
}


@pytest.mark.parametrize("der", NOT_DER.values(), ids=NOT_DER)
def test_invalid_der_is_refused(der: bytes) -> None:
    assert sequence() == DER
    with pytest.raises(ValueError, match=r"DER|ciphertext|coordinate"):
        der_to_raw(der)


@pytest.mark.parametrize("convert", [raw_to_der, raw_to_sdf])
@pytest.mark.parametrize("raw", [b"", RAW[:96], RAW[:97], b"\x02" + RAW[1:], b"\0" + RAW])
def test_invalid_raw_ciphertext_has_no_other_form(raw: bytes, convert: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ValueError, match="not a raw SM2 ciphertext"):
        convert(raw)


def test_longest_der_is_read_and_a_longer_one_not_written() -> None:
    longest = RAW[:RAW_OVERHEAD] + bytes(2**16 - 1 - (34 + 35 + 34 + 4))
    assert der_to_raw(raw_to_der(longest)) == longest
    with pytest.raises(ValueError, match="longer than 64 KiB"):
        raw_to_der(longest + b"\0")


def ecc_cipher(x: bytes, y: bytes, c3: bytes, c2: bytes) -> bytes:
    """The structure as a C compiler lays it out, filled in by its members' names."""

    class EccCipher(ctypes.Structure):
        _fields_ = (
            ("x", ctypes.c_ubyte * 64),
            ("y", ctypes.c_ubyte * 64),
            ("M", ctypes.c_ubyte * 32),
            ("L", ctypes.c_uint),
            ("C", ctypes.c_ubyte * len(c2)),
        )

    filled = EccCipher()
    filled.x[32:], filled.y[32:], filled.M[:], filled.L, filled.C[:] = x, y, c3, len(c2), c2
    return bytes(filled)[: EccCipher.C.offset + len(c2)]


@settings(deadline=None)
@given(coordinates, coordinates, st.binary(min_size=32, max_size=32), st.binary(min_size=1, max_size=300))
def test_ecccipher_agrees_with_the_c_structure(x: bytes, y: bytes, c3: bytes, c2: bytes) -> None:
    """Coordinates are at the end of their 64 bytes, and L has the host's byte order."""
    raw, made = b"\x04" + x + y + c3 + c2, ecc_cipher(x, y, c3, c2)
    assert (raw_to_sdf(raw), sdf_to_raw(made)) == (made, raw)


SDF = raw_to_sdf(RAW)


@settings(deadline=None, max_examples=1_000)
@given(st.integers(0, len(SDF)), st.integers(0, 3), st.binary(max_size=3))
def test_accepted_ecccipher_is_canonical(position: int, dropped: int, inserted: bytes) -> None:
    """A changed byte makes the ECCCipher invalid, or the one of another ciphertext."""
    changed = SDF[:position] + inserted + SDF[position + dropped :]
    try:
        raw = sdf_to_raw(changed)
    except ValueError:
        return
    assert raw_to_sdf(raw) == changed


def length_of_c(length: int, order: Literal["little", "big"] = sys.byteorder) -> bytes:
    """The standard's ciphertext as an ECCCipher with another L."""
    return SDF[:160] + length.to_bytes(4, order) + SDF[164:]


OTHER_ORDER: Literal["little", "big"] = "big" if sys.byteorder == "little" else "little"
NOT_SDF = {
    **{f"cut off after {size} bytes": SDF[:size] for size in range(len(SDF))},
    "a byte after it": SDF + b"\0",
    "L too small": length_of_c(len(MESSAGE) - 1),
    "L too large": length_of_c(len(MESSAGE) + 1),
    "L in the other byte order": length_of_c(len(MESSAGE), OTHER_ORDER),
    "C empty": length_of_c(0)[:164],
    "x of 257 bits": SDF[:31] + b"\1" + SDF[32:],
    "x of 512 bits": b"\x80" + SDF[1:],
    "y of 257 bits": SDF[:95] + b"\1" + SDF[96:],
    "x at the beginning of its bytes": SDF[32:64] + bytes(32) + SDF[64:],
    "coordinates of 32 bytes": SDF[32:64] + SDF[96:],
}


@pytest.mark.parametrize("changed", NOT_SDF.values(), ids=NOT_SDF)
def test_invalid_ecccipher_is_refused(changed: bytes) -> None:
    assert length_of_c(len(MESSAGE)) == SDF
    with pytest.raises(ValueError, match="ECCCipher"):
        sdf_to_raw(changed)
