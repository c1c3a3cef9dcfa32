"""The joined forms of an SM2 ciphertext: either order, and C1 with 04, bare or compressed; against gmssl and BouncyCastle."""

import itertools
import re
import secrets
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gmssl.sm2 import CryptSM2, default_ecc_table
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import skip_unless
from support.sm2_example import C1_X, C1_Y, C2, C3, MESSAGE, RAW, D, X, Y

from keyferry import libcrypto
from keyferry.sm2_ciphertext import RAW_OVERHEAD, Order, PointForm, joined_to_raw, raw_to_der, raw_to_joined

P = int(default_ecc_table["p"], 16)
A, B = int(default_ecc_table["a"], 16), int(default_ecc_table["b"], 16)
ORDERS: tuple[Order, ...] = ("C1C3C2", "C1C2C3")
POINTS: tuple[PointForm, ...] = ("uncompressed", "bare", "compressed")
FORMS = list(itertools.product(ORDERS, POINTS))

numbers = st.integers(1, 2**256 - 2**225)
hashes = st.binary(min_size=32, max_size=32)
plain = st.binary(min_size=1, max_size=100)


def point(k: int) -> tuple[bytes, bytes]:
    """A point of the curve, computed by gmssl."""
    found = bytes.fromhex(CryptSM2("", "")._kg(k, default_ecc_table["g"]))
    return found[:32], found[32:]


def expected(form: tuple[Order, PointForm], x: bytes, y: bytes, c3: bytes, c2: bytes) -> bytes:
    """Each form, written down once more."""
    c1 = {"uncompressed": b"\x04" + x + y, "bare": x + y, "compressed": (b"\x03" if y[31] & 1 else b"\x02") + x}[
        form[1]
    ]
    return b"".join((c1, c3, c2) if form[0] == "C1C3C2" else (c1, c2, c3))


@pytest.mark.parametrize("form", FORMS)
def test_standards_ciphertext_has_one_encoding_in_each_form(form: tuple[Order, PointForm]) -> None:
    """The ciphertext is that of GB/T 32918.5, Annex C."""
    text = expected(form, *map(bytes.fromhex, (C1_X, C1_Y, C3, C2)))
    assert raw_to_joined(RAW, order=form[0], point=form[1]) == text
    assert joined_to_raw(text, order=form[0], point=form[1]) == RAW
    assert (text == RAW) == (form == ("C1C3C2", "uncompressed"))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FORMS), numbers, hashes, plain)
@example(("C1C2C3", "compressed"), 1, bytes(32), bytes(1))
@example(("C1C2C3", "bare"), 2, b"\xff" * 32, bytes(6_047))
def test_every_ciphertext_goes_to_each_form_and_back(
    form: tuple[Order, PointForm], k: int, c3: bytes, c2: bytes
) -> None:
    """Any C2 and C3 are converted."""
    x, y = point(k)
    raw, text = b"\x04" + x + y + c3 + c2, expected(form, x, y, c3, c2)
    assert raw_to_joined(raw, order=form[0], point=form[1]) == text
    assert joined_to_raw(text, order=form[0], point=form[1]) == raw


@settings(deadline=None, max_examples=600)
@given(st.sampled_from(FORMS), st.integers(0, len(RAW)), st.integers(0, 3), st.binary(max_size=3))
def test_accepted_forms_are_canonical(
    form: tuple[Order, PointForm], position: int, dropped: int, inserted: bytes
) -> None:
    """A changed byte makes a ciphertext invalid, or the encoding of another one."""
    text = raw_to_joined(RAW, order=form[0], point=form[1])
    changed = text[:position] + inserted + text[position + dropped :]
    try:
        raw = joined_to_raw(changed, order=form[0], point=form[1])
    except ValueError:
        return
    assert raw_to_joined(raw, order=form[0], point=form[1]) == changed


@settings(deadline=None, max_examples=300)
@given(st.binary(min_size=32, max_size=32), st.booleans())
@example(P.to_bytes(32, "big"), False)
@example((2**256 - 1).to_bytes(32, "big"), True)
@example(bytes(32), False)
def test_a_compressed_point_is_read_where_the_curve_has_one(x: bytes, is_odd: bool) -> None:
    """Euler's criterion says of each x whether there is a point; libcrypto decides it the same way in the test below."""
    number = int.from_bytes(x, "big")
    square = (pow(number, 3, P) + A * number + B) % P
    exists = number < P and pow(square, (P - 1) // 2, P) == 1
    text = bytes([2 + is_odd]) + x + bytes(33)
    if not exists:
        with pytest.raises(ValueError, match="not on the curve"):
            joined_to_raw(text, order="C1C3C2", point="compressed")
        return
    raw = joined_to_raw(text, order="C1C3C2", point="compressed")
    y = int.from_bytes(raw[33:65], "big")
    assert (raw[1:33], y % 2, y * y % P) == (x, is_odd, square)


BARE = RAW[1:]
OFF_CURVE = RAW[:64] + bytes([RAW[64] ^ 1]) + RAW[65:]
WRONG: dict[str, tuple[bytes, PointForm, str]] = {
    "empty": (b"", "uncompressed", "not an SM2 ciphertext"),
    "without C2": (RAW[:97], "uncompressed", "at least one byte of C2"),
    "bare without C2": (BARE[:96], "bare", "at least one byte of C2"),
    "compressed without C2": (b"\x02" + RAW[1:33] + bytes(32), "compressed", "at least one byte of C2"),
    "bare, read as uncompressed, although it begins with 04": (BARE, "uncompressed", "not on the curve"),
    "bare, read as uncompressed": (
        b"\x05" + BARE[1:],
        "uncompressed",
        "begins with 05; in the uncompressed form it begins with 04",
    ),
    "uncompressed, read as bare": (RAW, "bare", "not on the curve"),
    "compressed, read as uncompressed": (
        b"\x03" + RAW[1:33] + RAW[65:] + bytes(40),
        "uncompressed",
        "begins with 03, which is compressed",
    ),
    "uncompressed, read as compressed": (RAW, "compressed", "begins with 04, which is uncompressed"),
    "hybrid": (b"\x06" + RAW[1:], "uncompressed", "begins with 06, which is hybrid"),
    "the point at infinity": (b"\0" + RAW[1:], "uncompressed", "begins with 00"),
    "off the curve": (OFF_CURVE, "uncompressed", "not on the curve"),
    "off the curve, bare": (OFF_CURVE[1:], "bare", "not on the curve"),
    "zeros": (bytes(200), "bare", "not on the curve"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("text", "form", "reason"), WRONG.values(), ids=WRONG)
def test_another_form_than_the_one_named_is_refused(text: bytes, form: PointForm, reason: str, order: Order) -> None:
    """The length, the first byte, or a point off the curve shows the other form."""
    with pytest.raises(ValueError, match=reason):
        joined_to_raw(text, order=order, point=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("raw", [b"", RAW[:97], RAW[1:], b"\x02" + RAW[1:], OFF_CURVE])
def test_invalid_raw_ciphertext_has_no_joined_form(raw: bytes, form: tuple[Order, PointForm]) -> None:
    """A point off the curve is one of the cases."""
    with pytest.raises(ValueError, match=r"not a raw SM2 ciphertext|not on the curve"):
        raw_to_joined(raw, order=form[0], point=form[1])


@pytest.mark.parametrize(("order", "form"), [("c1c3c2", "bare"), ("C1C3C2", "04"), ("", "bare"), ("C1C2C3", "hybrid")])
def test_a_form_that_is_unknown_is_refused_by_name(order: Any, form: Any) -> None:
    """Both directions of the conversion name the unknown form."""
    for convert in (raw_to_joined, joined_to_raw):
        with pytest.raises(ValueError, match=r"an order of .*C1C2C3.* a point of .*compressed"):
            convert(RAW, order=order, point=form)


# Other implementations

libcrypto_sm2 = pytest.mark.skipif(not libcrypto.has_sm2(), reason="needs a libcrypto with SM2 (Debian: libssl3)")
PKCS8 = bytes.fromhex(f"308187020100301306072A8648CE3D020106082A811CCF5501822D046D306B0201010420{D}A14403420004{X}{Y}")
SIZES = [1, 16, 32, 33, 300]


def decrypt(raw: bytes) -> bytes:
    """By libcrypto, under the standard's key."""
    out = bytearray(max(len(raw) - RAW_OVERHEAD, 1))
    return bytes(out[: libcrypto.private_key(bytearray(PKCS8)).decrypt_into(bytearray(raw_to_der(raw)), out)])


@libcrypto_sm2
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("order", "mode"), [("C1C2C3", 0), ("C1C3C2", 1)])
def test_gmssl_reads_and_writes_bare_points_in_both_orders(order: Order, mode: int, size: int) -> None:
    """Gmssl's default mode 0 is the order of the draft."""
    gmssl, message = CryptSM2(private_key=D.lower(), public_key=(X + Y).lower(), mode=mode), secrets.token_bytes(size)
    while (made := gmssl.encrypt(message)) is None:  # a mask of zeros
        continue
    raw = joined_to_raw(bytes(made), order=order, point="bare")
    assert decrypt(raw) == message
    assert bytes(gmssl.decrypt(raw_to_joined(raw, order=order, point="bare"))) == message


@pytest.fixture(scope="module")
def bouncy_castle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[bytes]]:
    """SM2Engine: a line a ciphertext or message in hex, in a mode."""
    if missing := skip_unless.missing_java(skip_unless.BOUNCY_CASTLE):
        pytest.skip(missing)
    classes = tmp_path_factory.mktemp("classes")
    source = Path(__file__).parent / "foreign" / "unwrap" / "Sm2Modes.java"
    subprocess.run(["javac", "-cp", str(skip_unless.BOUNCY_CASTLE), "-d", str(classes), str(source)], check=True)

    def run(*lines: str) -> list[bytes]:
        command = ["java", "-cp", f"{skip_unless.BOUNCY_CASTLE}:{classes}", "Sm2Modes", D, X, Y]
        done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [bytes.fromhex(line) for line in done.stdout.split()]

    return run


@libcrypto_sm2
def test_bouncycastle_uses_uncompressed_points_in_both_orders(
    bouncy_castle: Callable[..., list[bytes]],
) -> None:
    """SM2Engine() is C1C2C3; SM2Engine(Mode.C1C3C2) decrypts an unchanged ExportedDataKey."""
    messages = [secrets.token_bytes(size) for size in SIZES]
    for mode, order in (("default", "C1C2C3"), ("C1C2C3", "C1C2C3"), ("C1C3C2", "C1C3C2")):
        form: Any = order
        made = bouncy_castle(*(f"{mode} encrypt {message.hex()}" for message in messages))
        raws = [joined_to_raw(text, order=form) for text in made]
        assert [decrypt(raw) for raw in raws] == messages
        joined = [raw_to_joined(raw, order=form).hex() for raw in raws]
        assert bouncy_castle(*(f"{mode} decrypt {text}" for text in joined)) == messages
        assert bouncy_castle(f"{mode} decrypt {raw_to_joined(RAW, order=form).hex()}") == [MESSAGE]


@skip_unless.openssl_sm2()
def test_openssl_decompresses_points_the_same_way() -> None:
    """The points are those that gmssl computed, and the public key's as openssl prints them in each form."""
    prefix = bytes.fromhex("3039301306072A8648CE3D020106082A811CCF5501822D032200")
    for _ in range(10):
        x, y = point(1 + secrets.randbelow(2**255))
        compressed = bytes([2 + y[31] % 2]) + x
        command = ["openssl", "ec", "-pubin", "-inform", "DER", "-conv_form", "uncompressed", "-text", "-noout"]
        shown = subprocess.run(command, input=prefix + compressed, capture_output=True, check=True).stdout.decode()
        octets = bytes.fromhex("".join(re.findall(r"[0-9a-f]{2}(?=[:\n])", shown.split("pub:")[1].split("ASN1")[0])))
        raw = joined_to_raw(compressed + bytes(33), order="C1C3C2", point="compressed")
        assert raw[:65] == octets == b"\x04" + x + y
