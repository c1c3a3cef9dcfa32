"""Unusual libraries and tokens: corrected where that is possible, else refused with the reason."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pkcs11 import Attribute, AttributeReadOnly, AttributeTypeInvalid, DeviceError
from support import skip_unless, tokens
from support.secrets import secret_file
from support.tokens import RealToken

from keyferry.module import ModuleError, Pkcs11Module, probe
from keyferry.module import token as token_module
from keyferry.module.token import Pkcs11Session


def test_invalid_library_is_refused(tmp_path: Path, softhsm_token: RealToken) -> None:
    """The path is missing, not a library, or a library without PKCS#11."""
    (tmp_path / "text.so").write_text("text")
    for path in (tmp_path / "missing.so", tmp_path / "text.so", "libc.so.6"):
        with pytest.raises(ModuleError, match="PKCS#11 library does not load"):
            Pkcs11Module.open(path, token_label="app", key_label="wrapping")


def test_p11_kits_proxy_is_refused() -> None:
    """p11-kit's proxy gives each caller a PKCS#11 of its own; the message asks for the library behind it."""
    proxy = skip_unless.library("*/p11-kit-proxy.so", "p11-kit-modules")
    with pytest.raises(ModuleError, match="name the token's own library"):
        Pkcs11Module.open(proxy, token_label="app", key_label="wrapping")


def test_missing_token_is_refused_with_the_present_ones(softhsm_token: RealToken) -> None:
    """The message has the labels of the tokens that are there."""
    with pytest.raises(ModuleError, match=r"has no token 'missing'; it has: .*'app'"):
        Pkcs11Module.open(
            softhsm_token.library, token_label="missing", key_label="wrapping", pin_file=softhsm_token.pin_file
        )


@skip_unless.program(*tokens.PROGRAMS["softokn"])
def test_initialised_library_is_used_as_it_is(tmp_path: Path) -> None:
    """NSS would not initialise without its parameters."""
    token = tokens.softokn(tmp_path)
    code = f"""
from keyferry.module import Pkcs11Module, cryptoki
assert cryptoki.Library({str(token.library)!r}, {token.parameters!r}).initialize()
module = Pkcs11Module.open({str(token.library)!r}, token_label={token.label!r}, key_label="wrapping",
    pin_file={str(token.pin_file)!r}, generate=True)
print(module.wrapping_algorithm)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "RSAES_OAEP_SHA_256\n"


def test_nss_without_its_parameters_is_explained() -> None:
    """NSS has to get the folder of its database."""
    library = skip_unless.library("*/libsoftokn3.so", "libnss3")
    code = f"""
from keyferry.module import ModuleError, Pkcs11Module, probe
try:
    Pkcs11Module.open({str(library)!r}, token_label="x", key_label="x")
except ModuleError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "does not open: " in out
    assert "library_parameters" in out


@pytest.fixture(scope="module")
def opencryptoki(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The output of opencryptoki_token.py for a fresh soft token of opencryptoki."""
    library = skip_unless.library("*/pkcs11/libopencryptoki.so", "opencryptoki")
    folder, here = tmp_path_factory.mktemp("opencryptoki"), Path(__file__).parent
    secret_file(folder / "pin", "11223344")
    script = [str(here / "support" / "opencryptoki.sh"), "11223344", str(folder)]
    probe = [sys.executable, str(here / "opencryptoki_token.py"), str(library), str(folder / "pin")]
    unshare = ["unshare", "--mount", "--ipc", "--pid", "--fork", "--mount-proc"]
    ran = subprocess.run([*unshare, *script, *probe], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    said: dict[str, Any] = json.loads(ran.stdout)
    return said


def beside_opencryptoki(test: Callable[..., None]) -> Callable[..., None]:
    """Skip without the needs of these tests."""
    for mark in (
        skip_unless.program("pkcs11-tool", "opensc"),
        skip_unless.program("pkcsslotd", "opencryptoki"),
        skip_unless.root(),
    ):
        test = mark(test)
    return test


@beside_opencryptoki
def test_readable_imported_key_is_made_sensitive(opencryptoki: dict[str, Any]) -> None:
    """The token ignores the attributes when it unwraps, and sets them afterwards."""
    assert opencryptoki["before"] == [False, True, opencryptoki["known"]]
    assert opencryptoki["after"] == [True, False, None]


@beside_opencryptoki
def test_a_token_without_aes_gcm_is_refused_when_it_is_opened(opencryptoki: dict[str, Any]) -> None:
    """Version 3.8.1, of Debian 12, has none; later ones have it, and work."""
    assert opencryptoki["wrong sizes"] == ["invalid data key size; expected 16, 24 or 32 bytes"] * 3
    if "opened" not in opencryptoki:
        assert "does not encrypt with AES-GCM" in opencryptoki["refused"]
    else:
        assert opencryptoki["opened"] == "RSAES_OAEP_SHA_256"


@beside_opencryptoki
def test_wrong_pins_never_lock_a_token(opencryptoki: dict[str, Any]) -> None:
    """The third wrong PIN would lock the token, so it is not sent; pkcs11-tool still logs in with the right one."""
    refused, kept = opencryptoki["wrong PINs"][:2], opencryptoki["wrong PINs"][2:]
    assert all("refused the PIN" in message for message in refused)
    assert len(kept) == 7
    assert all("one more wrong PIN locks the token" in message for message in kept)


# Simulated tokens, which no machine has


class Key(dict[Attribute, Any]):
    """A key object: attributes, some of which cannot be changed."""

    def __init__(self, *fixed: Attribute, **attributes: Any) -> None:
        super().__init__({Attribute[name]: value for name, value in attributes.items()})
        self._fixed = fixed

    def __setitem__(self, attribute: Attribute, value: Any) -> None:
        if attribute in self._fixed:
            raise AttributeReadOnly
        super().__setitem__(attribute, value)

    def __getitem__(self, attribute: Attribute) -> Any:
        if attribute not in self:
            raise AttributeTypeInvalid
        return super().__getitem__(attribute)


STUBBORN = {
    "is not changed": (Key(Attribute.SENSITIVE, SENSITIVE=False, EXTRACTABLE=False), "CKR_ATTRIBUTE_READ_ONLY"),
    "does not tell": (Key(SENSITIVE=True), "CKR_ATTRIBUTE_TYPE_INVALID"),
}


@pytest.mark.parametrize("case", STUBBORN)
def test_a_key_that_stays_readable_is_refused(case: str) -> None:
    """The token may refuse the change of attributes with any error."""
    key, reason = STUBBORN[case]
    with pytest.raises(ModuleError, match=f"keeps an imported data key readable .{reason}."):
        token_module._harden(key, "an imported data key")


def test_key_attributes_are_read_back_after_a_change() -> None:
    """A change that the token only reports is refused."""

    class Liar(Key):
        def __setitem__(self, attribute: Attribute, value: Any) -> None:
            pass

    with pytest.raises(ModuleError, match=r"readable \(SENSITIVE, EXTRACTABLE\)"):
        token_module._harden(Liar(SENSITIVE=False, EXTRACTABLE=True), "an imported data key")


class Odd:
    """A connection to a token with an unusual AES-GCM."""

    def __init__(self, data_key: bytes, *, nonce: bytes | None) -> None:
        self._aes = AESGCM(data_key)
        self._nonce = nonce

    def encrypt(self, _key: Any, nonce: bytes, plaintext: bytes, aad: bytes) -> bytes:
        return self._aes.encrypt(self._nonce or nonce, plaintext, aad)

    def decrypt(self, _key: Any, nonce: bytes, ciphertext: bytes, aad: bytes) -> bytes:
        return self._aes.decrypt(nonce, ciphertext, aad)


def test_a_token_that_chooses_the_nonce_itself_is_refused() -> None:
    """Other implementations could not decrypt such ciphertexts."""
    known = os.urandom(32)
    usual: Any = Odd(known, nonce=None)
    probe._probe_key(usual, Key(), known)
    odd: Any = Odd(known, nonce=bytes(12))
    with pytest.raises(ModuleError, match="may choose the nonce itself"):
        probe._probe_key(odd, Key(), known)


def test_token_that_shows_a_key_is_refused() -> None:
    """The key's attributes claim that it is sensitive."""
    known = os.urandom(32)
    odd: Any = Odd(known, nonce=None)
    with pytest.raises(ModuleError, match="cannot be read, but returns its value"):
        probe._probe_key(odd, Key(VALUE=known), known)


def test_a_key_pair_that_comes_out_readable_is_destroyed_again(
    softhsm_token: RealToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that generates readable keys is left without the new pair."""

    def readable(_key: Any, what: str) -> None:
        raise ModuleError(f"the token keeps {what} readable")

    with monkeypatch.context() as patched:
        patched.setattr(token_module, "_harden", readable)
        with pytest.raises(ModuleError, match="keeps a private key that it generated readable"):
            softhsm_token.open("never")
    with pytest.raises(ModuleError, match="has no RSA key pair 'never'"):
        softhsm_token.open("never", generate=False)


@pytest.mark.parametrize("verb", ["encrypt", "decrypt"])
def test_token_failure_is_not_reported_as_damaged_data(
    softhsm_token: RealToken, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """A failure of the token is named, and the token's judgement of the data is not."""
    module = softhsm_token.open()
    key, _ = tokens.imported(module)
    sealed = module.encrypt(key, b"x")

    def fails(*_: Any) -> bytes:
        raise DeviceError

    with monkeypatch.context() as broken:
        broken.setattr(Pkcs11Session, verb, fails)
        with pytest.raises(ModuleError, match=f"the token could not {verb} .*: CKR_DEVICE_ERROR"):
            getattr(module, verb)(key, sealed)
    assert module.decrypt(key, sealed) == b"x"
    module.close()


def test_two_tokens_with_one_label_are_refused(
    softhsm_token: RealToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module does not guess which token is meant."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("SOFTHSM2_CONF", "")  # to be set back
        twins = tokens.softhsm(tmp_path, "twin", "twin")
        softhsm_token.finalize()
        with pytest.raises(ModuleError, match="has 2 tokens 'twin'"):
            twins[0].open()
    softhsm_token.finalize()
    softhsm_token.open().close()
