"""SM2 public-key encryption: the standard's example, three implementations crosswise.

The three are libcrypto, the agent's portable fallback, and gmssl's own CryptSM2, which the product never calls.
"""

import secrets
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from gmssl import func
from gmssl.sm2 import CryptSM2, default_ecc_table
from support import skip_unless
from support.keys import wrap
from support.sm2_example import C1_X, C1_Y, DER, MESSAGE, RAW, D, K, X, Y

from keyferry import libcrypto
from keyferry.sm2_ciphertext import RAW_OVERHEAD, der_to_raw, raw_to_der, raw_to_sdf, sdf_to_raw
from keyferry_agent.crypto import sm2_gmssl, wrapping

libcrypto_sm2 = pytest.mark.skipif(not libcrypto.has_sm2(), reason="needs a libcrypto with SM2 (Debian: libssl3)")

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
    return sm2_gmssl.encrypt(pair.point, bytearray(message))


def portable_decrypt(pair: KeyPair, raw: bytes) -> bytes:
    return sm2_gmssl.decrypt(pair.d, raw)


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
def test_every_implementation_decrypts_the_standards_example(decrypt: Run) -> None:
    assert decrypt(ANNEX_C, RAW) == MESSAGE


def test_fallback_reproduces_the_standards_ciphertext() -> None:
    assert sm2_gmssl._encrypt(ANNEX_C.point, bytearray(MESSAGE), K) == RAW


def test_standards_ciphertext_has_one_encoding_in_each_form() -> None:
    assert (raw_to_der(RAW), der_to_raw(DER)) == (DER, RAW)


# Each implementation against each other


@pytest.mark.parametrize("size", [16, 32, 33, 1024])
@pytest.mark.parametrize("decrypt", DECRYPT)
@pytest.mark.parametrize("encrypt", ENCRYPT)
def test_implementations_decrypt_each_others_ciphertexts(encrypt: Run, decrypt: Run, size: int) -> None:
    message = b"\0" + secrets.token_bytes(size - 2) + b"\0"
    for pair in (ANNEX_C, generated()):
        raw = encrypt(pair, message)
        assert len(raw) == size + RAW_OVERHEAD
        assert decrypt(pair, raw) == message


@libcrypto_sm2
@pytest.mark.parametrize("size", [1, 2, 127, 128, 255, 256, 6_047])
def test_libcrypto_and_fallback_agree_at_every_size(size: int) -> None:
    """Sizes are those at which DER grows by a byte, and the smallest and largest of a wrapping."""
    message = secrets.token_bytes(size)
    assert libcrypto_decrypt(ANNEX_C, portable_encrypt(ANNEX_C, message)) == message
    assert portable_decrypt(ANNEX_C, libcrypto_encrypt(ANNEX_C, message)) == message


@pytest.mark.parametrize("decrypt", DECRYPT)
@pytest.mark.parametrize("k", [1, 2, N - 2, N - 1])
def test_smallest_and_largest_nonce_work(k: int, decrypt: Run) -> None:
    raw = sm2_gmssl._encrypt(ANNEX_C.point, bytearray(MESSAGE), k)
    assert raw is not None
    assert decrypt(ANNEX_C, raw) == MESSAGE


# The nonce, and a mask of zeros


def test_a_nonce_whose_mask_is_zero_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, limits = [*ZERO_MASKS, K], []

    def randbelow(limit: int) -> int:
        limits.append(limit)
        return drawn.pop(0) - 1

    monkeypatch.setattr(sm2_gmssl, "secrets", SimpleNamespace(randbelow=randbelow))
    raw = portable_encrypt(ANNEX_C, b"M")
    assert raw == sm2_gmssl._encrypt(ANNEX_C.point, bytearray(b"M"), K)
    assert portable_decrypt(ANNEX_C, raw) == b"M"
    # Drawn until it was usable, and each time from 1 to n - 1.
    assert limits == [N - 1] * 4


@pytest.mark.parametrize("k", ZERO_MASKS)
def test_a_zero_mask_is_never_used(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zero mask would send the message itself. gmssl finds the same three nonces."""
    assert sm2_gmssl._encrypt(ANNEX_C.point, bytearray(b"M"), k) is None
    monkeypatch.setattr(func, "random_hex", lambda _size: f"{k:064x}")
    assert ANNEX_C.gmssl().encrypt(b"M") is None


def test_a_mask_that_only_begins_with_a_zero_is_used() -> None:
    raw = sm2_gmssl._encrypt(ANNEX_C.point, bytearray(b"MM"), ZERO_MASKS[0])
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
def test_incomplete_ciphertext_and_other_form_of_c1_are_refused(raw: bytes, decrypt: Run) -> None:
    with pytest.raises(ValueError, match=r"not a raw SM2 ciphertext|C1 is not a point|C3 does not match|C2 is empty"):
        decrypt(ANNEX_C, raw)


@pytest.mark.parametrize("decrypt", CHECKING)
def test_another_private_key_is_refused(decrypt: Run) -> None:
    with pytest.raises((ValueError, libcrypto.LibcryptoError)):
        decrypt(generated(), RAW)


# The openssl program as the other end


def openssl(folder: Path, data: bytes, *arguments: str) -> bytes:
    source, target = folder / "in", folder / "out"
    source.write_bytes(data)
    command = ["openssl", "pkeyutl", *arguments, "-keyform", "DER", "-in", str(source), "-out", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return target.read_bytes()


@skip_unless.openssl_sm2()
@libcrypto_sm2
@pytest.mark.parametrize("size", [1, 32, 1024])
def test_product_decrypts_ciphertexts_of_openssl(size: int, tmp_path: Path) -> None:
    pair, message = generated(), secrets.token_bytes(size)
    (tmp_path / "public").write_bytes(SPKI_PREFIX + pair.point)
    der = openssl(tmp_path, message, "-encrypt", "-pubin", "-inkey", str(tmp_path / "public"))
    raw = der_to_raw(der)
    assert raw_to_der(raw) == raw_to_der(sdf_to_raw(raw_to_sdf(raw))) == der
    assert len(raw) == size + RAW_OVERHEAD
    assert libcrypto_decrypt(pair, raw) == portable_decrypt(pair, raw) == message


@skip_unless.openssl_sm2()
@libcrypto_sm2
@pytest.mark.parametrize("size", [1, 32, 1024, 6_047])
def test_openssl_decrypts_ciphertexts_of_the_product(size: int, tmp_path: Path) -> None:
    pair, message = generated(), secrets.token_bytes(size)
    (tmp_path / "private").write_bytes(pair.pkcs8())
    sm2pke = wrapping.find("EC_SM2", "SM2PKE")
    assert sm2pke is not None
    recipient = wrapping.recipient(sm2pke, SPKI_PREFIX + pair.point, sm2_fallback=False)
    for raw in (wrap(recipient, message), portable_encrypt(pair, message)):
        assert len(raw) == size + RAW_OVERHEAD
        der = raw_to_der(sdf_to_raw(raw_to_sdf(raw)))
        assert openssl(tmp_path, der, "-decrypt", "-inkey", str(tmp_path / "private")) == message
