"""Modules in real tokens over time: unreferenced keys, reset tokens, forked processes, threads."""

import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from support import tokens
from support.tokens import RealToken

from keyferry.module import ModuleError, Pkcs11Module
from keyferry.module.token import Pkcs11Session


def test_unreferenced_keys_leave_the_token_at_the_next_call(module: Pkcs11Module) -> None:
    """Thousands of keys in sequence need the space of one; a closed module leaves none."""
    kept, _ = tokens.imported(module)
    before = len(tokens.data_keys(module))
    for _ in range(20):
        tokens.imported(module)
    gc.collect()
    module.encrypt(kept, b"x")
    assert len(tokens.data_keys(module)) == before


def test_unreferenced_module_closes_its_session(token: RealToken) -> None:
    """The token drops the module's data keys."""
    beside, module = token.open(), token.open()
    before = len(tokens.data_keys(beside))
    key, _ = tokens.imported(module)
    assert len(tokens.data_keys(beside)) == before + 1
    del module
    gc.collect()
    assert len(tokens.data_keys(beside)) == before
    del key
    beside.close()


def test_second_loss_of_the_token_is_not_blamed_on_the_data(
    softhsm_token: RealToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the token, because the data key is still good."""
    module = softhsm_token.open()
    blob = tokens.exported(module, os.urandom(32))
    unwrap = Pkcs11Session.unwrap

    def lost(connection: Pkcs11Session, wrapped: bytes, algorithm: str) -> Any:
        softhsm_token.close_all_sessions()
        return unwrap(connection, wrapped, algorithm)

    with monkeypatch.context() as pulled:
        pulled.setattr(Pkcs11Session, "unwrap", lost)
        with pytest.raises(ModuleError, match="the token 'app' was lost twice: CKR_SESSION_HANDLE_INVALID"):
            module.import_data_key(blob)
    module.import_data_key(blob)
    module.close()


def test_closed_module_refuses_every_call(token: RealToken) -> None:
    """The error says that the module is closed."""
    module = token.open()
    key, _ = tokens.imported(module)
    module.close()
    module.close()
    for use in (lambda: module.import_data_key(bytes(256)), lambda: module.encrypt(key, b"x")):
        with pytest.raises(ModuleError, match=r"closed|does not hold"):
            use()


# Resets, forks, threads


@pytest.mark.parametrize("reset", tokens.RESETS.values(), ids=tokens.RESETS)
def test_a_data_key_survives_a_reset_of_the_token(token: RealToken, reset: Callable[[RealToken], None]) -> None:
    """The module unwraps it again; imports and forgetting work as before."""
    module = token.open()
    first, second = tokens.imported(module)[0], tokens.imported(module)[0]
    sealed = module.encrypt(first, b"plaintext", b"aad")
    reset(token)
    assert module.decrypt(first, sealed, b"aad") == b"plaintext"
    reset(token)
    third, data_key = tokens.imported(module)
    made = module.encrypt(third, b"x")
    assert AESGCM(data_key).decrypt(made[:12], made[12:], None) == b"x"
    reset(token)
    module.forget(second)
    with pytest.raises(ModuleError, match="does not hold"):
        module.encrypt(second, b"x")
    assert module.decrypt(first, sealed, b"aad") == b"plaintext"
    module.close()


def test_destroyed_data_key_is_imported_again(module: Pkcs11Module) -> None:
    """The session is valid, but the object is missing."""
    key, _ = tokens.imported(module)
    sealed = module.encrypt(key, b"plaintext")
    module._keys[key].key.destroy()
    assert module.decrypt(key, sealed) == b"plaintext"


def test_absent_token_is_named_and_works_after_its_return(
    softhsm_token: RealToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No data key is lost meanwhile."""
    module = softhsm_token.open()
    key, _ = tokens.imported(module)
    sealed = module.encrypt(key, b"plaintext")
    (tmp_path / "conf").write_text(f"directories.tokendir = {tmp_path}\n")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("SOFTHSM2_CONF", str(tmp_path / "conf"))
        softhsm_token.finalize()
        for _ in range(2):
            with pytest.raises(ModuleError, match="has no token 'app'"):
                module.decrypt(key, sealed)
    softhsm_token.finalize()
    assert module.decrypt(key, sealed) == b"plaintext"
    module.close()


def test_forked_child_opens_its_own_session(token: RealToken) -> None:
    """The child has the parent's data keys, and the parent keeps those that the child forgets."""
    module = token.open()
    key, _ = tokens.imported(module)
    sealed = module.encrypt(key, b"plaintext")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            good = module.decrypt(key, sealed) == b"plaintext"
            fresh, data_key = tokens.imported(module)
            made = module.encrypt(fresh, b"y")
            good = good and AESGCM(data_key).decrypt(made[:12], made[12:], None) == b"y"
            module.forget(key)
            module.close()
            code = 0 if good else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert module.decrypt(key, sealed) == b"plaintext"
    tokens.imported(module)
    module.close()


def test_a_fork_waits_for_the_calls_of_other_threads(softhsm_token: RealToken, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that does not notice a fork would block forever in the child."""
    module = softhsm_token.open()
    key, _ = tokens.imported(module)
    began, under_way = threading.Event(), [False]
    encrypt = Pkcs11Session.encrypt

    def watched(*arguments: Any) -> bytes:
        under_way[0] = True
        began.set()
        made = encrypt(*arguments)
        under_way[0] = False
        return made

    with monkeypatch.context() as slowly, ThreadPoolExecutor(1) as pool:
        slowly.setattr(Pkcs11Session, "encrypt", watched)
        call = pool.submit(module.encrypt, key, bytes(16 * 1024 * 1024))
        began.wait()
        child = os.fork()
        if child == 0:
            os._exit(1 if under_way[0] else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        call.result()
    module.close()


def test_threads_share_a_token_safely(token: RealToken) -> None:
    """Eight threads use two modules in one token."""
    modules = [token.open(), token.open()]
    start = threading.Barrier(8)

    def work(number: int) -> None:
        module = modules[number % 2]
        start.wait()
        for _ in range(5):
            key, data_key = tokens.imported(module)
            sealed = module.encrypt(key, b"plaintext", data_key[:3])
            assert AESGCM(data_key).decrypt(sealed[:12], sealed[12:], data_key[:3]) == b"plaintext"
            assert module.decrypt(key, sealed, data_key[:3]) == b"plaintext"
            module.forget(key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    for module in modules:
        module.close()


def test_handle_of_another_key_after_a_reset_is_not_used(softhsm_token: RealToken) -> None:
    """SoftHSM2 restarts its numbers at 1, so the first module back gets those of the second."""
    softhsm_token.open().close()
    softhsm_token.finalize()  # else the count has passed, in other tests, all numbers that this test reaches
    second = softhsm_token.open()
    key, data_key = tokens.imported(second)
    numbers = tokens.session_number(second), second._keys[key].key.handle
    first = softhsm_token.open()
    softhsm_token.finalize()
    others = [tokens.imported(first)[0] for _ in range(60)]
    assert numbers[0] == tokens.session_number(first)
    assert numbers[1] in {first._keys[other].key.handle for other in others}
    sealed = second.encrypt(key, b"plaintext")
    assert AESGCM(data_key).decrypt(sealed[:12], sealed[12:], None) == b"plaintext"
    assert first.decrypt(others[0], first.encrypt(others[0], b"x")) == b"x"
    for module in (first, second):
        module.close()
