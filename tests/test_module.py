"""The software module: what it imports, what it refuses, that it cannot be asked for a key."""

import base64
import os
import pickle
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from support.agent import RunningAgent
from support.keys import RecipientFor

from keyferry import libcrypto
from keyferry.module import CryptographicModule, DataKey, ModuleError, SoftwareModule
from keyferry.module.interface import DataKeyRecord

KEY_SPECS = ["RSA_2048", "EC_SM2"]


@pytest.fixture(scope="module", params=KEY_SPECS)
def module(request: pytest.FixtureRequest) -> SoftwareModule:
    """A module of each kind."""
    return SoftwareModule.generate(request.param)


def exported(module: SoftwareModule, data_key: bytes) -> str:
    """A data key, exported to a module the way an agent does it."""
    return RecipientFor(module).wrap(data_key)


def test_the_main_job(agent: RunningAgent, module: SoftwareModule) -> None:
    """Make, import, use, forget, recover, use again; the record is JSON-able and recovers in another module too."""
    with agent.client() as kms:
        key, record = module.new_data_key(kms, key_id="alias/dev", encryption_context={"tenant": "acme"})
        sealed = module.encrypt(key, b"plaintext", aad=b"header")
        module.forget(key)
        again = module.recover_data_key(kms, record)
        assert module.decrypt(again, sealed, aad=b"header") == b"plaintext"
        other = SoftwareModule.generate("EC_SM2" if module.wrapping_key_spec == "RSA_2048" else "RSA_2048")
        assert other.decrypt(other.recover_data_key(kms, record), sealed, b"header") == b"plaintext"
    assert record["EncryptionContext"] == {"tenant": "acme"}
    assert set(record) == set(DataKeyRecord.__annotations__)


def test_encryption_is_aes_gcm_with_a_fresh_nonce_in_front(module: SoftwareModule) -> None:
    """Nonce (12) ‖ ciphertext ‖ tag (16): anybody with the key opens it."""
    for size in (16, 24, 32):
        data_key = os.urandom(size)
        key = module.import_data_key(exported(module, data_key))
        sealed = [module.encrypt(key, b"plaintext", b"aad") for _ in range(2)]
        assert sealed[0][:12] != sealed[1][:12]
        assert AESGCM(data_key).decrypt(sealed[0][:12], sealed[0][12:], b"aad") == b"plaintext"
        nonce = os.urandom(12)
        assert module.decrypt(key, nonce + AESGCM(data_key).encrypt(nonce, b"x", b"aad"), b"aad") == b"x"


def test_what_was_changed_does_not_decrypt(module: SoftwareModule) -> None:
    """One error for every cause."""
    key = module.import_data_key(exported(module, os.urandom(32)))
    sealed = module.encrypt(key, b"plaintext", b"aad")
    damaged = [bytes([*sealed[:i], sealed[i] ^ 1, *sealed[i + 1 :]]) for i in range(len(sealed))]
    messages = set()
    for wrong, aad in [*((data, b"aad") for data in damaged), (sealed, b""), (sealed[:27], b"aad"), (b"", b"aad")]:
        with pytest.raises(ModuleError) as caught:
            module.decrypt(key, wrong, aad)
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize("size", [1, 15, 17, 31, 33, 64])
def test_a_data_key_that_is_no_aes_key_is_refused(module: SoftwareModule, size: int) -> None:
    """With its size."""
    with pytest.raises(ModuleError, match=f"{size} bytes"):
        module.import_data_key(exported(module, os.urandom(size)))


def test_what_was_not_exported_to_this_module_is_refused(module: SoftwareModule) -> None:
    """Another module's, damaged, cut off, not Base64: one error."""
    other = SoftwareModule.generate(module.wrapping_key_spec)
    good = exported(module, os.urandom(32))
    raw = base64.b64decode(good)
    wrong: list[str | bytes] = [exported(other, os.urandom(32)), good[:-4], "", "*", b"", raw[:-1], raw + b"\0"]
    wrong += [bytes([*raw[:i], raw[i] ^ 1, *raw[i + 1 :]]) for i in (0, 1, 40, 70, len(raw) - 1)]
    for blob in wrong:
        with pytest.raises(ModuleError, match="not a data key that was exported"):
            module.import_data_key(blob)
    module.import_data_key(raw)


def test_a_forgotten_key_is_gone_and_so_is_another_modules(module: SoftwareModule) -> None:
    """A handle is of use in its module, until it is forgotten."""
    key = module.import_data_key(exported(module, os.urandom(32)))
    sealed = module.encrypt(key, b"x")
    module.forget(key)
    for use in (lambda: module.encrypt(key, b"x"), lambda: module.decrypt(key, sealed), lambda: module.forget(key)):
        with pytest.raises(ModuleError, match="does not hold that key"):
            use()
    with pytest.raises(ModuleError, match="does not hold that key"):
        module.encrypt(DataKey(), b"x")


def test_a_key_that_is_forgotten_while_another_thread_encrypts_is_used_to_the_end(
    module: SoftwareModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a ciphertext under a key of zeros."""
    data_key = os.urandom(32)
    key = module.import_data_key(exported(module, data_key))

    def forgetful(view: memoryview) -> AESGCM:
        module.forget(key)  # at the worst moment: the key has been lent, and not yet been used
        return AESGCM(view)

    monkeypatch.setattr("keyferry.module.software.AESGCM", forgetful)
    sealed = module.encrypt(key, b"plaintext")
    assert AESGCM(data_key).decrypt(sealed[:12], sealed[12:], b"") == b"plaintext"
    with pytest.raises(ModuleError, match="does not hold"):
        module.encrypt(key, b"x")


def test_a_blob_of_any_length_takes_no_memory_for_good() -> None:
    """What is too long to be a data key is refused before there is room for it."""
    module = SoftwareModule.generate("EC_SM2")
    for size in (300, 5_000, 20_000, 60_000):
        with pytest.raises(ModuleError):
            module.import_data_key(b"\x04" + bytes(size))
    assert len(module._memory) <= 1


def test_a_key_that_nobody_holds_gives_its_memory_back(module: SoftwareModule) -> None:
    """Thousands of keys, one after the other, need the room of one."""
    blob = exported(module, os.urandom(32))
    module.import_data_key(blob)
    chunks = len(module._memory)
    for _ in range(100):
        module.import_data_key(blob)
    assert len(module._memory) == chunks
    held = [module.import_data_key(blob) for _ in range(600)]
    assert len(module._memory) > chunks
    assert module.decrypt(held[0], module.encrypt(held[-1], b"x")) == b"x"


def test_nothing_shows_a_key(module: SoftwareModule) -> None:
    """Not a repr, not a pickle; a handle has no attributes."""
    key = module.import_data_key(exported(module, os.urandom(32)))
    assert repr(key) == "DataKey(...)"
    assert repr(module) == f"SoftwareModule({module.wrapping_key_spec})"
    assert not [name for name in dir(key) if not name.startswith("__")]
    for thing in (module._keys[key], module):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            pickle.dumps(thing)


@pytest.mark.usefixtures("quick_scrypt")
def test_a_module_is_saved_and_loaded_with_its_passphrase(tmp_path: Path, module: SoftwareModule) -> None:
    """Mode 0600; a data key that was exported to it before is imported after; nothing is overwritten."""
    path = tmp_path / "module"
    blob = exported(module, b"k" * 32)
    module.save(path, "correct horse")
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = SoftwareModule.load(path, "correct horse")
    assert loaded.public_key_blob == module.public_key_blob
    assert (loaded.wrapping_key_spec, loaded.wrapping_algorithm) == (
        module.wrapping_key_spec,
        module.wrapping_algorithm,
    )
    sealed = module.encrypt(module.import_data_key(blob), b"x")
    assert loaded.decrypt(loaded.import_data_key(blob), sealed) == b"x"
    with pytest.raises(ModuleError, match="wrong passphrase"):
        SoftwareModule.load(path, "wrong")
    with pytest.raises(FileExistsError):
        module.save(path, "x")
    with pytest.raises(ValueError, match="empty passphrase"):
        module.save(tmp_path / "other", "")
    path.write_bytes(b"nonsense")
    with pytest.raises(ModuleError, match="not a module file"):
        SoftwareModule.load(path, "correct horse")


def test_kinds_that_there_are_not() -> None:
    """By name; a system without SM2 says so."""
    with pytest.raises(ValueError, match="RSA_2048 or EC_SM2"):
        SoftwareModule.generate("RSA_4096")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libcrypto, "has_sm2", lambda: False)
        with pytest.raises(ModuleError, match="without SM2"):
            SoftwareModule.generate("EC_SM2")


def test_a_forked_child_forgets_only_its_own_copy(module: SoftwareModule) -> None:
    """The parent's keys outlive a child that wipes them."""
    key = module.import_data_key(exported(module, os.urandom(32)))
    sealed = module.encrypt(key, b"x")
    child = os.fork()
    if child == 0:
        module.forget(key)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert module.decrypt(key, sealed) == b"x"


def test_the_interface_is_abstract() -> None:
    """A module has to do all of it."""
    with pytest.raises(TypeError, match="abstract"):
        CryptographicModule()  # type: ignore[abstract]
