"""SM2 public-key encryption: the standard's example, three implementations crosswise, and the three forms of a ciphertext.

The three are libcrypto, the agent's portable fallback, and gmssl's own CryptSM2, which the product never calls.
"""

import ctypes
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import pytest
from Cryptodome.Util.asn1 import DerOctetString, DerSequence
from gmssl import func
from gmssl.sm2 import CryptSM2, default_ecc_table
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import requires

from keyferry import libcrypto
from keyferry.sm2_ciphertext import RAW_OVERHEAD, der_to_raw, raw_to_der, raw_to_sdf, sdf_to_raw
from keyferry_agent.crypto import sm2_portable, wrapping

libcrypto_sm2 = pytest.mark.skipif(not libcrypto.has_sm2(), reason="needs a libcrypto with SM2 (Debian: libssl3)")

# GB/T 32918.5-2017, Annex C.
D = "3945208F7B2144B13F36E38AC6D39F95889393692860B51A42FB81EF4DF7C5B8"
X = "09F9DF311E5421A150DD7D161E4BC5C672179FAD1833FC076BB08FF356F35020"
Y = "CCEA490CE26775A52DC6EA718CC1AA600AED05FBF35E084A6632F6072DA9AD13"
K = 0x59276E27D506861A16680F3AD9C02DCCEF3CC1FA3CDBE4CE6D54B80DEAC1BC21
MESSAGE = b"encryption standard"
C1_X = "04EBFC718E8D1798620432268E77FEB6415E2EDE0E073C0F4F640ECD2E149A73"
C1_Y = "E858F9D81E5430A57B36DAAB8F950A3C64E6EE6A63094D99283AFF767E124DF0"
C3 = "59983C18F809E262923C53AEC295D30383B54E39D609D160AFCB1908D0BD8766"
C2 = "21886CA989CA9C7D58087307CA93092D651EFA"
RAW = bytes.fromhex("04" + C1_X + C1_Y + C3 + C2)
# Only y has its highest bit set, so only y has a sign byte.
DER = bytes.fromhex("307C" + "0220" + C1_X + "022100" + C1_Y + "0420" + C3 + "0413" + C2)

P = 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF00000000FFFFFFFFFFFFFFFF
N = 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFF7203DF6B21C6052B53BBF40939D54123
SPKI_PREFIX = bytes.fromhex("3059301306072A8648CE3D020106082A811CCF5501822D03420004")
ZERO_MASKS = (470, 524, 724)
"""The three smallest nonces whose mask for one byte, under the key of Annex C, is zero."""


class KeyPair(NamedTuple):
    """One SM2 key for all three."""

    d: int
    point: bytes

    def pkcs8(self) -> bytearray:
        prefix = bytearray.fromhex("308187020100301306072A8648CE3D020106082A811CCF5501822D046D306B0201010420")
        return prefix + self.d.to_bytes(32, "big") + bytes.fromhex("A14403420004") + self.point

    def gmssl(self) -> CryptSM2:
        # Without 04, and not beginning with it either: gmssl strips every leading 0 and 4 of such a key.
        assert self.point[0] != 0x04
        return CryptSM2(private_key=f"{self.d:064x}", public_key=self.point.hex(), mode=1)


ANNEX_C = KeyPair(int(D, 16), bytes.fromhex(X + Y))


def generated() -> KeyPair:
    """A fresh key that gmssl does not mangle."""
    while True:
        d = 1 + secrets.randbelow(N - 2)
        point = bytes.fromhex(CryptSM2("", "")._kg(d, default_ecc_table["g"]))
        if point[0] != 0x04:
            return KeyPair(d, point)


def libcrypto_encrypt(pair: KeyPair, message: bytes) -> bytes:
    return der_to_raw(libcrypto.private_key(pair.pkcs8()).encrypt(bytearray(message)))


def libcrypto_decrypt(pair: KeyPair, raw: bytes) -> bytes:
    out = bytearray(max(len(raw) - RAW_OVERHEAD, 1))
    return bytes(out[: libcrypto.private_key(pair.pkcs8()).decrypt_into(bytearray(raw_to_der(raw)), out)])


def portable_encrypt(pair: KeyPair, message: bytes) -> bytes:
    return sm2_portable.encrypt(pair.point, bytearray(message))


def portable_decrypt(pair: KeyPair, raw: bytes) -> bytes:
    return sm2_portable.decrypt(pair.d, raw)


def gmssl_encrypt(pair: KeyPair, message: bytes) -> bytes:
    return b"\x04" + bytes(pair.gmssl().encrypt(message))


def gmssl_decrypt(pair: KeyPair, raw: bytes) -> bytes:
    return bytes(pair.gmssl().decrypt(raw[1:]))


Run = Callable[[KeyPair, bytes], bytes]
# gmssl checks neither C3 nor whether C1 is on the curve.
CHECKING = [pytest.param(libcrypto_decrypt, marks=libcrypto_sm2), pytest.param(portable_decrypt)]
DECRYPT = [*CHECKING, pytest.param(gmssl_decrypt)]
ENCRYPT = [pytest.param(libcrypto_encrypt, marks=libcrypto_sm2), portable_encrypt, gmssl_encrypt]


# The standard's example


@pytest.mark.parametrize("decrypt", DECRYPT)
def test_everybody_decrypts_the_standards_example(decrypt: Run) -> None:
    assert decrypt(ANNEX_C, RAW) == MESSAGE


def test_the_portable_way_gives_the_standards_ciphertext_with_the_standards_nonce() -> None:
    assert sm2_portable._encrypt(ANNEX_C.point, bytearray(MESSAGE), K) == RAW


def test_the_standards_ciphertext_has_one_text_in_each_form() -> None:
    assert (raw_to_der(RAW), der_to_raw(DER)) == (DER, RAW)


# Each implementation against each other


@pytest.mark.parametrize("size", [16, 32, 33, 1024])
@pytest.mark.parametrize("decrypt", DECRYPT)
@pytest.mark.parametrize("encrypt", ENCRYPT)
def test_what_one_encrypts_another_decrypts(encrypt: Run, decrypt: Run, size: int) -> None:
    message = b"\0" + secrets.token_bytes(size - 2) + b"\0"
    for pair in (ANNEX_C, generated()):
        raw = encrypt(pair, message)
        assert len(raw) == size + RAW_OVERHEAD
        assert decrypt(pair, raw) == message


@libcrypto_sm2
@pytest.mark.parametrize("size", [1, 2, 127, 128, 255, 256, 6_047])
def test_libcrypto_and_the_portable_way_decrypt_each_other_at_every_size(size: int) -> None:
    """Lengths at which DER takes one byte more, and the least and the most that wrapping carries."""
    message = secrets.token_bytes(size)
    assert libcrypto_decrypt(ANNEX_C, portable_encrypt(ANNEX_C, message)) == message
    assert portable_decrypt(ANNEX_C, libcrypto_encrypt(ANNEX_C, message)) == message


@pytest.mark.parametrize("decrypt", DECRYPT)
@pytest.mark.parametrize("k", [1, 2, N - 2, N - 1])
def test_the_ends_of_the_nonces_range_work(k: int, decrypt: Run) -> None:
    raw = sm2_portable._encrypt(ANNEX_C.point, bytearray(MESSAGE), k)
    assert raw is not None
    assert decrypt(ANNEX_C, raw) == MESSAGE


# The nonce, and a mask of zeros


def test_a_nonce_whose_mask_is_zero_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, limits = [*ZERO_MASKS, K], []

    def randbelow(limit: int) -> int:
        limits.append(limit)
        return drawn.pop(0) - 1

    monkeypatch.setattr(sm2_portable, "secrets", SimpleNamespace(randbelow=randbelow))
    raw = portable_encrypt(ANNEX_C, b"M")
    assert raw == sm2_portable._encrypt(ANNEX_C.point, bytearray(b"M"), K)
    assert portable_decrypt(ANNEX_C, raw) == b"M"
    # Drawn until it was usable, and each time from 1 to n - 1.
    assert limits == [N - 1] * 4


@pytest.mark.parametrize("k", ZERO_MASKS)
def test_a_zero_mask_is_never_used(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Used, it would be the message itself that travels. gmssl finds the same three nonces."""
    assert sm2_portable._encrypt(ANNEX_C.point, bytearray(b"M"), k) is None
    monkeypatch.setattr(func, "random_hex", lambda _size: f"{k:064x}")
    assert ANNEX_C.gmssl().encrypt(b"M") is None


def test_a_mask_that_only_begins_with_a_zero_is_used() -> None:
    raw = sm2_portable._encrypt(ANNEX_C.point, bytearray(b"MM"), ZERO_MASKS[0])
    assert raw is not None
    assert raw[RAW_OVERHEAD] == ord("M")
    assert portable_decrypt(ANNEX_C, raw) == b"MM"


# Tampering


def flipped(position: int, bit: int = 1) -> bytes:
    return RAW[:position] + bytes([RAW[position] ^ bit]) + RAW[position + 1 :]


def with_c1(x: int, y: int) -> bytes:
    return b"\x04" + x.to_bytes(32, "big") + y.to_bytes(32, "big") + RAW[65:]


TAMPERED = {
    "C3, first bit": flipped(65, 0x80),
    "C3, last bit": flipped(96),
    "C2, first bit": flipped(97, 0x80),
    "C2, last bit": flipped(len(RAW) - 1),
    "C2 one byte shorter": RAW[:-1],
    "C2 one byte longer": RAW + b"\0",
    "C3 and C2 in the old order": RAW[:65] + RAW[97:] + RAW[65:97],
    "C1 off the curve, y": flipped(64),
    "C1 mirrored: on the curve": with_c1(int(C1_X, 16), P - int(C1_Y, 16)),
    "C1 is zero": with_c1(0, 0),
    "C1 with x = p": with_c1(P, int(C1_Y, 16)),
}


@pytest.mark.parametrize("decrypt", CHECKING)
@pytest.mark.parametrize("raw", TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_ciphertext_is_refused(raw: bytes, decrypt: Run) -> None:
    with pytest.raises((ValueError, libcrypto.LibcryptoError)):
        decrypt(ANNEX_C, raw)


OTHER_PREFIXES = [bytes([prefix]) + RAW[1:] for prefix in (0x00, 0x02, 0x03, 0x05, 0x06, 0x07, 0xFF)]
CUT_OFF = [RAW[:size] for size in (0, 1, 33, 64, 65, 96, 97)]


@pytest.mark.parametrize("decrypt", CHECKING)
@pytest.mark.parametrize("raw", OTHER_PREFIXES + CUT_OFF, ids=lambda raw: f"{raw[:1].hex()}, {len(raw)} bytes")
def test_a_ciphertext_without_all_its_parts_or_with_another_form_of_c1_is_refused(raw: bytes, decrypt: Run) -> None:
    with pytest.raises(ValueError, match=r"not a raw SM2 ciphertext|C1 is not a point|C3 does not match|C2 is empty"):
        decrypt(ANNEX_C, raw)


@pytest.mark.parametrize("decrypt", CHECKING)
def test_another_private_key_is_refused(decrypt: Run) -> None:
    with pytest.raises((ValueError, libcrypto.LibcryptoError)):
        decrypt(generated(), RAW)


# The three forms of a ciphertext

small = st.integers(0, 2**72).map(lambda value: value.to_bytes(32, "big"))
high = st.binary(min_size=31, max_size=31).map(lambda rest: b"\x80" + rest)
coordinates = st.binary(min_size=32, max_size=32) | small | high


@settings(deadline=None)
@given(coordinates, coordinates, st.binary(min_size=32, max_size=32), st.binary(min_size=1, max_size=300))
@example(bytes(32), b"\xff" * 32, bytes(32), bytes(1))
@example(bytes(31) + b"\x7f", bytes(31) + b"\x80", bytes(32), bytes(6_047))
@example(b"\0\x7f" + bytes(30), b"\0\x80" + bytes(30), bytes(32), bytes(65_000))
def test_the_der_is_what_another_encoder_makes_and_reads_back(x: bytes, y: bytes, c3: bytes, c2: bytes) -> None:
    raw = b"\x04" + x + y + c3 + c2
    numbers = [int.from_bytes(coordinate, "big") for coordinate in (x, y)]
    der = DerSequence([*numbers, DerOctetString(c3), DerOctetString(c2)]).encode()
    assert (raw_to_der(raw), der_to_raw(der)) == (der, raw)


@settings(deadline=None, max_examples=1_000)
@given(st.integers(0, len(DER)), st.integers(0, 3), st.binary(max_size=3))
def test_der_that_is_read_is_the_one_text_of_its_ciphertext(position: int, dropped: int, inserted: bytes) -> None:
    """Whatever is changed anywhere: either it is refused, or it is DER again."""
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
    "more than 64 KiB": bytes.fromhex(f"3083010070 0220{C1_X} 022100{C1_Y} 0420{C3} 0483010000") + bytes(2**16),
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
def test_what_is_not_the_der_of_a_ciphertext_is_refused(der: bytes) -> None:
    assert sequence() == DER
    with pytest.raises(ValueError, match=r"DER|ciphertext|coordinate"):
        der_to_raw(der)


@pytest.mark.parametrize("convert", [raw_to_der, raw_to_sdf])
@pytest.mark.parametrize("raw", [b"", RAW[:96], RAW[:97], b"\x02" + RAW[1:], b"\0" + RAW])
def test_what_is_not_a_raw_ciphertext_has_no_other_form(raw: bytes, convert: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ValueError, match="not a raw SM2 ciphertext"):
        convert(raw)


def test_the_longest_der_that_is_written_is_read_and_one_byte_more_is_not_written() -> None:
    longest = RAW[:RAW_OVERHEAD] + bytes(2**16 - 1 - (34 + 35 + 34 + 4))
    assert der_to_raw(raw_to_der(longest)) == longest
    with pytest.raises(ValueError, match="more than 64 KiB"):
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
def test_the_ecccipher_is_what_c_makes_of_its_members_and_is_read_back(
    x: bytes, y: bytes, c3: bytes, c2: bytes
) -> None:
    """Coordinates at the end of their 64 bytes, L in the host's byte order."""
    raw, made = b"\x04" + x + y + c3 + c2, ecc_cipher(x, y, c3, c2)
    assert (raw_to_sdf(raw), sdf_to_raw(made)) == (made, raw)


SDF = raw_to_sdf(RAW)


@settings(deadline=None, max_examples=1_000)
@given(st.integers(0, len(SDF)), st.integers(0, 3), st.binary(max_size=3))
def test_an_ecccipher_that_is_read_is_the_one_text_of_its_ciphertext(
    position: int, dropped: int, inserted: bytes
) -> None:
    """Whatever is changed anywhere: either it is refused, or it is an ECCCipher again."""
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
def test_what_is_not_an_ecccipher_is_refused(changed: bytes) -> None:
    assert length_of_c(len(MESSAGE)) == SDF
    with pytest.raises(ValueError, match="ECCCipher"):
        sdf_to_raw(changed)


# The openssl program as the other end


def openssl(folder: Path, data: bytes, *arguments: str) -> bytes:
    source, target = folder / "in", folder / "out"
    source.write_bytes(data)
    command = ["openssl", "pkeyutl", *arguments, "-keyform", "DER", "-in", str(source), "-out", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return target.read_bytes()


@requires.openssl_sm2()
@libcrypto_sm2
@pytest.mark.parametrize("size", [1, 32, 1024])
def test_what_openssl_encrypts_the_product_reads(size: int, tmp_path: Path) -> None:
    pair, message = generated(), secrets.token_bytes(size)
    (tmp_path / "public").write_bytes(SPKI_PREFIX + pair.point)
    der = openssl(tmp_path, message, "-encrypt", "-pubin", "-inkey", str(tmp_path / "public"))
    raw = der_to_raw(der)
    assert raw_to_der(raw) == raw_to_der(sdf_to_raw(raw_to_sdf(raw))) == der
    assert len(raw) == size + RAW_OVERHEAD
    assert libcrypto_decrypt(pair, raw) == portable_decrypt(pair, raw) == message


@requires.openssl_sm2()
@libcrypto_sm2
@pytest.mark.parametrize("size", [1, 32, 1024, 6_047])
def test_what_the_product_encrypts_openssl_decrypts(size: int, tmp_path: Path) -> None:
    pair, message = generated(), secrets.token_bytes(size)
    (tmp_path / "private").write_bytes(pair.pkcs8())
    sm2pke = wrapping.find("EC_SM2", "SM2PKE")
    assert sm2pke is not None
    recipient = wrapping.recipient(sm2pke, SPKI_PREFIX + pair.point, sm2_fallback=False)
    for raw in (recipient.wrap(memoryview(bytearray(message))), portable_encrypt(pair, message)):
        assert len(raw) == size + RAW_OVERHEAD
        der = raw_to_der(sdf_to_raw(raw_to_sdf(raw)))
        assert openssl(tmp_path, der, "-decrypt", "-inkey", str(tmp_path / "private")) == message
