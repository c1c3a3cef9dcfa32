"""Functions of PKCS#11 (Cryptoki, OASIS PKCS #11 2.40) that python-pkcs11 lacks, called by ctypes on the same library.

* C_Initialize with the system's locks, because threads share the library, and with the parameters that NSS requires. It accepts
  a library that is initialised already. python-pkcs11 passes NULL, and fails on an initialised library.
* C_Login without C_OpenSession, with a PIN in memory that can be wiped.
* AES-GCM with a buffer that includes the tag. python-pkcs11 first requests the size from the token, and NSS omits the tag from
  its answer.

Errors are python-pkcs11's, for calls of both kinds.
"""

import ctypes
import os
from ctypes import POINTER, Structure, c_char, c_char_p, c_ubyte, c_ulong, c_void_p
from typing import Any, Final

import pkcs11
from pkcs11 import _pkcs11

from . import library_file, return_values

__all__ = ["Library"]

_OS_LOCKING_OK: Final = 2
_USER: Final = 1
_AES_GCM: Final = 0x1087
_TAG: Final = 16

_OK: Final = 0x000
_ARGUMENTS_BAD: Final = 0x007
_ALREADY_LOGGED_IN: Final = 0x100
_ALREADY_INITIALIZED: Final = 0x191
_ERRORS: Final[dict[int, type[pkcs11.PKCS11Error]]] = {
    _ARGUMENTS_BAD: pkcs11.ArgumentsBad,
    0x021: pkcs11.DataLenRange,
    0x030: pkcs11.DeviceError,
    0x031: pkcs11.DeviceMemory,
    0x032: pkcs11.DeviceRemoved,
    0x002: pkcs11.HostMemory,
    0x040: pkcs11.EncryptedDataInvalid,
    0x041: pkcs11.EncryptedDataLenRange,
    0x060: pkcs11.KeyHandleInvalid,
    0x062: pkcs11.KeySizeRange,
    0x063: pkcs11.KeyTypeInconsistent,
    0x070: pkcs11.MechanismInvalid,
    0x071: pkcs11.MechanismParamInvalid,
    0x082: pkcs11.ObjectHandleInvalid,
    0x090: pkcs11.OperationActive,
    0x0A0: pkcs11.PinIncorrect,
    0x0A1: pkcs11.PinInvalid,
    0x0A2: pkcs11.PinLenRange,
    0x0A3: pkcs11.PinExpired,
    0x0A4: pkcs11.PinLocked,
    0x0B0: pkcs11.SessionClosed,
    0x0B3: pkcs11.SessionHandleInvalid,
    0x0E0: pkcs11.TokenNotPresent,
    0x101: pkcs11.UserNotLoggedIn,
    0x102: pkcs11.UserPinNotInitialized,
    0x104: pkcs11.AnotherUserAlreadyLoggedIn,
}
"""Error classes for the return values of these functions that callers distinguish."""


class _Arguments(Structure):
    """CK_C_INITIALIZE_ARGS, with NSS's `LibraryParameters` before the reserved member: NULL for all other libraries."""

    _fields_ = (
        ("mutexes", c_void_p * 4),
        ("flags", c_ulong),
        ("library_parameters", c_char_p),
        ("reserved", c_void_p),
    )


class _GcmParams(Structure):
    """CK_GCM_PARAMS of version 2.40 and later, with ulIvBits, which NSS reads."""

    _fields_ = (
        ("iv", c_char_p),
        ("iv_len", c_ulong),
        ("iv_bits", c_ulong),
        ("aad", c_char_p),
        ("aad_len", c_ulong),
        ("tag_bits", c_ulong),
    )


class _Mechanism(Structure):
    _fields_ = (("mechanism", c_ulong), ("parameter", c_void_p), ("parameter_len", c_ulong))


class _SessionInfo(Structure):
    _fields_ = (("slot_id", c_ulong), ("state", c_ulong), ("flags", c_ulong), ("device_error", c_ulong))


# The index in CK_FUNCTION_LIST, where CK_VERSION takes the space of the first pointer, and the types of all arguments.
_FUNCTIONS: Final[dict[str, tuple[int, list[Any]]]] = {
    "C_Initialize": (1, [POINTER(_Arguments)]),
    "C_GetSessionInfo": (16, [c_ulong, POINTER(_SessionInfo)]),
    "C_Login": (19, [c_ulong, c_ulong, c_void_p, c_ulong]),
    "C_EncryptInit": (30, [c_ulong, POINTER(_Mechanism), c_ulong]),
    "C_Encrypt": (31, [c_ulong, c_char_p, c_ulong, c_void_p, POINTER(c_ulong)]),
    "C_DecryptInit": (34, [c_ulong, POINTER(_Mechanism), c_ulong]),
    "C_Decrypt": (35, [c_ulong, c_char_p, c_ulong, c_void_p, POINTER(c_ulong)]),
}


class Library:
    """A PKCS#11 library in this process. `pkcs11` is python-pkcs11's object of it.

    The constructor raises OSError for a file that is not a usable PKCS#11 library.
    """

    def __init__(self, path: str | os.PathLike[str], parameters: str | None) -> None:
        self.path = os.fspath(path)
        self._arguments = _Arguments(flags=_OS_LOCKING_OK, library_parameters=parameters and parameters.encode())
        functions = _function_list(self.path)
        self.address = ctypes.addressof(functions.contents)
        if self.address != ctypes.addressof(_function_list(self.path).contents):
            # python-pkcs11 and this file would then not see each other's sessions.
            raise OSError(
                f"{self.path}: p11-kit, which returns other functions to each caller; name the token's own library"
            )
        self._functions = {
            name: ctypes.CFUNCTYPE(c_ulong, *arguments)(functions[index])
            for name, (index, arguments) in _FUNCTIONS.items()
        }
        # Made without its __init__, which would call C_Initialize. __new__ loads the library, and the object finalises the
        # library only if it has initialised it.
        self.pkcs11: _pkcs11.lib = _pkcs11.lib.__new__(_pkcs11.lib, self.path)  # type: ignore[call-arg]

    def initialize(self) -> bool:
        """Call C_Initialize: at first, in a child after fork, and whenever other code may have finalised the library.

        Return True if the library was initialised now: then all sessions of this process are gone. Raises python-pkcs11's
        errors.
        """
        # A library that has not noticed a fork also returns "already initialised". It is not finalised then: the child would
        # use the parent's connection to a device.
        code = self._functions["C_Initialize"](ctypes.byref(self._arguments))
        if code not in (_OK, _ALREADY_INITIALIZED):
            name = return_values.name(code)
            raise _class_of(code)(f"C_Initialize of {self.path} returned {name}: {self._advice(code)}")
        return bool(code == _OK)

    def _advice(self, code: int) -> str:
        """Return advice for the operator after C_Initialize failed. Libraries fail there if their configuration is missing."""
        if code == _ARGUMENTS_BAD:
            return "library_parameters are wrong or missing"
        name = os.path.basename(self.path).lower()
        if "softhsm" in name:
            path = os.environ.get("SOFTHSM2_CONF")
            state = "not set" if path is None else f"{path!r}, {'a file' if os.path.isfile(path) else 'not a file'}"
            return (
                f"check SOFTHSM2_CONF ({state}); it names SoftHSM's configuration, in which directories.tokendir is a folder "
                "that this user can read and write"
            )
        if "opencryptoki" in name:
            return "check that its daemon pkcsslotd is running, and that this user is in the group pkcs11"
        return "check the library's own configuration, environment and log"

    def is_same(self, other: "Library") -> bool:
        """Return True if both objects are the same library, even if it was loaded by different paths."""
        return self.address == other.address

    def login(self, session: int, pin: memoryview | None) -> None:
        """Call C_Login as the user, for all sessions of the process. `pin` is None if the token prompts for the PIN itself."""
        address, size = (None, 0) if pin is None else (ctypes.addressof(c_char.from_buffer(pin)), len(pin))
        _check(self._functions["C_Login"](session, _USER, address, size), _ALREADY_LOGGED_IN)

    def state(self, session: int) -> int | None:
        """Return the state of a session from C_GetSessionInfo (CKS_...); None if the token no longer has the session."""
        info = _SessionInfo()
        return info.state if self._functions["C_GetSessionInfo"](session, ctypes.byref(info)) == _OK else None

    def encrypt_gcm(self, session: int, key: int, nonce: bytes, plaintext: bytes, aad: bytes) -> bytes:
        """Return ciphertext ‖ tag (16 bytes) from C_Encrypt with CKM_AES_GCM. Raises python-pkcs11's errors."""
        return self._gcm("Encrypt", session, key, nonce, plaintext, aad, len(plaintext) + _TAG)

    def decrypt_gcm(self, session: int, key: int, nonce: bytes, ciphertext: bytes, aad: bytes) -> bytes:
        """Return the plaintext of ciphertext ‖ tag (16 bytes) from C_Decrypt with CKM_AES_GCM.

        Raises python-pkcs11's errors.
        """
        return self._gcm("Decrypt", session, key, nonce, ciphertext, aad, len(ciphertext) - _TAG)

    def _gcm(self, verb: str, session: int, key: int, nonce: bytes, data: bytes, aad: bytes, result_size: int) -> bytes:
        parameter = _GcmParams(nonce, len(nonce), 8 * len(nonce), aad or None, len(aad), 8 * _TAG)
        mechanism = _Mechanism(_AES_GCM, ctypes.addressof(parameter), ctypes.sizeof(parameter))
        _check(self._functions[f"C_{verb}Init"](session, ctypes.byref(mechanism), key))
        # The buffer is larger than necessary: for decryption, some tokens require one of the size of their input.
        out = (c_ubyte * (len(data) + _TAG))()
        size = c_ulong(len(out))
        _check(self._functions[f"C_{verb}"](session, data, len(data), out, ctypes.byref(size)))
        if size.value != result_size:
            raise pkcs11.PKCS11Error(f"C_{verb} returned {size.value} bytes instead of {result_size}")
        return bytes(memoryview(out)[:result_size])


def _function_list(path: str) -> Any:
    functions = POINTER(c_void_p)()
    try:
        if not path:  # for the dynamic linker, an empty path is this program
            raise ValueError("no path")
        function = ctypes.CDLL(path).C_GetFunctionList
    except AttributeError:
        raise OSError(f"{path}: not a PKCS#11 library: it has no C_GetFunctionList") from None
    except (OSError, ValueError) as error:
        raise OSError(library_file.explain(path, str(error))) from None
    function.restype = c_ulong
    code = function(ctypes.byref(functions))
    if code != _OK or ctypes.cast(functions, c_void_p).value is None:
        raise OSError(f"{path}: C_GetFunctionList returned {return_values.name(code)}, and no functions")
    return functions


def _check(code: int, second_success: int = _OK) -> None:
    if code not in (_OK, second_success):
        raise _class_of(code)(return_values.name(code))


def _class_of(code: int) -> type[pkcs11.PKCS11Error]:
    return _ERRORS.get(code, pkcs11.PKCS11Error)
