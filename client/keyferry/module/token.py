"""A session on a PKCS#11 token, logged in, with the wrapping key pair. It works for as long as the token keeps the session.

Raises python-pkcs11's errors unchanged, and `ModuleError` if an operator has to act.

Cryptoki has two properties that shape this module:

* A login is valid for all sessions that a process has on a token. A second C_Login returns CKR_USER_ALREADY_LOGGED_IN for any
  PIN, so this module compares the PINs itself (`_check_same_pin`).
* C_Finalize, or the reset of a token, ends all sessions, and a library then counts its handles from 1 again. So an old handle
  can denote another session and another key (`_invalidate_stale`).
"""

import contextlib
import hmac
import os
import re
import threading
import weakref
from typing import Any, Final, NamedTuple

import pkcs11
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass, TokenFlag

from ..secret import Secret
from . import return_values, token_choice
from .cryptoki import Library
from .interface import INVALID_SIZE, NONCE_SIZE, ModuleError, check_size
from .token_choice import FoundToken, TokenChoice

__all__ = ["OAEP", "KeyPairChoice", "Pkcs11Session", "WrongPinError", "describe"]

OAEP: Final = {
    "RSAES_OAEP_SHA_256": (Mechanism.SHA256, pkcs11.MGF.SHA256, None),
    "RSAES_OAEP_SHA_1": (Mechanism.SHA_1, pkcs11.MGF.SHA1, None),
}
"""The parameters of CKM_RSA_PKCS_OAEP for each WrappingAlgorithm, the better algorithm first."""

_MODULUS_BITS: Final = 2048
_EXPONENT: Final = b"\x01\x00\x01"
_LOGGED_IN: Final = (1, 3)
"""The session states CKS_RO_USER_FUNCTIONS and CKS_RW_USER_FUNCTIONS."""
_DATA_KEY: Final = "keyferry data key"
_TEMPLATE: Final = {Attribute.PRIVATE: True, Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
"""The attributes of a data key, which is an object of the session, not of the token."""
_STALE: Final = (
    pkcs11.ObjectHandleInvalid,
    pkcs11.KeyHandleInvalid,
    pkcs11.UnwrappingKeyHandleInvalid,
    pkcs11.OperationActive,
    pkcs11.UserNotLoggedIn,
)
"""Errors in a session that the token still has, but that is unusable: its objects are gone, or a call never ended."""

_LOGIN_REFUSED: Final[dict[type[pkcs11.PKCS11Error], str]] = {
    pkcs11.PinLocked: "has locked its user PIN after wrong PINs; its security officer can unlock it (pkcs11-tool --init-pin)",
    pkcs11.PinExpired: "refuses its user PIN, which has expired; change it (pkcs11-tool --login --change-pin)",
    pkcs11.UserPinNotInitialized: "has no user PIN yet; its security officer can set one (pkcs11-tool --init-pin)",
    pkcs11.AnotherUserAlreadyLoggedIn: "has its security officer logged in by this process; log out first",
}
"""The words after the token's name in a message, for refusals of C_Login that are not about the PIN that was sent."""
_NAMES_BY_TEXT: Final = {
    "Buffer was too small": "CKR_BUFFER_TOO_SMALL",
    "Initialisation error (already": "CKR_CRYPTOKI_ALREADY_INITIALIZED",
    "Initialisation error (not": "CKR_CRYPTOKI_NOT_INITIALIZED",
    "Parallel not supported": "CKR_SESSION_PARALLEL_NOT_SUPPORTED",
    "User type invalid": "CKR_USER_TYPE_INVALID",
}
"""Beginnings of python-pkcs11's texts, for return values that do not have a class of their own."""
_OTHER_SPELLINGS: Final = {
    pkcs11.AnotherUserAlreadyLoggedIn: "CKR_USER_ANOTHER_ALREADY_LOGGED_IN",
    pkcs11.FunctionCancelled: "CKR_FUNCTION_CANCELED",
    pkcs11.TokenNotRecognised: "CKR_TOKEN_NOT_RECOGNIZED",
}

_UNREADABLE: Final = ((Attribute.SENSITIVE, True), (Attribute.EXTRACTABLE, False))

_sessions: "weakref.WeakSet[Pkcs11Session]" = weakref.WeakSet()
_registry: Final = threading.Lock()
os.register_at_fork(before=_registry.acquire, after_in_parent=_registry.release, after_in_child=_registry.release)


class WrongPinError(ModuleError):
    """The token refused the PIN. The same PIN must not be tried again."""


class KeyPairChoice(NamedTuple):
    """The token and the label of the key pair to open. `pin` is None if the token needs no PIN, or prompts for it itself."""

    token: TokenChoice
    key_label: str
    pin: Secret | None


class Pkcs11Session:
    """A session with the wrapping key pair, which is generated if it is missing and `generate` is set.

    The caller makes one call at a time.
    """

    def __init__(self, library: Library, choice: KeyPairChoice, *, generate: bool) -> None:
        was_reset = library.initialize()
        self._library = library
        self._pin = choice.pin
        self._token = _find_token(library, choice.token)
        self._raw_session: Any = self._token.open()
        self._process = os.getpid()
        self.is_stale = False
        self._invalidate_stale(was_reset=was_reset)
        try:
            self._login()
            private_key = self._find_private(choice.key_label)
            if private_key is None and generate:
                self._generate(choice.key_label)
                private_key = self._find_private(choice.key_label)
            if private_key is None:
                raise ModuleError(f"the token {choice.token} has no RSA key pair {choice.key_label!r}")
            self._private = private_key
            self.modulus, self.exponent = self._public_numbers(choice.key_label)
            self._check_private(choice.key_label)
        except BaseException:
            with contextlib.suppress(pkcs11.PKCS11Error):
                self.close()
            raise
        with _registry:
            _sessions.add(self)

    def close(self) -> None:
        """Close the session, which destroys its data keys. Do nothing in a child after fork: the session is the parent's."""
        if self._process == os.getpid() and not self.is_stale:
            self._raw_session.close()

    def _invalidate_stale(self, *, was_reset: bool) -> None:
        """Mark the older sessions of this process that the library no longer has.

        `was_reset`: C_Initialize has just succeeded, so all older sessions are gone. Otherwise, a library that returns a handle
        which an older session has must have ended that session: the token was reset between two calls. Nothing else shows it,
        because the old handle is valid again, and now denotes this session. Handles of key objects are reused in the same way,
        so a call with the old handles could encrypt with another data key.
        """
        with _registry:
            for session in _sessions:
                session.mark_stale(self._library, None if was_reset else self._raw_session.handle)

    def mark_stale(self, library: Library, handle: int | None) -> None:
        """Mark this session if a newer session of the library has its handle; for None, in any case."""
        self.is_stale |= handle in (None, self._raw_session.handle) and self._library.is_same(library)

    def is_lost(self, error: pkcs11.PKCS11Error) -> bool:
        """Return True if an error means that this session is unusable, rather than that the call was wrong."""
        return isinstance(error, _STALE) or self._library.state(self._raw_session.handle) is None

    def unwrap(self, wrapped_key: bytes, algorithm: str) -> Any:
        """Call C_UnwrapKey; return a key object of this session, which cannot be read out of the token.

        Raises `ModuleError` if the token keeps the key readable, or if the key does not have the size of an AES key.
        """
        try:
            key = self._private.unwrap_key(
                ObjectClass.SECRET_KEY,
                KeyType.AES,
                wrapped_key,
                label=_DATA_KEY,
                mechanism=Mechanism.RSA_PKCS_OAEP,
                mechanism_param=OAEP[algorithm],
                capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
                template=_TEMPLATE,
            )
        except (pkcs11.KeySizeRange, pkcs11.WrappedKeyLenRange):
            raise ModuleError(INVALID_SIZE) from None
        try:
            self._check_size(key)
            _harden(key, "an imported data key")
        except BaseException:
            with contextlib.suppress(pkcs11.PKCS11Error):
                key.destroy()
            raise
        return key

    def encrypt(self, key: Any, nonce: bytes, plaintext: bytes, aad: bytes) -> bytes:
        """Encrypt with AES-GCM; return ciphertext ‖ tag."""
        return self._library.encrypt_gcm(self._raw_session.handle, key.handle, nonce, plaintext, aad)

    def decrypt(self, key: Any, nonce: bytes, ciphertext: bytes, aad: bytes) -> bytes:
        """Decrypt ciphertext ‖ tag of AES-GCM; return the plaintext."""
        return self._library.decrypt_gcm(self._raw_session.handle, key.handle, nonce, ciphertext, aad)

    def _check_size(self, key: Any) -> None:
        size = 0
        with contextlib.suppress(pkcs11.AttributeTypeInvalid, pkcs11.AttributeSensitive, pkcs11.FunctionFailed):
            size = key[Attribute.VALUE_LEN]
        if size:
            return check_size(size)
        # SoftHSM unwraps a key of any size, and reports a size of 0. It detects a wrong size at the first use.
        try:
            self.encrypt(key, os.urandom(NONCE_SIZE), b"", b"")
        except pkcs11.PKCS11Error as error:
            if self.is_lost(error):
                raise
            raise ModuleError(INVALID_SIZE) from None
        return None

    def _login(self) -> None:
        if self._library.state(self._raw_session.handle) in _LOGGED_IN:
            return self._check_same_pin()
        flags, label = self._token.flags, self._token.label
        if not flags & TokenFlag.LOGIN_REQUIRED:
            return None
        if flags & TokenFlag.USER_PIN_LOCKED:
            raise ModuleError(f"the token {label!r} {_LOGIN_REFUSED[pkcs11.PinLocked]}")
        if flags & TokenFlag.USER_PIN_FINAL_TRY:
            # A service that is restarted repeatedly with a wrong PIN must not lock the token.
            raise ModuleError(
                f"one more wrong PIN locks the token {label!r}; log in to it once with another program first"
            )
        if self._pin is None:
            if not flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
                raise ModuleError(f"the token {label!r} requires a PIN; pass pin_file, or pin to prompt for it")
            return self._library.login(self._raw_session.handle, None)
        try:
            with self._pin.lend() as pin:
                self._library.login(self._raw_session.handle, pin)
        except (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange) as error:
            raise WrongPinError(
                f"the token {label!r} refused the PIN, which was tried once, because wrong PINs lock a token; "
                f"correct pin_file, or the result of pin ({describe(error)})"
            ) from None
        except tuple(_LOGIN_REFUSED) as error:
            raise WrongPinError(f"the token {label!r} {_LOGIN_REFUSED[type(error)]} ({describe(error)})") from None
        return None

    def _check_same_pin(self) -> None:
        """Compare the PIN with the PIN that other sessions of this process used. Raises `WrongPinError`.

        The process is logged in already, so the token does not check a PIN: C_Login returns CKR_USER_ALREADY_LOGGED_IN for any.
        A wrong PIN would stay unnoticed until the token is reset, and would then count as a failed login.
        """
        with _registry:
            slot = self._token.slot.slot_id
            pins = [pin for session in _sessions if (pin := session.pin_of_slot(self._library, slot))]
        if self._pin is None or not pins:
            return
        with self._pin.lend() as own_pin:
            for pin in pins:
                with pin.lend() as other_pin:
                    if hmac.compare_digest(own_pin, other_pin):
                        return
        raise WrongPinError(
            f"this process is logged in to the token {self._token.label!r} with another PIN; pass the same PIN"
        )

    def pin_of_slot(self, library: Library, slot: int) -> Secret | None:
        """Return the PIN of this session, if the session is on the token in a library's slot, and still logged in."""
        is_same_slot = self._pin is not None and self._library.is_same(library) and self._token.slot.slot_id == slot
        is_logged_in = (
            is_same_slot and not self.is_stale and self._library.state(self._raw_session.handle) in _LOGGED_IN
        )
        return self._pin if is_logged_in else None

    def _find_private(self, label: str) -> Any:
        objects = self._objects(ObjectClass.PRIVATE_KEY, label)
        if len(objects) > 1:
            raise ModuleError(
                f"the token has {len(objects)} RSA private keys with the label {label!r}; give each its own label"
            )
        return objects[0] if objects else None

    def _objects(self, kind: ObjectClass, label: str) -> list[Any]:
        template = {Attribute.CLASS: kind, Attribute.KEY_TYPE: KeyType.RSA, Attribute.LABEL: label}
        return list(self._raw_session.get_objects(template))

    def _generate(self, label: str) -> None:
        with self._token.open(rw=True) as session:
            # For unwrapping only: with C_Decrypt, a user with the PIN could decrypt an exported data key.
            public_key, private_key = session.generate_keypair(
                KeyType.RSA,
                _MODULUS_BITS,
                id=os.urandom(16),
                label=label,
                store=True,
                capabilities=MechanismFlag.WRAP | MechanismFlag.UNWRAP,
                public_template={Attribute.PUBLIC_EXPONENT: _EXPONENT},
                private_template={Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False},
            )
            try:
                _harden(private_key, "a private key that it generated")
            except BaseException:
                private_key.destroy()
                public_key.destroy()
                raise

    def _public_numbers(self, label: str) -> tuple[int, int]:
        for source in (self._private, *self._objects(ObjectClass.PUBLIC_KEY, label)):
            attributes = source.get_attributes((Attribute.MODULUS, Attribute.PUBLIC_EXPONENT))
            if attributes.get(Attribute.MODULUS) and attributes.get(Attribute.PUBLIC_EXPONENT):
                modulus = int.from_bytes(attributes[Attribute.MODULUS], "big")
                exponent = int.from_bytes(attributes[Attribute.PUBLIC_EXPONENT], "big")
                if modulus.bit_length() != _MODULUS_BITS:
                    raise ModuleError(f"the key pair {label!r} has {modulus.bit_length()} bits; RSA_2048 is expected")
                return modulus, exponent
        raise ModuleError(f"the token does not have the public key of {label!r}; store it in the token")

    def _check_private(self, label: str) -> None:
        if not self._private[Attribute.UNWRAP]:
            raise ModuleError(f"the private key {label!r} may not unwrap keys (CKA_UNWRAP is false)")
        # One of the two attributes is enough to keep the key in the token. An operator may need an extractable key, to wrap it
        # for a backup.
        if not self._private[Attribute.SENSITIVE] and self._private[Attribute.EXTRACTABLE]:
            raise ModuleError(f"the private key {label!r} can be read out of the token; generate one that cannot")


def describe(error: pkcs11.PKCS11Error) -> str:
    """Return the name of an error's return value (CKR_...), with the error's text if it has one."""
    text = str(error)
    if "CKR" in text:
        return text
    if unmapped := re.fullmatch(r"Unmapped error code (0x[0-9a-f]+)", text):
        return return_values.name(int(unmapped[1], 16))
    for beginning, name in _NAMES_BY_TEXT.items():
        if text.startswith(beginning):
            return name
    letters = f"CKR{type(error).__name__}".upper()
    name = _OTHER_SPELLINGS.get(type(error)) or return_values.BY_LETTERS.get(letters, type(error).__name__)
    return f"{name} {text}".rstrip()


def _find_token(library: Library, choice: TokenChoice) -> Any:
    tokens, reasons = [], {}
    for slot in library.pkcs11.get_slots(token_present=True):
        try:
            token = slot.get_token()
        except pkcs11.PKCS11Error as error:  # a broken reader must not affect the token in another reader
            reasons[slot.slot_id] = describe(error)
            continue
        serial = token.serial.decode(errors="replace").strip(" \0")
        is_initialized = bool(token.flags & TokenFlag.TOKEN_INITIALIZED)
        attributes = token.label, serial, token.model, token.manufacturer_id, is_initialized
        tokens.append(FoundToken(slot.slot_id, *attributes, token))

    def other_slots() -> dict[int, str]:
        empty_slots = {slot.slot_id for slot in library.pkcs11.get_slots()} - {token.slot for token in tokens}
        return {slot: reasons.get(slot, "CKR_TOKEN_NOT_PRESENT") for slot in sorted(empty_slots)}

    return token_choice.choose(choice, library.path, tokens, other_slots)


def _harden(key: Any, purpose: str) -> None:
    """Make a key unreadable. Raises `ModuleError`. Some tokens ignore these attributes in a template, but accept them later."""
    try:
        for attribute, value in _UNREADABLE:
            if key[attribute] != value:
                key[attribute] = value
        faults = [attribute.name for attribute, value in _UNREADABLE if key[attribute] != value]
    except pkcs11.PKCS11Error as error:
        faults = [describe(error)]
    if faults:
        raise ModuleError(
            f"the token keeps {purpose} readable ({', '.join(faults)}) and rejects changing it; use another token"
        )
