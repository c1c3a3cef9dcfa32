"""The self-test before an agent serves, and libcryptos that lack something."""

from typing import Any

import pytest
from support.keys import recipient, wrap

from keyferry import libcrypto
from keyferry.secret import SecretMemory
from keyferry.sm2_ciphertext import raw_to_der
from keyferry_agent.crypto import selftest, wrapping


def test_self_test_passes_and_names_missing_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """SM2 comes from libcrypto, from the fallback, or is missing."""
    scratch = SecretMemory(8192, require=False)
    if libcrypto.has_sm2():
        assert selftest.run(scratch, sm2_fallback=False) == []
    monkeypatch.setattr(libcrypto, "has_sm2", lambda: False)
    assert selftest.run(scratch, sm2_fallback=True) == []
    (message,) = selftest.run(scratch, sm2_fallback=False)
    assert message.startswith("SM2PKE is not available without SM2: this ")
    assert "OPENSSL_CONF" in message


@pytest.mark.parametrize("key_spec", ["Aliyun_AES_256", "Aliyun_SM4"])
def test_wrong_known_answer_stops_the_start(monkeypatch: pytest.MonkeyPatch, key_spec: str) -> None:
    """One wrong bit is enough for each algorithm."""
    scratch = SecretMemory(8192, require=False)
    good = selftest._SEALED[key_spec]
    monkeypatch.setitem(selftest._SEALED, key_spec, good[:-1] + ("0" if good[-1] != "0" else "1"))
    with pytest.raises(selftest.SelfTestError, match=key_spec):
        selftest.run(scratch, sm2_fallback=False)


@pytest.mark.parametrize("algorithm", ["RSAES_OAEP_SHA_256", "RSAES_OAEP_SHA_1"])
def test_a_wrong_rsa_stops_the_start(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    """A known ciphertext decrypts to something else, or not at all."""
    scratch = SecretMemory(8192, require=False)
    good = selftest._RSA_CIPHERTEXTS
    monkeypatch.setattr(selftest, "_RSA_MESSAGE", b"something else")
    with pytest.raises(selftest.SelfTestError, match=r"RSAES_OAEP_SHA_256: .* something else"):
        selftest.run(scratch, sm2_fallback=False)
    monkeypatch.undo()
    other = next(name for name in good if name != algorithm)
    monkeypatch.setattr(selftest, "_RSA_CIPHERTEXTS", {**good, algorithm: good[other]})
    with pytest.raises(selftest.SelfTestError, match=f"{algorithm}: libcrypto could not decrypt .*OPENSSL_CONF"):
        selftest.run(scratch, sm2_fallback=False)


def test_encryption_that_does_not_decrypt_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test encrypts, too, as the agent does."""
    encryptor = libcrypto.Key.oaep_encryptor

    def wrong(key: libcrypto.Key, digest: bytes) -> Any:
        encrypt = encryptor(key, digest)
        return lambda plaintext, padded: encrypt(bytearray(len(plaintext)), padded)

    monkeypatch.setattr(libcrypto.Key, "oaep_encryptor", wrong)
    wrapping.recipient.cache_clear()
    with pytest.raises(selftest.SelfTestError, match=r"RSAES_OAEP_SHA_256: .* something else"):
        selftest.run(SecretMemory(8192, require=False), sm2_fallback=False)
    wrapping.recipient.cache_clear()


def test_every_wrapping_has_a_known_answer() -> None:
    """A wrapping without a known answer would stop the start."""
    assert {
        algorithm for key_spec, algorithm in wrapping.TABLE if key_spec != "EC_SM2"
    } == selftest._RSA_CIPHERTEXTS.keys()


@pytest.mark.parametrize("with_libcrypto", [True, False])
@pytest.mark.parametrize("change", [{"_SM2_MESSAGE": b"something else"}, {"_SM2_D": "11" * 32}])
def test_a_wrong_sm2_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], *, with_libcrypto: bool
) -> None:
    """Wrong answers of libcrypto and of the fallback are found."""
    if with_libcrypto and not libcrypto.has_sm2():
        pytest.skip("needs libcrypto with SM2 (Debian package libssl3)")
    for name, value in change.items():
        monkeypatch.setattr(selftest, name, value)
    monkeypatch.setattr(libcrypto, "has_sm2", lambda: with_libcrypto)
    with pytest.raises(selftest.SelfTestError, match="SM2PKE"):
        selftest.run(SecretMemory(8192, require=False), sm2_fallback=True)


def test_sm2_fallback_wraps_where_libcrypto_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The setting sm2_fallback is opt-in, and libcrypto opens the fallback's wrappings."""
    to = recipient("SM2PKE")
    way = wrapping.find("EC_SM2", "SM2PKE")
    assert way is not None
    monkeypatch.setattr(libcrypto, "has_sm2", lambda: False)
    wrapping.recipient.cache_clear()
    with pytest.raises(wrapping.WrappingError, match="SM2PKE is not available"):
        wrapping.recipient(way, to.der, sm2_fallback=False)
    wrapped = wrap(wrapping.recipient(way, to.der, sm2_fallback=True), b"k" * 32)
    wrapping.recipient.cache_clear()
    opened = bytearray(64)
    assert to.private.decrypt_into(bytearray(raw_to_der(wrapped)), opened) == 32
    assert opened[:32] == b"k" * 32


@pytest.mark.parametrize(
    ("names", "why"),
    [(("libno-such.so",), "libcrypto.so.3 was not found"), (("libc.so.6",), "older than OpenSSL 3.0")],
)
def test_a_system_without_openssl_3_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], why: str
) -> None:
    """With the package that brings it."""
    monkeypatch.setattr(libcrypto, "_LIBRARY_NAMES", names)
    with pytest.raises(libcrypto.LibcryptoError, match=why):
        libcrypto.load.__wrapped__()
    assert libcrypto.version().startswith("OpenSSL")


def test_failed_libcrypto_calls_raise() -> None:
    """An empty buffer is never mistaken for a result."""
    key = libcrypto.public_key(recipient("RSAES_OAEP_SHA_256").der)
    for data, options in (
        (bytearray(), ()),
        (bytearray(1), ((b"rsa_padding_mode", b"none"),)),
        (bytearray(1), ((b"x", b"y"),)),
    ):
        with pytest.raises(libcrypto.LibcryptoError):
            key.encrypt(data, options)
    for out in (bytearray(), bytearray(256)):
        with pytest.raises(libcrypto.LibcryptoError):
            key.decrypt_into(bytearray(256), out)
    with pytest.raises(libcrypto.LibcryptoError, match="not a private key"):
        key.private_der()
    for load in (libcrypto.public_key, libcrypto.private_key):
        for der in (b"", b"nonsense"):
            with pytest.raises(libcrypto.LibcryptoError, match="key"):
                load(bytearray(der))  # type: ignore[arg-type]
    assert repr(key) == "Key(...)"
