"""Messages when a library or a token does not open: the reason, by Cryptoki's own name, and the remedy."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pkcs11
import pytest
from support import skip_unless, tokens

from keyferry.module import ModuleError, Pkcs11Module, return_values
from keyferry.module.token import describe

gcc = skip_unless.program("gcc", "gcc")
PIN = "98765-Zyx"
LOGIN = 0x400 | 0x4
"""CKF_TOKEN_INITIALIZED, CKF_LOGIN_REQUIRED."""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library whose answers the environment sets."""
    return tokens.odd_library(tmp_path_factory.mktemp("odd"))


def refusal(library: str | Path, label: str = "app") -> str:
    """Why a token does not open."""
    with pytest.raises(ModuleError) as caught:
        Pkcs11Module.open(library, token_label=label, key_label="key", pin=lambda: PIN)
    assert PIN not in str(caught.value)
    return str(caught.value)


# Return values


def test_every_pkcs11_error_has_its_return_values_name() -> None:
    """Errors that stand for no return value are exempt."""
    without = {"PKCS11Error", "MultipleObjectsReturned", "MultipleTokensReturned", "NoSuchKey", "NoSuchToken"}
    for name, kind in vars(pkcs11.exceptions).items():
        if isinstance(kind, type) and issubclass(kind, pkcs11.PKCS11Error) and name not in without:
            assert describe(kind()) in return_values.NAMES.values(), name


TEXTS = {
    "Unmapped error code 0x68": "CKR_KEY_FUNCTION_NOT_PERMITTED",
    "Unmapped error code 0x80000123": "CKR_VENDOR_DEFINED+0x123 (the manual of the token's vendor explains it)",
    "Unmapped error code 0x777": "an unknown return value, CKR 0x777",
    "Initialisation error (not initialized). Should never see this.": "CKR_CRYPTOKI_NOT_INITIALIZED",
    "User type invalid. Should never see this.": "CKR_USER_TYPE_INVALID",
    "something of its own": "PKCS11Error something of its own",
}


@pytest.mark.parametrize("text", TEXTS)
def test_an_error_without_a_class_is_described_by_its_text(text: str) -> None:
    """python-pkcs11 has the number, or a text of its own, for such errors."""
    assert describe(pkcs11.PKCS11Error(text)) == TEXTS[text]


LOGINS = {
    0xA0: r"refused the PIN, which was tried once.*correct pin_file.*CKR_PIN_INCORRECT",
    0xA1: r"refused the PIN.*CKR_PIN_INVALID",
    0xA2: r"refused the PIN.*CKR_PIN_LEN_RANGE",
    0xA3: r"has expired; change it.*CKR_PIN_EXPIRED",
    0xA4: r"has locked its user PIN.*its security officer can unlock it.*CKR_PIN_LOCKED",
    0x102: r"has no user PIN yet; its security officer can set one.*CKR_USER_PIN_NOT_INITIALIZED",
    0x104: r"security officer logged in.*CKR_USER_ANOTHER_ALREADY_LOGGED_IN",
    0x30: "does not open: CKR_DEVICE_ERROR",
    0x103: "does not open: CKR_USER_TYPE_INVALID",
    0x1B0: "does not open: CKR_NEW_PIN_MODE",
    0x80000005: "does not open: CKR_VENDOR_DEFINED.0x5",
}


@gcc
@pytest.mark.parametrize("returned", LOGINS, ids=hex)
def test_a_login_that_fails_is_explained(odd: Path, monkeypatch: pytest.MonkeyPatch, returned: int) -> None:
    """The message does not have the PIN."""
    monkeypatch.setenv("ODD_TOKENS", f"1|0|{LOGIN}|1|app")
    monkeypatch.setenv("ODD_LOGIN", str(returned))
    assert re.search(
        f"the token 'app' {LOGINS[returned]}" if "open" in LOGINS[returned] else LOGINS[returned], refusal(odd)
    )


@gcc
@pytest.mark.parametrize("returned", [0x5, 0x7, 0x9, 0xA, 0x30, 0x1B6, 0x80000001], ids=hex)
def test_an_initialisation_that_fails_is_explained(odd: Path, monkeypatch: pytest.MonkeyPatch, returned: int) -> None:
    """The message has the function, the error's name, and the place to check."""
    monkeypatch.setenv("ODD_INITIALIZE", str(returned))
    message = refusal(odd)
    assert f"C_Initialize of {odd} returned {return_values.name(returned)}: " in message
    assert ("library_parameters" if returned == 0x7 else "check the library's own configuration") in message


@gcc
def test_a_library_that_returns_no_functions_is_refused(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal comes before any call of the library."""
    monkeypatch.setenv("ODD_FUNCTION_LIST", "5")
    assert "does not load: " in (message := refusal(odd))
    assert "C_GetFunctionList returned CKR_GENERAL_ERROR" in message


SOFTHSM = {
    "not set": (None, "SOFTHSM2_CONF (not set)"),
    "not there": ("/nowhere/softhsm2.conf", "SOFTHSM2_CONF ('/nowhere/softhsm2.conf', not a file)"),
    "without its folder": ("{folder}/without", "/without', a file)"),
}


@pytest.mark.parametrize("case", SOFTHSM)
def test_softhsm_without_its_configuration_is_explained(tmp_path: Path, case: str) -> None:
    """The library reads its configuration once, so the test uses a process of its own."""
    library = skip_unless.library("softhsm/libsofthsm2.so", "softhsm2")
    value, text = SOFTHSM[case]
    for path in (tmp_path / "without", tmp_path / ".config" / "softhsm2" / "softhsm2.conf"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"directories.tokendir = {tmp_path}/missing\n")
    environment = {name: text for name, text in os.environ.items() if name != "SOFTHSM2_CONF"} | {"HOME": str(tmp_path)}
    if value is not None:
        environment["SOFTHSM2_CONF"] = value.format(folder=tmp_path)
    code = f"""
from keyferry.module import ModuleError, Pkcs11Module
try:
    Pkcs11Module.open({str(library)!r}, token_label="app", key_label="key")
except ModuleError as error:
    print(error)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert "CKR_GENERAL_ERROR: check SOFTHSM2_CONF" in out
    assert text in out


# Files that are not libraries


def elf(machine: int, *, bits: int = 2, order: int = 1) -> bytes:
    """The header of a shared library."""
    names = {1: "little", 2: "big"}
    numbers = b"".join(number.to_bytes(2, "little" if names[order] == "little" else "big") for number in (3, machine))
    return b"\x7fELF" + bytes([bits, order, 1]) + bytes(9) + numbers + bytes(100)


FILES = {
    "text": (b"text", "not a shared library"),
    "empty": (b"", "not a shared library"),
    "linker script": (b"/* GNU ld script */ INPUT ( libx.so )", "not a shared library"),
    "another processor": (elf(183), r"built for AArch64 \(64 bits, little-endian\), and this Python for"),
    "32 bits": (elf(3, bits=1), r"built for x86 \(32 bits, little-endian\), and this Python for"),
    "big-endian": (elf(22, order=2), r"built for S/390 \(64 bits, big-endian\)"),
    "unknown processor": (elf(9_999), "built for processor 9999"),
    "cut off": (Path(sys.executable).resolve().read_bytes()[:64], "does not load: "),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_not_a_library_is_explained(tmp_path: Path, case: str) -> None:
    """The dynamic linker reports "No such file or directory" for some of these files."""
    content, reason = FILES[case]
    (tmp_path / "lib.so").write_bytes(content)
    message = refusal(tmp_path / "lib.so")
    assert message.startswith("the PKCS#11 library does not load: ")
    assert re.search(reason, message)


PATHS = {
    "": "not a file name",
    "/nowhere/lib.so": "/nowhere/lib.so: not found; install",
    "libnowhere.so": "libnowhere.so: not found where the system keeps its libraries; give the whole path",
    "/tmp": "/tmp: a folder",
    "/dev/null": "/dev/null: not a regular file",
    "/tmp/\0": "not a file name",
    "libc.so.6": "not a PKCS#11 library: it has no C_GetFunctionList",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_leads_to_no_library_is_explained(path: str) -> None:
    """The path leads to something else, or to nothing."""
    assert PATHS[path] in refusal(path)


@gcc
def test_a_library_whose_own_library_is_missing_names_that(odd: Path, tmp_path: Path) -> None:
    """The message names the missing library, as the dynamic linker does."""
    helper, library = tmp_path / "libhelper.so", tmp_path / "libneeds.so"
    empty, calls = "void helper(void) {}", "void helper(void); void needs(void) { helper(); }"
    for source, arguments in ((empty, [helper]), (calls, [library, f"-L{tmp_path}", "-lhelper"])):
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", *map(str, arguments)]
        subprocess.run(command, input=source, text=True, check=True)
    helper.unlink()
    assert "libhelper.so: cannot open shared object file" in refusal(library)
