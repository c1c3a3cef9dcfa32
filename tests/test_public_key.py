"""A recipient's public key: the one encoding of the right kind is accepted, and everything else refused with its reason.

The refused keys are made by hand, byte for byte: no library writes most of them.
"""

import functools
import hashlib
import secrets
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from gmssl.sm2 import CryptSM2, default_ecc_table
from support import skip_unless
from support.keys import wrap

from keyferry import libcrypto
from keyferry_agent.crypto import sm2_gmssl, wrapping
from keyferry_agent.crypto.public_key import PublicKeyError, check_rsa_2048, check_sm2, fingerprint

libcrypto_sm2 = pytest.mark.skipif(not libcrypto.has_sm2(), reason="needs a libcrypto with SM2 (Debian: libssl3)")

RSA = bytes.fromhex("06092A864886F70D010101")
RSA_OAEP = bytes.fromhex("06092A864886F70D010107")
RSA_PSS = bytes.fromhex("06092A864886F70D01010A")
EC = bytes.fromhex("06072A8648CE3D0201")
SM2 = bytes.fromhex("06082A811CCF5501822D")
SM2_ENCRYPTION = bytes.fromhex("06092A811CCF5501822D03")
P_256 = bytes.fromhex("06082A8648CE3D030107")
NULL = bytes.fromhex("0500")

N = 2**2048 - 159
"""An odd number of 2048 bits. Its factors are unknown, and no check looks for them."""
N_BYTES = N.to_bytes(256, "big")
SM2_D = 0x6D6F64756C65206B65792C20666F72207465737473206F6E6C79
SM2_P = 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF00000000FFFFFFFFFFFFFFFF
SM2_B = 0x28E9FA9E9D9F5E344D5A9E4BCF6509A7F39789F515AB8F92DDBCBD414D940E93
SM2_POINT = bytes.fromhex(CryptSM2("", "")._kg(SM2_D, default_ecc_table["g"]))
P_256_GENERATOR = (
    "6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296"
    "4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5"
)
# RFC 8032, 7.1, test 1.
ED25519_KEY = "D75A980182B10AB7D54BFED3C964073A0EE172F3DAA62325AF021A68F707511A"


def tlv(tag: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    if len(body) < 0x80:
        return bytes([tag, len(body)]) + body
    length = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + body


def integer(value: int) -> bytes:
    return tlv(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def spki(algorithm: bytes, key: bytes) -> bytes:
    """SEQUENCE { SEQUENCE { algorithm }, BIT STRING { key } }"""
    return tlv(0x30, tlv(0x30, algorithm), tlv(0x03, b"\0", key))


def rsa_key(n: int = N, e: int = 65537) -> bytes:
    return tlv(0x30, integer(n), integer(e))


def rsa_der(n: int = N, e: int = 65537) -> bytes:
    return spki(RSA + NULL, rsa_key(n, e))


def sm2_key(point: bytes) -> bytes:
    return spki(EC + SM2, point)


RSA_DER = rsa_der()
SM2_DER = sm2_key(b"\x04" + SM2_POINT)
P_256_DER = spki(EC + P_256, b"\x04" + bytes.fromhex(P_256_GENERATOR))
ED25519_DER = spki(bytes.fromhex("06032B6570"), bytes.fromhex(ED25519_KEY))


@functools.cache
def rsa_private(e: int) -> rsa.RSAPrivateKey:
    """A private key of 2048 bits; one for all tests, as it takes a while to make."""
    return rsa.generate_private_key(e, 2048)


def recipient(key_spec: str, algorithm: str, der: bytes) -> wrapping.Recipient:
    found = wrapping.find(key_spec, algorithm)
    assert found is not None
    return wrapping.recipient(found, der, sm2_fallback=True)


# Accepted


@pytest.mark.parametrize("e", [3, 5, 65537, 2**32 - 1])
def test_rsa_2048_with_an_odd_exponent_up_to_32_bits_is_accepted(e: int) -> None:
    check_rsa_2048(rsa_der(e=e))


def test_keys_of_common_libraries_are_accepted() -> None:
    check_rsa_2048(rsa_private(3).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    check_sm2(SM2_DER)


def test_a_fingerprint_is_the_sha_256_of_the_der() -> None:
    assert fingerprint(SM2_DER) == "sha256:" + hashlib.sha256(SM2_DER).hexdigest()
    assert recipient("EC_SM2", "SM2PKE", SM2_DER).fingerprint == fingerprint(SM2_DER)
    assert recipient("RSA_2048", "RSAES_OAEP_SHA_256", RSA_DER).fingerprint == fingerprint(RSA_DER)


# Refused as RSA_2048

NOT_SPKI = "it is not the strict DER SubjectPublicKeyInfo of a public key, has bytes after it, or a weak exponent."
NOT_DER = "it is not in the one DER encoding of a SubjectPublicKeyInfo."
NOT_RSA = "it is not an RSA key, as WrappingKeySpec says."
EXPONENT = "its public exponent is not an odd number from 3 to 2^32."

REFUSED_RSA = {
    "nothing": (b"", NOT_SPKI),
    "PEM": (b"-----BEGIN PUBLIC KEY-----\n", NOT_SPKI),
    **{
        f"{bits} bits": (rsa_der(2**bits - 1), f"it is an RSA key of {bits} bits; RSA_2048 is expected.")
        for bits in (1024, 2047, 2049, 3072, 4096)
    },
    "an exponent of 33 bits": (rsa_der(e=2**32 + 1), EXPONENT),
    "an exponent as long as the modulus": (rsa_der(e=N - 2), EXPONENT),
    "an even modulus": (rsa_der(N - 1), "its modulus is even."),
    "a negative modulus": (spki(RSA + NULL, tlv(0x30, tlv(0x02, N_BYTES), integer(3))), NOT_SPKI),
    "a modulus with a zero more": (spki(RSA + NULL, tlv(0x30, tlv(0x02, bytes(2), N_BYTES), integer(3))), NOT_SPKI),
    "PKCS #1": (rsa_key(), NOT_DER),
    "a byte after it": (RSA_DER + b"\0", NOT_SPKI),
    "a byte after the RSAPublicKey": (spki(RSA + NULL, rsa_key() + b"\0"), NOT_SPKI),
    "one byte missing": (RSA_DER[:-1], NOT_SPKI),
    "half of it missing": (RSA_DER[: len(RSA_DER) // 2], NOT_SPKI),
    "indefinite length": (b"\x30\x80" + RSA_DER[4:] + bytes(2), NOT_SPKI),
    "a length with a zero more": (b"\x30\x83\0" + RSA_DER[2:], NOT_SPKI),
    "a long form where one byte would do": (tlv(0x30, b"\x30\x81\x0d", RSA, NULL, RSA_DER[19:]), NOT_SPKI),
    "an unused bit": (tlv(0x30, tlv(0x30, RSA + NULL), tlv(0x03, b"\1", rsa_key())), NOT_SPKI),
    "no NULL": (spki(RSA, rsa_key()), NOT_DER),
    "two NULLs": (spki(RSA + NULL + NULL, rsa_key()), NOT_SPKI),
    "RSASSA-PSS": (spki(RSA_PSS, rsa_key()), NOT_DER),
    "RSASSA-PSS with NULL": (spki(RSA_PSS + NULL, rsa_key()), NOT_SPKI),
    "RSAES-OAEP": (spki(RSA_OAEP, rsa_key()), NOT_RSA),
    "SM2": (SM2_DER, NOT_RSA),
    "P-256": (P_256_DER, NOT_RSA),
    "Ed25519": (ED25519_DER, NOT_RSA),
}


def reason(check: Callable[[bytes], None], der: bytes) -> str:
    """Why a key is refused."""
    with pytest.raises(PublicKeyError) as caught:
        check(der)
    return str(caught.value)


@pytest.mark.parametrize(("der", "expected"), REFUSED_RSA.values(), ids=REFUSED_RSA)
def test_other_keys_than_rsa_2048_are_refused_with_a_reason(der: bytes, expected: str) -> None:
    assert reason(check_rsa_2048, der) == expected


@pytest.mark.parametrize("e", [0, 1, 2, 65536, 2**32])
def test_rsa_exponent_below_3_or_even_is_refused(e: int) -> None:
    assert "weak exponent" in reason(check_rsa_2048, rsa_der(e=e))


# Refused as EC_SM2

NOT_SM2 = "it is not the DER SubjectPublicKeyInfo of an uncompressed key on the SM2 curve."
OFF_CURVE = "its point is not on the SM2 curve."
X, Y = (int.from_bytes(SM2_POINT[start : start + 32], "big") for start in (0, 32))


def point(x: int, y: int, prefix: int = 0x04) -> bytes:
    return bytes([prefix]) + x.to_bytes(32, "big") + y.to_bytes(32, "big")


def x_beyond_p() -> bytes:
    """A point of the curve, but for its x being written as x + p: there is room for that below 2^256 where x is small."""
    for x in range(2**10):
        square = (x**3 - 3 * x + SM2_B) % SM2_P
        y = pow(square, (SM2_P + 1) // 4, SM2_P)
        if y * y % SM2_P == square:
            check_sm2(sm2_key(point(x, y)))
            return point(x + SM2_P, y)
    raise AssertionError


EXPLICIT = tlv(
    0x30,
    integer(1),
    tlv(0x30, bytes.fromhex("06072A8648CE3D0101"), integer(SM2_P)),
    tlv(0x30, tlv(0x04, (SM2_P - 3).to_bytes(32, "big")), tlv(0x04, SM2_B.to_bytes(32, "big"))),
    tlv(0x04, b"\x04", bytes.fromhex(default_ecc_table["g"])),
    integer(int(default_ecc_table["n"], 16)),
    integer(1),
)
REFUSED_SM2 = {
    "nothing": (b"", NOT_SM2),
    "the point alone": (b"\x04" + SM2_POINT, NOT_SM2),
    "a byte after it": (SM2_DER + b"\0", "it has 92 bytes; the DER of an SM2 key has 91."),
    "one byte missing": (SM2_DER[:-1], "it has 90 bytes; the DER of an SM2 key has 91."),
    "half of it missing": (SM2_DER[:45], "it has 45 bytes; the DER of an SM2 key has 91."),
    "indefinite length": (b"\x30\x80" + SM2_DER[2:] + bytes(2), NOT_SM2),
    "a short length in the long form": (b"\x30\x81" + SM2_DER[1:], NOT_SM2),
    "an unused bit": (SM2_DER.replace(b"\x03\x42\0", b"\x03\x42\1"), NOT_SM2),
    "compressed": (sm2_key(bytes([2 + Y % 2]) + SM2_POINT[:32]), NOT_SM2),
    "hybrid": (sm2_key(point(X, Y, 6 + Y % 2)), NOT_SM2),
    "infinity": (sm2_key(b"\0"), NOT_SM2),
    "zeros": (sm2_key(point(0, 0)), OFF_CURVE),
    "off the curve": (sm2_key(point(X, Y ^ 1)), OFF_CURVE),
    "x and y exchanged": (sm2_key(point(Y, X)), OFF_CURVE),
    "x beyond p": (sm2_key(x_beyond_p()), OFF_CURVE),
    "y = 2^256 - 1": (sm2_key(point(X, 2**256 - 1)), OFF_CURVE),
    "explicit curve parameters": (spki(EC + EXPLICIT, point(X, Y)), NOT_SM2),
    "no curve": (spki(EC, point(X, Y)), NOT_SM2),
    "a curve of NULL": (spki(EC + NULL, point(X, Y)), NOT_SM2),
    "NULL after the curve": (spki(EC + SM2 + NULL, point(X, Y)), NOT_SM2),
    "algorithm SM2": (spki(SM2, point(X, Y)), NOT_SM2),
    "algorithm SM2, curve SM2": (spki(SM2 + SM2, point(X, Y)), NOT_SM2),
    "algorithm SM2 encryption": (spki(SM2_ENCRYPTION + SM2, point(X, Y)), NOT_SM2),
    "P-256": (P_256_DER, NOT_SM2),
    "a point of P-256 said to be of SM2": (sm2_key(b"\x04" + bytes.fromhex(P_256_GENERATOR)), OFF_CURVE),
    "Ed25519": (ED25519_DER, NOT_SM2),
    "RSA": (RSA_DER, NOT_SM2),
}


@pytest.mark.parametrize(("der", "expected"), REFUSED_SM2.values(), ids=REFUSED_SM2)
def test_other_keys_than_sm2_are_refused_with_a_reason(der: bytes, expected: str) -> None:
    assert reason(check_sm2, der) == expected


@skip_unless.openssl_sm2()
@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("param_enc explicit", "explicit curve parameters"),
        ("conv_form compressed", "compressed"),
        ("conv_form hybrid", "hybrid"),
    ],
)
def test_openssl_writes_and_reads_the_other_forms(form: str, name: str, tmp_path: Path) -> None:
    """The agent accepts each form that it does not parse itself if OpenSSL reads it."""
    (tmp_path / "public").write_bytes(SM2_DER)
    arguments = ["-pubin", "-inform", "DER", "-in", str(tmp_path / "public"), "-pubout", "-outform", "DER"]
    written = subprocess.run(["openssl", "ec", *arguments, *f"-{form}".split()], check=True, capture_output=True)
    assert written.stdout == REFUSED_SM2[name][0]


# Wrapping

PAIRS = {
    ("RSA_2048", "RSAES_OAEP_SHA_256"): 190,
    ("RSA_2048", "RSAES_OAEP_SHA_1"): 214,
    ("EC_SM2", "SM2PKE"): 6_047,
}
KEY_SPECS = ["RSA_2048", "EC_SM2", "RSA_3072", "EC_P256", "rsa_2048", ""]
ALGORITHMS = ["RSAES_OAEP_SHA_256", "RSAES_OAEP_SHA_1", "SM2PKE", "RSAES_PKCS1_V1_5", "sm2pke", ""]
OAEP = {"RSAES_OAEP_SHA_256": (SHA256(), "sha256"), "RSAES_OAEP_SHA_1": (SHA1(), "sha1")}


@pytest.mark.parametrize("key_spec", KEY_SPECS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_three_pairs_of_key_spec_and_algorithm_are_valid(key_spec: str, algorithm: str) -> None:
    found = wrapping.find(key_spec, algorithm)
    assert (found and found.capacity) == PAIRS.get((key_spec, algorithm))
    assert (f"{key_spec} with {algorithm}" in wrapping.pairs().split(", ")) == ((key_spec, algorithm) in PAIRS)


def test_a_public_key_is_loaded_once() -> None:
    assert recipient("RSA_2048", "RSAES_OAEP_SHA_256", RSA_DER) is recipient("RSA_2048", "RSAES_OAEP_SHA_256", RSA_DER)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_key_of_the_other_kind_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(PublicKeyError):
        recipient(*pair, RSA_DER if pair[0] == "EC_SM2" else SM2_DER)


def test_libcrypto_refusing_a_good_key_is_not_the_callers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_der: bytes) -> None:
        raise libcrypto.LibcryptoError("libcrypto does not accept this public key")

    assert libcrypto.has_oaep(b"sha1")  # cached: libcrypto's algorithms are not tested here
    monkeypatch.setattr(libcrypto, "public_key", refuse)
    with pytest.raises(libcrypto.LibcryptoError):
        recipient("RSA_2048", "RSAES_OAEP_SHA_1", rsa_der(N + 2))


def rsa_wrapped(algorithm: str, e: int, data_key: bytes) -> bytes:
    der = rsa_private(e).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    wrapped = wrap(recipient("RSA_2048", algorithm, der), data_key)
    assert len(wrapped) == 256
    return wrapped


@pytest.mark.parametrize("e", [3, 65537])
@pytest.mark.parametrize("algorithm", OAEP)
def test_cryptography_unwraps_rsa_wrappings(algorithm: str, e: int) -> None:
    """Wrappings up to the capacity open with the OpenSSL of the cryptography package."""
    oaep = padding.OAEP(padding.MGF1(OAEP[algorithm][0]), OAEP[algorithm][0], None)
    for size in (1, 32, PAIRS["RSA_2048", algorithm]):
        data_key = secrets.token_bytes(size)
        assert rsa_private(e).decrypt(rsa_wrapped(algorithm, e, data_key), oaep) == data_key


@skip_unless.program("openssl", "openssl")
@pytest.mark.parametrize("algorithm", OAEP)
def test_openssl_program_unwraps_rsa_wrappings(algorithm: str, tmp_path: Path) -> None:
    private, wrapped = tmp_path / "private", tmp_path / "wrapped"
    private.write_bytes(rsa_private(65537).private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))
    data_key = secrets.token_bytes(PAIRS["RSA_2048", algorithm])
    wrapped.write_bytes(rsa_wrapped(algorithm, 65537, data_key))
    name = OAEP[algorithm][1]
    command = ["openssl", "pkeyutl", "-decrypt", "-keyform", "DER", "-inkey", str(private), "-in", str(wrapped)]
    for option in ("rsa_padding_mode:oaep", f"rsa_oaep_md:{name}", f"rsa_mgf1_md:{name}"):
        command += ["-pkeyopt", option]
    assert subprocess.run(command, check=True, capture_output=True).stdout == data_key


@pytest.mark.parametrize("algorithm", OAEP)
def test_one_byte_more_than_the_capacity_of_rsa_is_refused(algorithm: str) -> None:
    with pytest.raises(libcrypto.LibcryptoError):
        rsa_wrapped(algorithm, 65537, bytes(PAIRS["RSA_2048", algorithm] + 1))


@pytest.mark.parametrize("fallback", [pytest.param(False, marks=libcrypto_sm2), True])
def test_sm2_wraps_up_to_its_capacity(fallback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fallback:
        monkeypatch.setattr(libcrypto, "has_sm2", lambda: False)
    wrapping.recipient.cache_clear()  # so that it is loaded anew, with or without libcrypto
    found = recipient("EC_SM2", "SM2PKE", SM2_DER)
    in_python = Mock(wraps=sm2_gmssl.encrypt)
    monkeypatch.setattr(sm2_gmssl, "encrypt", in_python)
    for size in (1, 1_024, 6_047):
        data_key = secrets.token_bytes(size)
        assert sm2_gmssl.decrypt(SM2_D, wrap(found, data_key)) == data_key
    assert in_python.called == fallback
    wrapping.recipient.cache_clear()


def test_sm2_without_libcrypto_and_fallback_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcrypto, "has_sm2", lambda: False)
    found = wrapping.find("EC_SM2", "SM2PKE")
    assert found is not None
    with pytest.raises(wrapping.WrappingError, match=r"SM2PKE is not available without SM2: this .* SM2\.$"):
        wrapping.recipient(found, sm2_key(b"\x04" + bytes.fromhex(default_ecc_table["g"])), sm2_fallback=False)


def test_padded_data_key_is_only_in_the_buffer_of_the_caller() -> None:
    """The message that RSA encrypts shows the data key: it is made in the given buffer, and libcrypto only encrypts it."""
    key = libcrypto.generate_rsa_2048()
    padded, data_key = bytearray(256), b"one data key, of 32 bytes in all"
    wrapped = key.oaep_encryptor(b"sha256")(bytearray(data_key), padded)
    message = bytearray(256)
    key.decrypt_into(bytearray(wrapped), message, ((b"rsa_padding_mode", b"none"),))
    assert (padded[0], padded) == (0, message)
    out = bytearray(256)
    assert out[: key.decrypt_oaep_into(bytearray(wrapped), bytearray(256), out, b"sha256")] == data_key


def test_data_key_above_the_capacity_of_oaep_is_refused() -> None:
    """RSAES-OAEP with SHA-256 carries 190 bytes in 2,048 bits."""
    encrypt = libcrypto.generate_rsa_2048().oaep_encryptor(b"sha256")
    assert len(encrypt(bytearray(190), bytearray(256))) == 256
    with pytest.raises(libcrypto.LibcryptoError):
        encrypt(bytearray(191), bytearray(256))
    with pytest.raises(libcrypto.LibcryptoError):
        libcrypto.generate_rsa_2048().oaep_encryptor(b"no such hash")


@pytest.mark.parametrize(("plaintext", "padded"), [(0, 256), (32, 255), (32, 257)])
def test_oaep_refuses_buffers_of_other_sizes(plaintext: int, padded: int) -> None:
    """Libcrypto pads to the modulus' length, past the end of a shorter buffer."""
    buffer = bytearray(padded)
    with pytest.raises(libcrypto.LibcryptoError):
        libcrypto.generate_rsa_2048().oaep_encryptor(b"sha256")(bytearray(plaintext), buffer)
    assert buffer == bytearray(padded)
