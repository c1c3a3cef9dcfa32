"""The software module: imports, refusals, and that no key can be read from it."""

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


def test_module_does_the_main_job(agent: RunningAgent, module: SoftwareModule) -> None:
    """A module imports, uses, forgets and recovers a data key; the record is JSON, and recovers in a reloaded module too."""
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
    """The format is nonce (12) ‖ ciphertext ‖ tag (16), so any holder of the data key opens it."""
    for size in (16, 24, 32):
        data_key = os.urandom(size)
        key = module.import_data_key(exported(module, data_key))
        sealed = [module.encrypt(key, b"plaintext", b"aad") for _ in range(2)]
        assert sealed[0][:12] != sealed[1][:12]
        assert AESGCM(data_key).decrypt(sealed[0][:12], sealed[0][12:], b"aad") == b"plaintext"
        nonce = os.urandom(12)
        assert module.decrypt(key, nonce + AESGCM(data_key).encrypt(nonce, b"x", b"aad"), b"aad") == b"x"


def test_changed_ciphertext_does_not_decrypt(module: SoftwareModule) -> None:
    """Every cause has the same error."""
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
def test_data_key_of_an_invalid_size_is_refused(module: SoftwareModule, size: int) -> None:
    """The error has the size of the data key."""
    with pytest.raises(ModuleError, match=f"{size} bytes"):
        module.import_data_key(exported(module, os.urandom(size)))


def test_invalid_and_foreign_exports_are_refused(module: SoftwareModule) -> None:
    """Exports to another module, damaged, truncated and not in Base64 have one error."""
    other = SoftwareModule.generate(module.wrapping_key_spec)
    good = exported(module, os.urandom(32))
    raw = base64.b64decode(good)
    wrong: list[str | bytes] = [exported(other, os.urandom(32)), good[:-4], "", "*", b"", raw[:-1], raw + b"\0"]
    wrong += [bytes([*raw[:i], raw[i] ^ 1, *raw[i + 1 :]]) for i in (0, 1, 40, 70, len(raw) - 1)]
    for blob in wrong:
        with pytest.raises(ModuleError, match="not a data key that was exported"):
            module.import_data_key(blob)
    module.import_data_key(raw)


def test_handle_is_valid_in_its_module_until_forgotten(module: SoftwareModule) -> None:
    """A handle of another module is refused as a forgotten one is."""
    key = module.import_data_key(exported(module, os.urandom(32)))
    sealed = module.encrypt(key, b"x")
    module.forget(key)
    for use in (lambda: module.encrypt(key, b"x"), lambda: module.decrypt(key, sealed), lambda: module.forget(key)):
        with pytest.raises(ModuleError, match="does not hold that key"):
            use()
    with pytest.raises(ModuleError, match="does not hold that key"):
        module.encrypt(DataKey(), b"x")


def test_key_forgotten_during_encryption_is_used_to_the_end(
    module: SoftwareModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No ciphertext is ever made under a key of zeros."""
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


def test_long_export_is_refused_before_allocation() -> None:
    """A blob that is too long for a data key leaves no secret memory in use."""
    module = SoftwareModule.generate("EC_SM2")
    for size in (300, 5_000, 20_000, 60_000):
        with pytest.raises(ModuleError):
            module.import_data_key(b"\x04" + bytes(size))
    assert len(module._memory) <= 1


def test_unreferenced_keys_release_their_memory(module: SoftwareModule) -> None:
    """Thousands of keys in sequence need the memory of one."""
    blob = exported(module, os.urandom(32))
    module.import_data_key(blob)
    chunks = len(module._memory)
    for _ in range(100):
        module.import_data_key(blob)
    assert len(module._memory) == chunks
    held = [module.import_data_key(blob) for _ in range(600)]
    assert len(module._memory) > chunks
    assert module.decrypt(held[0], module.encrypt(held[-1], b"x")) == b"x"


def test_key_appears_in_no_repr_or_pickle(module: SoftwareModule) -> None:
    """Modules and handles refuse to be pickled, and handles have no attributes."""
    key = module.import_data_key(exported(module, os.urandom(32)))
    assert repr(key) == "DataKey(...)"
    assert repr(module) == f"SoftwareModule({module.wrapping_key_spec})"
    assert not [name for name in dir(key) if not name.startswith("__")]
    for thing in (module._keys[key], module):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            pickle.dumps(thing)


@pytest.mark.usefixtures("quick_scrypt")
def test_a_module_is_saved_and_loaded_with_its_passphrase(tmp_path: Path, module: SoftwareModule) -> None:
    """The file has mode 0600 and is never overwritten; a loaded module imports earlier exports."""
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


def test_unsupported_kinds_are_named() -> None:
    """The message has the supported key specs, or that the system is without SM2."""
    with pytest.raises(ValueError, match="RSA_2048 or EC_SM2"):
        SoftwareModule.generate("RSA_4096")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libcrypto, "has_sm2", lambda: False)
        with pytest.raises(ModuleError, match="without SM2"):
            SoftwareModule.generate("EC_SM2")


def test_a_forked_child_forgets_only_its_own_copy(module: SoftwareModule) -> None:
    """The parent's keys outlive a child that wipes its own."""
    key = module.import_data_key(exported(module, os.urandom(32)))
    sealed = module.encrypt(key, b"x")
    child = os.fork()
    if child == 0:
        module.forget(key)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert module.decrypt(key, sealed) == b"x"


def test_the_interface_is_abstract() -> None:
    """A module has to implement every method of the interface."""
    with pytest.raises(TypeError, match="abstract"):
        CryptographicModule()  # type: ignore[abstract]
