"""PINs: where they come from, that a wrong one is tried once, and that none is shown."""

import gc
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from pkcs11 import TokenFlag
from support import skip_unless, tokens
from support.secrets import secret_file
from support.tokens import FIND_TOKEN, RealToken

from keyferry.module import ModuleError, Pkcs11Module, cryptoki
from keyferry.module import token as token_module


@pytest.fixture
def spare(softhsm: list[RealToken]) -> RealToken:
    """A token without a logged in session, since each test closes its modules."""
    gc.collect()
    return softhsm[1]


@pytest.fixture
def logins(monkeypatch: pytest.MonkeyPatch) -> list[bytes | None]:
    """The PINs that are sent to a token, as they are sent."""
    sent: list[bytes | None] = []
    login = cryptoki.Library.login

    def recorded(library: cryptoki.Library, session: int, pin: memoryview | None) -> None:
        sent.append(None if pin is None else bytes(pin))
        login(library, session, pin)

    monkeypatch.setattr(cryptoki.Library, "login", recorded)
    return sent


def spare_open(spare: RealToken, **arguments: Any) -> Pkcs11Module:
    return Pkcs11Module.open(spare.library, token_label=spare.label, key_label=tokens.KEY, generate=True, **arguments)


PIN_FILES = {"with a newline": "\n", "without": "", "of Windows": "\r\n", "with more lines": "\nsecond\n" * 100}


@pytest.mark.parametrize("rest", PIN_FILES.values(), ids=PIN_FILES)
def test_a_pin_is_the_first_line_of_a_file(
    spare: RealToken, tmp_path: Path, logins: list[bytes | None], rest: str
) -> None:
    """A PIN may end with LF, CRLF or the end of the file."""
    secret_file(tmp_path / "pin", tokens.PIN + rest)
    spare_open(spare, pin_file=tmp_path / "pin").close()
    assert logins == [tokens.PIN.encode()]


def test_pin_comes_from_a_systemd_credential(spare: RealToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The credential is found by its name, and a missing one is named."""
    secret_file(tmp_path / "hsm", tokens.PIN)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    spare_open(spare, pin_file="credential:hsm").close()
    for wrong in ("credential:", "credential:../hsm"):
        with pytest.raises(ModuleError, match="credential:NAME is expected"):
            spare_open(spare, pin_file=wrong)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(ModuleError, match="LoadCredential=hsm:PATH"):
        spare_open(spare, pin_file="credential:hsm")


def test_pin_is_prompted_once_and_kept_for_resets(spare: RealToken, logins: list[bytes | None]) -> None:
    """The module keeps the PIN in locked memory."""
    asked = []

    def prompt() -> str:
        asked.append(1)
        return tokens.PIN

    module = spare_open(spare, pin=prompt)
    key, _ = tokens.imported(module)
    spare.close_all_sessions()
    module.encrypt(key, b"x")
    assert (len(asked), logins) == (1, [tokens.PIN.encode()] * 2)
    module.close()


NO_PINS = {"empty": b"", "an empty line": b"\n1234", "too long": b"1" * 256, "no file": None}


@pytest.mark.parametrize("content", NO_PINS.values(), ids=NO_PINS)
def test_invalid_pin_is_never_sent_to_the_token(
    spare: RealToken, tmp_path: Path, logins: list[bytes | None], content: bytes | None
) -> None:
    """The token would count it as a wrong PIN."""
    if content is not None:
        secret_file(tmp_path / "pin", content)
    with pytest.raises(
        ModuleError, match=r"is empty; a PIN of 1 to 255 bytes is expected|longer than 255 bytes|No such file"
    ):
        spare_open(spare, pin_file=tmp_path / "pin")
    assert not logins


def test_token_asks_for_one_source_of_the_pin(spare: RealToken) -> None:
    """Neither is guessed."""
    with pytest.raises(ModuleError, match="requires a PIN; pass pin_file, or pin to prompt for it"):
        spare_open(spare)
    with pytest.raises(ValueError, match="not both"):
        spare_open(spare, pin_file=spare.pin_file, pin=lambda: tokens.PIN)
    with pytest.raises(ValueError, match="must not be empty"):
        Pkcs11Module.open(spare.library, token_label="", key_label="x")


WRONG_PIN = "wrong-pin-7"


def wrong_pin() -> str:
    return WRONG_PIN


def test_a_wrong_pin_is_tried_once_and_shown_nowhere(spare: RealToken, logins: list[bytes | None]) -> None:
    """Not in the error, not in the traceback with all of its locals that a person would see."""
    with pytest.raises(ModuleError, match=r"refused the PIN, which was tried once") as caught:
        spare_open(spare, pin=wrong_pin)
    assert logins == [WRONG_PIN.encode()]
    del logins  # which this frame would show
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "_login" in shown
    assert WRONG_PIN not in shown


def test_pin_refused_after_a_reset_is_not_retried(spare: RealToken, logins: list[bytes | None]) -> None:
    """The PIN was changed, so later calls fail without a login, and the error has the remedy."""
    module = spare_open(spare, pin_file=spare.pin_file)
    key, _ = tokens.imported(module)
    change = ["--change-pin", "--new-pin", "changed-pin"]
    spare.tool(*change)
    spare.finalize()
    try:
        for _ in range(5):
            with pytest.raises(ModuleError, match="refused the PIN"):
                module.encrypt(key, b"x")
        assert len(logins) == 2
    finally:
        back = ["pkcs11-tool", "--module", str(spare.library), "--token-label", spare.label, "--login"]
        subprocess.run([*back, "--pin", "changed-pin", "--change-pin", "--new-pin", tokens.PIN], check=True)
        spare.finalize()


def test_wrong_pin_is_noticed_in_a_logged_in_process(spare: RealToken, logins: list[bytes | None]) -> None:
    """The token itself would not report the PIN before its next reset."""
    first = spare_open(spare, pin_file=spare.pin_file)
    spare_open(spare, pin_file=spare.pin_file).close()
    with pytest.raises(ModuleError, match="with another PIN"):
        spare_open(spare, pin=wrong_pin)
    assert len(logins) == 1
    key, _ = tokens.imported(first)
    first.encrypt(key, b"x")
    first.close()


LOCKED = {
    TokenFlag.USER_PIN_LOCKED: "its security officer can unlock it",
    TokenFlag.USER_PIN_FINAL_TRY: "one more wrong PIN locks the token",
}


@pytest.mark.parametrize("flag", LOCKED, ids=lambda flag: flag.name)
def test_pin_is_not_sent_to_a_nearly_locked_token(
    spare: RealToken, logins: list[bytes | None], monkeypatch: pytest.MonkeyPatch, flag: TokenFlag
) -> None:
    """A service that restarts repeatedly with a wrong PIN must not lock the token."""

    class Flagged(tokens.ReadWrite):
        @property
        def flags(self) -> TokenFlag:
            return TokenFlag(self._token.flags | flag)

    monkeypatch.setattr(token_module, "_find_token", lambda *wanted: Flagged(FIND_TOKEN(*wanted)))
    with pytest.raises(ModuleError, match=LOCKED[flag]):
        spare_open(spare, pin_file=spare.pin_file)
    assert not logins


def test_token_with_a_pin_pad_is_logged_in_by_the_pad(
    spare: RealToken, logins: list[bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No PIN passes through this process. SoftHSM2 has no pad, and refuses."""

    class Flagged(tokens.ReadWrite):
        @property
        def flags(self) -> TokenFlag:
            return TokenFlag(self._token.flags | TokenFlag.PROTECTED_AUTHENTICATION_PATH)

    monkeypatch.setattr(token_module, "_find_token", lambda *wanted: Flagged(FIND_TOKEN(*wanted)))
    with pytest.raises(ModuleError, match="does not open: CKR_ARGUMENTS_BAD"):
        spare_open(spare)
    assert logins == [None]


@skip_unless.program(*tokens.PROGRAMS["softokn"])
def test_token_without_a_pin_opens_without_one(tmp_path: Path) -> None:
    """An NSS database without a password is opened in a process of its own."""
    library = skip_unless.library("*/libsoftokn3.so", "libnss3")
    command = ["certutil", "-N", "-d", f"sql:{tmp_path}", "--empty-password"]
    subprocess.run(command, check=True, capture_output=True)
    parameters = f"configdir='sql:{tmp_path}' certPrefix='' keyPrefix='' secmod='secmod.db' flags="
    code = f"""
from keyferry.module import Pkcs11Module
print(Pkcs11Module.open({str(library)!r}, token_label="NSS Certificate DB", key_label="wrapping", generate=True,
    library_parameters={parameters!r}).wrapping_algorithm)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "RSAES_OAEP_SHA_256\n"
