"""Cryptographic modules in real tokens, SoftHSM2 and NSS softokn: their operations, and that keys stay in the token."""

import base64
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pkcs11 import Attribute, AttributeSensitive, KeyType, PKCS11Error
from support import skip_unless, tokens
from support.agent import RunningAgent
from support.keys import RecipientFor
from support.tokens import FIND_TOKEN, RealToken

from keyferry.module import DataKey, ModuleError, Pkcs11Module, SoftwareModule, cryptoki
from keyferry.module import token as token_module

# Operations of a module


def test_token_module_does_the_main_job(agent: RunningAgent, module: Pkcs11Module) -> None:
    """A token imports, uses, forgets and recovers a data key, and exchanges ciphertexts with a software module."""
    with agent.client() as kms:
        key, record = module.new_data_key(kms, key_id="alias/dev", encryption_context={"tenant": "acme"})
        sealed = module.encrypt(key, b"plaintext", aad=b"header")
        module.forget(key)
        again = module.recover_data_key(kms, record)
        assert module.decrypt(again, sealed, aad=b"header") == b"plaintext"
        software = SoftwareModule.generate("RSA_2048")
        same = software.recover_data_key(kms, record)
        assert software.decrypt(same, sealed, b"header") == b"plaintext"
        assert module.decrypt(again, software.encrypt(same, b"other", b"aad"), b"aad") == b"other"


def test_wrapping_algorithm_is_supported_by_the_token(token: RealToken, module: Pkcs11Module) -> None:
    """SoftHSM2 supports OAEP with SHA-1 only."""
    expected = "RSAES_OAEP_SHA_1" if "softhsm" in str(token.library) else "RSAES_OAEP_SHA_256"
    assert (module.wrapping_key_spec, module.wrapping_algorithm) == ("RSA_2048", expected)


@pytest.mark.parametrize("size", [16, 24, 32])
def test_encryption_is_aes_gcm_with_a_fresh_nonce_in_front(module: Pkcs11Module, size: int) -> None:
    """The format is nonce (12) ‖ ciphertext ‖ tag (16), for plaintexts of any length including zero."""
    data_key = os.urandom(size)
    key = module.import_data_key(tokens.exported(module, data_key))
    for plaintext, aad in ((b"", b""), (b"\0", b"aad\0"), (os.urandom(1_000_003), os.urandom(5_000))):
        sealed = [module.encrypt(key, plaintext, aad) for _ in range(2)]
        assert sealed[0][:12] != sealed[1][:12]
        assert len(sealed[0]) == len(plaintext) + 28
        assert AESGCM(data_key).decrypt(sealed[0][:12], sealed[0][12:], aad) == plaintext
        nonce = os.urandom(12)
        assert module.decrypt(key, nonce + AESGCM(data_key).encrypt(nonce, plaintext, aad), aad) == plaintext


def test_changed_ciphertext_does_not_decrypt(module: Pkcs11Module) -> None:
    """Every cause has the same error."""
    key, _ = tokens.imported(module)
    sealed = module.encrypt(key, b"plaintext", b"aad")
    damaged = [bytes([*sealed[:i], sealed[i] ^ 1, *sealed[i + 1 :]]) for i in range(len(sealed))]
    messages = set()
    for wrong, aad in [*((data, b"aad") for data in damaged), (sealed, b""), (sealed[:27], b"aad"), (b"", b"aad")]:
        with pytest.raises(ModuleError) as caught:
            module.decrypt(key, wrong, aad)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert module.decrypt(key, sealed, b"aad") == b"plaintext"


@pytest.mark.parametrize("size", [1, 15, 17, 31, 33, 64, 190])
def test_a_data_key_that_is_no_aes_key_is_refused(module: Pkcs11Module, size: int) -> None:
    """Whether the token notices it when it unwraps or only when it encrypts."""
    with pytest.raises(ModuleError, match="expected 16, 24 or 32"):
        module.import_data_key(tokens.exported(module, os.urandom(size)))


def test_invalid_and_foreign_exports_are_refused(module: Pkcs11Module) -> None:
    """Exports to another module, damaged, truncated and not in Base64 have one error."""
    good = tokens.exported(module, os.urandom(32))
    raw = base64.b64decode(good)
    wrong: list[str | bytes] = [good[:-4], "", "*", b"", raw[:-1], raw + b"\0", bytes(256), b"\xff" * 256]
    wrong += [bytes([*raw[:i], raw[i] ^ 1, *raw[i + 1 :]]) for i in (1, 40, 255)]
    other = SoftwareModule.generate("RSA_2048")
    other.wrapping_algorithm = module.wrapping_algorithm
    wrong.append(RecipientFor(other).wrap(os.urandom(32)))
    for blob in wrong:
        with pytest.raises(ModuleError, match="not a data key that was exported"):
            module.import_data_key(blob)
    module.import_data_key(raw)


def test_a_forgotten_key_is_gone_from_the_token(module: Pkcs11Module) -> None:
    """A handle is valid in its own module only."""
    key, _ = tokens.imported(module)
    sealed = module.encrypt(key, b"x")
    inside = module._keys[key].key
    module.forget(key)
    with pytest.raises(PKCS11Error):
        _ = inside[Attribute.CLASS]
    for use in (lambda: module.encrypt(key, b"x"), lambda: module.decrypt(key, sealed), lambda: module.forget(key)):
        with pytest.raises(ModuleError, match="does not hold that key"):
            use()
    with pytest.raises(ModuleError, match="does not hold that key"):
        module.encrypt(DataKey(), b"x")


# Keys stay in the token


def test_a_data_key_cannot_be_read_out(module: Pkcs11Module) -> None:
    """The process that imported a data key cannot read it in another session."""
    key, _ = tokens.imported(module)
    inside = module._keys[key].key
    assert inside[Attribute.SENSITIVE]
    assert not inside[Attribute.EXTRACTABLE]
    assert not inside[Attribute.WRAP]
    with pytest.raises(AttributeSensitive):
        _ = inside[Attribute.VALUE]
    assert not [name for name in dir(key) if not name.startswith("__")]


@skip_unless.program("pkcs11-tool", "opensc")
def test_another_program_cannot_extract_the_keys(softhsm_token: RealToken, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data key is a token object here, so that a second process sees it: sensitive and not extractable."""
    monkeypatch.setitem(token_module._TEMPLATE, Attribute.TOKEN, True)
    monkeypatch.setattr(token_module, "_find_token", lambda *wanted: tokens.ReadWrite(FIND_TOKEN(*wanted)))
    module = softhsm_token.open("seen from outside")
    key, data_key = tokens.imported(module)
    private = softhsm_token.tool("--list-objects", "--type", "privkey").split("Private Key Object")
    (found,) = [entry for entry in private if "seen from outside" in entry]
    assert "Usage:      unwrap\n" in found
    assert "Access:     sensitive, always sensitive, never extractable, local\n" in found
    secret = softhsm_token.tool("--list-objects", "--type", "secrkey")
    assert "keyferry data key" in secret
    assert "Usage:      encrypt, decrypt\n" in secret
    assert "Access:     sensitive\n" in secret
    assert data_key.hex() not in secret.lower()
    module.forget(key)
    assert "keyferry data key" not in softhsm_token.tool("--list-objects", "--type", "secrkey")
    module.close()


def test_pin_and_keys_appear_in_no_repr(module: Pkcs11Module) -> None:
    """No repr, pickle or printed attribute has a PIN or a key."""
    key, _ = tokens.imported(module)
    shown = f"{module!r} {module._choice!r} {vars(module)!r} {key!r}"
    assert tokens.PIN not in shown
    assert repr(module) == f"Pkcs11Module({module._choice.token}, 'wrapping')"
    with pytest.raises((TypeError, ValueError)):
        pickle.dumps(module)


# The key pair


def test_key_pair_is_found_by_its_label_after_a_restart(token: RealToken) -> None:
    """Earlier exports are imported after the restart, and another process finds the pair too."""
    before = token.open()
    public_key, blob = before.public_key_blob, tokens.exported(before, b"k" * 32)
    sealed = before.encrypt(before.import_data_key(blob), b"plaintext")
    before.close()
    token.finalize()
    after = token.open(generate=False)
    assert after.public_key_blob == public_key
    assert after.decrypt(after.import_data_key(blob), sealed) == b"plaintext"
    after.close()
    code = "import sys; from support.tokens import *; from pathlib import Path; "
    code += f"print(RealToken(Path({str(token.library)!r}), *{tuple(map(str, token[1:3]))}, {token.parameters!r})"
    code += ".open(generate=False).public_key_blob)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert other.stdout.strip() == public_key


def test_missing_key_pair_is_generated_only_on_request(token: RealToken) -> None:
    """With generate=False, a missing key pair is an error that names its label."""
    with pytest.raises(ModuleError, match="has no RSA key pair 'missing'"):
        token.open("missing", generate=False)


WRONG_PAIRS = {
    "two with one label": (2, 2048, {}, "2 RSA private keys"),
    "of another size": (1, 3072, {}, "3072 bits; RSA_2048"),
    "not for unwrapping": (1, 2048, {Attribute.UNWRAP: False}, "may not unwrap keys"),
    "to be read": (1, 2048, {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}, "can be read out of the token"),
}


@pytest.mark.parametrize("case", WRONG_PAIRS)
def test_unsuitable_key_pair_is_refused_with_the_reason(softhsm_token: RealToken, case: str) -> None:
    """Another program may have generated the key pair."""
    count, bits, template, reason = WRONG_PAIRS[case]
    library = cryptoki.Library(softhsm_token.library, None)
    library.initialize()
    with library.pkcs11.get_token(token_label=softhsm_token.label).open(rw=True, user_pin=tokens.PIN) as session:
        for _ in range(count):
            session.generate_keypair(KeyType.RSA, bits, label=case, store=True, private_template=template)
    with pytest.raises(ModuleError, match=reason):
        softhsm_token.open(case)


@skip_unless.program("pkcs11-tool", "opensc")
def test_a_key_pair_made_by_another_program_is_used(softhsm_token: RealToken) -> None:
    """The key pair may have further permissions, as long as it cannot leave the token."""
    softhsm_token.tool("--keypairgen", "--key-type", "rsa:2048", "--usage-wrap", "--usage-decrypt", "--label", "theirs")
    module = softhsm_token.open("theirs", generate=False)
    key, _ = tokens.imported(module)
    assert module.decrypt(key, module.encrypt(key, b"x")) == b"x"
    softhsm_token.tool("--delete-object", "--type", "privkey", "--label", "theirs")
    softhsm_token.tool("--delete-object", "--type", "pubkey", "--label", "theirs")
    softhsm_token.tool("--keypairgen", "--key-type", "rsa:2048", "--usage-wrap", "--label", "theirs")
    softhsm_token.finalize()
    with pytest.raises(ModuleError, match="has another key pair 'theirs' now"):
        module.encrypt(key, b"x")
    module.close()


# Installed or not


EXTRAS = [("Pkcs11Module", "pkcs11", "pkcs11"), ("SoftwareModule", "cryptography", "module")]


@pytest.mark.parametrize(("name", "package", "extra"), EXTRAS)
def test_missing_extra_of_a_module_is_named(name: str, package: str, extra: str) -> None:
    """Other kinds of modules can be imported."""
    code = f"""
import sys
sys.modules[{package!r}] = None
import keyferry.module
assert keyferry.module.ModuleError
try:
    keyferry.module.{name}
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == f'{name} needs {package}; install the extra "{extra}" of keyferry (docs/installing.md)\n'


def test_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    """The lazy imports do not change Python's usual error."""
    import keyferry.module  # noqa: PLC0415

    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = keyferry.module.Other
