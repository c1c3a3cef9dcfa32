"""Wycheproof's vectors against the primitives that the product calls, as it calls them.

Every test counts the vectors that it ran and those that a stated condition left out, and compares both with the file of the
time of writing: a smaller file, and a condition that leaves out more, fail.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeAlias

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import SM4
from cryptography.hazmat.primitives.hashes import SM3
from cryptography.hazmat.primitives.hmac import HMAC
from support import skip_unless

from keyferry import libcrypto

Group: TypeAlias = dict[str, Any]
Vector: TypeAlias = dict[str, Any]

NONCE_SIZES = range(8, 129)
"""Bytes of nonce that cryptography takes. The product's are 12 bytes long."""


def vectors(name: str) -> Iterator[tuple[Group, Vector]]:
    """Return every vector of a file with its group; hexadecimal fields become bytes."""
    with skip_unless.wycheproof(name).open(encoding="utf-8") as file:
        document = json.load(file)
    assert document["numberOfTests"] == sum(len(group["tests"]) for group in document["testGroups"])
    hexadecimal = {"key", "iv", "aad", "msg", "ct", "tag", "label"}
    for group in document["testGroups"]:
        for test in group["tests"]:
            yield group, {name: bytes.fromhex(value) if name in hexadecimal else value for name, value in test.items()}


def test_aes_gcm() -> None:
    ran: Counter[str] = Counter()
    for _, test in vectors("aes_gcm_test.json"):
        if len(test["iv"]) not in NONCE_SIZES:
            ran["another nonce"] += 1
            continue
        aead = AESGCM(memoryview(bytearray(test["key"])))
        plaintext, sealed = memoryview(bytearray(test["msg"])), memoryview(test["ct"] + test["tag"])
        out = bytearray(len(plaintext))
        if test["result"] == "valid":
            assert aead.encrypt(test["iv"], plaintext, test["aad"]) == sealed, test["tcId"]
            aead.decrypt_into(test["iv"], sealed, test["aad"], out)
            assert out == plaintext, test["tcId"]
        else:
            with pytest.raises(InvalidTag):
                aead.decrypt_into(test["iv"], sealed, test["aad"], out)
        ran[f"{test['result']}, key of {8 * len(test['key'])}"] += 1
    assert ran == {
        "valid, key of 128": 70,
        "valid, key of 192": 65,
        "valid, key of 256": 67,
        "invalid, key of 128": 27,
        "invalid, key of 192": 27,
        "invalid, key of 256": 27,
        "another nonce": 33,
    }


def test_sm4_gcm() -> None:
    ran: Counter[str] = Counter()
    for _, test in vectors("sm4_gcm_test.json"):
        if len(test["iv"]) not in NONCE_SIZES:
            ran["another nonce"] += 1
            continue
        key = SM4(memoryview(bytearray(test["key"])))  # type: ignore[arg-type]  # any buffer, as in the product
        plaintext, out = memoryview(bytearray(test["msg"])), bytearray(len(test["ct"]))
        decryptor = Cipher(key, modes.GCM(test["iv"], test["tag"])).decryptor()
        decryptor.authenticate_additional_data(test["aad"])
        decryptor.update_into(memoryview(test["ct"]), out)
        if test["result"] == "valid":
            encryptor = Cipher(key, modes.GCM(test["iv"])).encryptor()
            encryptor.authenticate_additional_data(test["aad"])
            ciphertext = encryptor.update(plaintext) + encryptor.finalize()
            assert (ciphertext, encryptor.tag) == (test["ct"], test["tag"]), test["tcId"]
            decryptor.finalize()
            assert out == plaintext, test["tcId"]
        else:
            with pytest.raises(InvalidTag):
                decryptor.finalize()
        ran[test["result"]] += 1
    assert ran == {"valid": 66, "invalid": 27, "another nonce": 11}


def test_hmac_sm3() -> None:
    ran: Counter[str] = Counter()
    for group, test in vectors("hmac_sm3_test.json"):
        mac = HMAC(test["key"], SM3())
        mac.update(test["msg"])
        tag = mac.finalize()[: group["tagSize"] // 8]
        assert (tag == test["tag"]) == (test["result"] == "valid"), test["tcId"]
        ran[test["result"]] += 1
    assert ran == {"valid": 66, "invalid": 108}


# RSA-OAEP


def own_options(group: Group, test: Vector) -> tuple[tuple[bytes, bytes], ...]:
    """Set libcrypto's options for this vector's hashes and label."""
    names = {name: group[name].replace("SHA-", "sha").lower().encode() for name in ("sha", "mgfSha")}
    options = ((b"rsa_padding_mode", b"oaep"), (b"rsa_oaep_md", names["sha"]), (b"rsa_mgf1_md", names["mgfSha"]))
    return (*options, (b"rsa_oaep_label", test["label"].hex().encode())) if test["label"] else options


def opened(key: libcrypto.Key, group: Group, test: Vector, options: libcrypto.Options) -> bytes | None:
    """The decrypted message; None where libcrypto refuses."""
    out = bytearray(group["keySize"] // 8)
    try:
        return bytes(out[: key.decrypt_into(bytearray(test["ct"]), out, options)])
    except libcrypto.LibcryptoError:
        return None


def opened_as_a_module_does(key: libcrypto.Key, group: Group, test: Vector, digest: bytes) -> bytes | None:
    """The same in two steps."""
    padded, out = bytearray(group["keySize"] // 8), bytearray(group["keySize"] // 8)
    try:
        return bytes(out[: key.decrypt_oaep_into(bytearray(test["ct"]), padded, out, digest)])
    except libcrypto.LibcryptoError:
        return None


def by_key(name: str) -> Iterator[tuple[libcrypto.Key, Group, Vector]]:
    """Every vector of a file with its group and its private key, which is loaded once a group."""
    for pkcs8, found in itertools.groupby(vectors(name), lambda pair: str(pair[0]["privateKeyPkcs8"])):
        key = libcrypto.private_key(bytearray.fromhex(pkcs8))
        for group, test in found:
            assert group["mgf"] == "MGF1"
            yield key, group, test


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rsa_oaep_2048_sha256_mgf1sha256_test.json", {"valid": 10, "valid, with a label": 8, "invalid": 19}),
        ("rsa_oaep_2048_sha1_mgf1sha1_test.json", {"valid": 10, "valid, with a label": 7, "invalid": 19}),
        ("rsa_oaep_2048_sha256_mgf1sha1_test.json", {"valid": 10, "valid, with a label": 3, "invalid": 18}),
        ("rsa_oaep_misc_test.json", {"valid": 375, "valid, with a label": 17, "acceptable, with a label": 3}),
    ],
)
def test_rsa_oaep_with_each_vectors_own_hashes_and_label(name: str, expected: dict[str, int]) -> None:
    """Libcrypto's options reach every hash and every label."""
    ran: Counter[str] = Counter()
    for key, group, test in by_key(name):
        message = opened(key, group, test, own_options(group, test))
        allowed = {"valid": {test["msg"]}, "invalid": {None}, "acceptable": {test["msg"], None}}
        assert message in allowed[test["result"]], test["tcId"]
        ran[test["result"] + (", with a label" if test["label"] else "")] += 1
    assert ran == expected


@pytest.mark.parametrize(
    ("name", "algorithm", "expected"),
    [
        ("rsa_oaep_2048_sha256_mgf1sha256_test.json", "SHA-256", {"opened": 10, "refused": 27}),
        ("rsa_oaep_2048_sha256_mgf1sha256_test.json", "SHA-1", {"refused": 37}),
        ("rsa_oaep_2048_sha1_mgf1sha1_test.json", "SHA-1", {"opened": 10, "refused": 26}),
        ("rsa_oaep_2048_sha1_mgf1sha1_test.json", "SHA-256", {"refused": 36}),
        # One hash for the label, the other for the mask: libraries with a single setting use such a pair.
        ("rsa_oaep_2048_sha256_mgf1sha1_test.json", "SHA-256", {"refused": 31}),
        ("rsa_oaep_2048_sha256_mgf1sha1_test.json", "SHA-1", {"refused": 31}),
    ],
)
def test_software_modules_rsa_oaep_opens_only_its_algorithm(
    name: str, algorithm: str, expected: dict[str, int]
) -> None:
    """Another hash or mask hash, any label, and every invalid vector are refused."""
    ran: Counter[str] = Counter()
    for key, group, test in by_key(name):
        message = opened_as_a_module_does(key, group, test, algorithm.replace("-", "").lower().encode())
        fits = test["result"] == "valid" and not test["label"] and group["sha"] == group["mgfSha"] == algorithm
        assert message == (test["msg"] if fits else None), test["tcId"]
        ran["refused" if message is None else "opened"] += 1
    assert ran == expected
