"""Real PKCS#11 tokens, made with their own programs, and events that they meet in a process."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pkcs11 import Attribute, ObjectClass

from keyferry.module import DataKey, Pkcs11Module
from keyferry.module import token as token_module
from keyferry.module.cryptoki import Library
from support import skip_unless
from support.keys import RecipientFor
from support.secrets import secret_file

PIN = "1234-Abcd"
SO_PIN = "5678-Efgh"
KEY = "wrapping"
PROGRAMS = {"softhsm": ("softhsm2-util", "softhsm2"), "softokn": ("certutil", "libnss3-tools")}
"""The program that makes each kind of token, and its Debian package."""
FIND_TOKEN = token_module._find_token
"""The product's way to a token, for tests that put something in front of it."""

_FINALIZE, _CLOSE_ALL_SESSIONS, _LOGOUT = 2, 15, 20
"""Places in CK_FUNCTION_LIST."""
_NOT_LOGGED_IN = 0x101
_NOT_INITIALIZED = 0x190
"""NSS's error at the second logout, because it continues with a key that needs no login."""


class RealToken(NamedTuple):
    """A token, and how to open it."""

    library: Path
    label: str
    pin_file: Path
    parameters: str | None = None

    def open(self, key_label: str = KEY, *, generate: bool = True) -> Pkcs11Module:
        """Open a key pair in it, which is made if it is not there."""
        return Pkcs11Module.open(
            self.library,
            token_label=self.label,
            key_label=key_label,
            pin_file=self.pin_file,
            generate=generate,
            library_parameters=self.parameters,
        )

    def tool(self, *arguments: str) -> str:
        """Return the output of OpenSC's pkcs11-tool, in a process of its own."""
        login = ["--module", str(self.library), "--token-label", self.label, "--login", "--pin", PIN]
        return subprocess.run(["pkcs11-tool", *login, *arguments], check=True, capture_output=True, text=True).stdout

    def logout(self) -> None:
        """Log out of the token, as other code in this process might."""
        library = Library(self.library, self.parameters).pkcs11
        (slot,) = [slot for slot in library.get_slots(token_present=True) if slot.get_token().label == self.label]
        session: Any = slot.get_token().open()
        _call(self.library, _LOGOUT, session.handle)
        session.close()

    def close_all_sessions(self) -> None:
        """All sessions of this process are closed, as when a card is pulled out and put back."""
        library = Library(self.library, self.parameters).pkcs11
        for slot in library.get_slots(token_present=True):
            _call(self.library, _CLOSE_ALL_SESSIONS, slot.slot_id)

    def finalize(self) -> None:
        """Finalise the library, as other code in this process might."""
        _call(self.library, _FINALIZE, None)


def _call(path: Path, place: int, argument: int | None) -> None:
    """A function of the library that the product never calls."""
    functions = ctypes.POINTER(ctypes.c_void_p)()
    assert ctypes.CDLL(str(path)).C_GetFunctionList(ctypes.byref(functions)) == 0
    kind = ctypes.c_void_p if argument is None else ctypes.c_ulong
    function = ctypes.CFUNCTYPE(ctypes.c_ulong, kind)(functions[place])
    assert function(argument) in (0, _NOT_LOGGED_IN, _NOT_INITIALIZED)


RESETS: dict[str, Callable[[RealToken], None]] = {
    "all sessions closed": RealToken.close_all_sessions,
    "logged out": RealToken.logout,
    "library finalised": RealToken.finalize,
}


class ReadWrite:
    """A token whose sessions are all read-write, which token objects need."""

    def __init__(self, token: Any) -> None:
        self._token = token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._token, name)

    def open(self, **_: bool) -> Any:
        """A session."""
        return self._token.open(rw=True)


def exported(module: Pkcs11Module, data_key: bytes) -> str:
    """A data key, exported to a module the way an agent does it."""
    return RecipientFor(module).wrap(data_key)


def imported(module: Pkcs11Module) -> tuple[DataKey, bytes]:
    """A data key in the module, and its bytes."""
    data_key = os.urandom(32)
    return module.import_data_key(exported(module, data_key)), data_key


def session_number(module: Pkcs11Module) -> int:
    """Return the handle of a module's session."""
    assert module._session is not None
    handle: int = module._session._raw_session.handle
    return handle


def data_keys(module: Pkcs11Module) -> list[object]:
    """The data keys of all sessions that the token holds for this process."""
    assert module._session is not None
    return list(module._session._raw_session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY}))


def softhsm(folder: Path, *labels: str) -> list[RealToken]:
    """SoftHSM2 tokens. The library reads their folder from SOFTHSM2_CONF, in this process and in its children."""
    library = skip_unless.library("softhsm/libsofthsm2.so", "softhsm2")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder}/tokens\n")
    secret_file(folder / "pin", f"{PIN}\n")
    os.environ["SOFTHSM2_CONF"] = str(folder / "softhsm2.conf")
    for label in labels:
        command = ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", SO_PIN]
        subprocess.run(command, check=True, capture_output=True)
    return [RealToken(library, label, folder / "pin") for label in labels]


def odd_library(folder: Path) -> Path:
    """Return a PKCS#11 library whose answers the environment sets: odd_token.c explains it."""
    path, source = folder / "libodd.so", Path(__file__).with_name("odd_token.c")
    command = ["gcc", "-D_GNU_SOURCE", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(path), str(source)]
    subprocess.run(command, check=True)
    return path


def softokn(folder: Path) -> RealToken:
    """The token of an NSS database."""
    library = skip_unless.library("*/libsoftokn3.so", "libnss3")
    secret_file(folder / "pin", f"{PIN}\n")
    command = ["certutil", "-N", "-d", f"sql:{folder}", "-f", str(folder / "pin")]
    subprocess.run(command, check=True, capture_output=True)
    parameters = f"configdir='sql:{folder}' certPrefix='' keyPrefix='' secmod='secmod.db' flags="
    return RealToken(library, "NSS Certificate DB", folder / "pin", parameters)
