"""A cryptographic module in a PKCS#11 token: the token unwraps exported data keys, and encrypts with them.

Protected: the private key and the data keys are objects of the token, sensitive and not extractable; they never exist outside
the token. Not protected: an attacker who controls this process, or has the PIN, can use the keys. The module also trusts the
token's own statements about its keys.

A data key is an object of the session. It is gone when the process ends, and its data-key record recovers it. After a reset of
the token or a fork of this process, the module unwraps the data key again from the ExportedDataKey, which only the token can
decrypt.
"""

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, Self, TypeVar

import pkcs11
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ..parameters import decode_base64, encode_base64
from .cryptoki import Library
from .interface import NONCE_SIZE, NOT_AUTHENTIC, NOT_HELD, NOT_OURS, TAG, CryptographicModule, DataKey, ModuleError
from .pin import read_pin
from .probe import probe_token
from .token import KeyPairChoice, Pkcs11Session, WrongPinError, describe
from .token_choice import TokenChoice

T = TypeVar("T")

_TOKEN_ERRORS: Final = (
    pkcs11.DeviceError,
    pkcs11.DeviceMemory,
    pkcs11.DeviceRemoved,
    pkcs11.HostMemory,
    pkcs11.TokenNotPresent,
)
"""Errors that are not about the data. They must not be reported as a ciphertext that is not authentic."""

_modules: "weakref.WeakSet[Pkcs11Module]" = weakref.WeakSet()
_registry: Final = threading.Lock()


class _ImportedKey:
    """A data key in the token, and the ExportedDataKey from which it is unwrapped again when its session is lost."""

    __slots__ = ("key", "session", "wrapped")

    def __init__(self, wrapped_key: bytes, session: Pkcs11Session, key: Any) -> None:
        self.wrapped = wrapped_key
        self.session = session
        self.key = key


class Pkcs11Module(CryptographicModule):
    """A key pair and data keys in a token, opened with `open`. Safe after fork, and for threads: calls run one at a time."""

    wrapping_key_spec = "RSA_2048"

    def __init__(self, library: Library, choice: KeyPairChoice, *, generate: bool) -> None:
        self._library = library
        self._choice = choice
        self._keys: weakref.WeakKeyDictionary[DataKey, _ImportedKey] = weakref.WeakKeyDictionary()
        self._abandoned: deque[_ImportedKey] = deque()
        self._refused: str | None = None
        self.lock = threading.RLock()
        self._session: Pkcs11Session | None = None
        self._public_numbers: tuple[int, int] | None = None
        with _translated("be opened"):
            session = self._connect(generate=generate)
            self._public_numbers = session.modulus, session.exponent
            public_key = rsa.RSAPublicNumbers(session.exponent, session.modulus).public_key()
            self._public_key_blob = encode_base64(
                public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            )
            self.wrapping_algorithm = probe_token(session, public_key)
        with _registry:
            _modules.add(self)

    def __repr__(self) -> str:
        return f"Pkcs11Module({self._choice.token}, {self._choice.key_label!r})"

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        key_label: str,
        token_label: str | None = None,
        token_serial: str | None = None,
        slot: int | None = None,
        token_uri: str | None = None,
        pin_file: str | os.PathLike[str] | None = None,
        pin: Callable[[], str] | None = None,
        generate: bool = False,
        library_parameters: str | None = None,
    ) -> Self:
        """Open the key pair `key_label` in a token of the PKCS#11 library `path`, and test the token.

        The token is chosen by `token_label`, `token_serial`, the slot ID `slot`, and the attributes in `token_uri` (RFC 7512:
        "pkcs11:token=app;serial=..."). At least one of these arguments is required. Exactly one token must match all of them.
        The PIN is the first line of `pin_file` ("credential:NAME" is systemd's), or the result of `pin`, for example
        `getpass.getpass`. It stays in locked memory, to log in again after a reset of the token. A wrong PIN is tried once.
        `generate` makes the key pair, RSA of 2,048 bits, if it does not exist. `library_parameters` are for libraries that
        require parameters for their initialisation (NSS: "configdir='sql:/path' ...").

        The test wraps a throw-away key in this process and uses it in the token. So the token really supports
        `wrapping_algorithm`, and every other module can decrypt the token's ciphertexts. Raises `ModuleError`.
        """
        if not key_label:
            raise ValueError("key_label must not be empty")
        token = TokenChoice.of(label=token_label, serial=token_serial, slot=slot, uri=token_uri)
        try:
            library = Library(path, library_parameters)
        except OSError as error:
            raise ModuleError(f"the PKCS#11 library does not load: {error}") from None
        return cls(library, KeyPairChoice(token, key_label, read_pin(pin_file, pin)), generate=generate)

    def close(self) -> None:
        """Close the session, which destroys all its data keys. The module cannot be used afterwards."""
        with self.lock:
            self._keys.clear()
            self._refused = "this module was closed"
            self._disconnect()

    @property
    def public_key_blob(self) -> str:
        return self._public_key_blob

    def import_data_key(self, exported_data_key: str | bytes) -> DataKey:
        try:
            wrapped_key = (
                decode_base64(exported_data_key) if isinstance(exported_data_key, str) else bytes(exported_data_key)
            )
        except ValueError:
            raise ModuleError(NOT_OURS) from None
        if len(wrapped_key) != 256:
            raise ModuleError(NOT_OURS)
        with _translated("import this", NOT_OURS), self.lock:
            imported_key = self._run(lambda session: self._unwrap(session, wrapped_key))
            key = DataKey()
            self._keys[key] = imported_key
        # The finalizer does not destroy the key: the garbage collector can run in any thread. The next call destroys it, while
        # it holds the lock.
        weakref.finalize(key, self._abandoned.append, imported_key).atexit = False
        return key

    def encrypt(self, key: DataKey, plaintext: bytes, aad: bytes = b"") -> bytes:
        nonce = os.urandom(NONCE_SIZE)
        with _translated(f"encrypt {len(plaintext)} bytes"):
            return nonce + self._use(
                key, lambda session, key_object: session.encrypt(key_object, nonce, bytes(plaintext), bytes(aad))
            )

    def decrypt(self, key: DataKey, sealed: bytes, aad: bytes = b"") -> bytes:
        sealed = bytes(sealed)
        if len(sealed) < NONCE_SIZE + TAG:
            raise ModuleError(NOT_AUTHENTIC)
        nonce, ciphertext = sealed[:NONCE_SIZE], sealed[NONCE_SIZE:]
        with _translated("decrypt this", NOT_AUTHENTIC):
            return self._use(
                key, lambda session, key_object: session.decrypt(key_object, nonce, ciphertext, bytes(aad))
            )

    def forget(self, key: DataKey) -> None:
        with _translated("destroy this key"), self.lock:
            imported_key = self._keys.pop(key, None)
            if imported_key is None:
                raise ModuleError(NOT_HELD)
            self._destroy(imported_key)

    # --- sessions -----------------------------------------------------------------------------------------------------

    def _use(self, key: DataKey, work: Callable[[Pkcs11Session, Any], T]) -> T:
        with self.lock:
            imported_key = self._keys.get(key)
            if imported_key is None:
                raise ModuleError(NOT_HELD)

            def with_key(session: Pkcs11Session) -> T:
                if imported_key.session is not session:
                    new_key = self._unwrap(session, imported_key.wrapped)
                    imported_key.session, imported_key.key = new_key.session, new_key.key
                return work(session, imported_key.key)

            return self._run(with_key)

    def _run(self, work: Callable[[Pkcs11Session], T]) -> T:
        """Return the result of `work`; if the session was lost, repeat `work` once in a new session.

        The repetition is safe, because `work` never changes the token permanently.
        """
        if self._session is not None and self._session.is_stale:
            self._disconnect()
        session = self._session or self._connect(generate=False)
        self._sweep()
        try:
            return work(session)
        except pkcs11.PKCS11Error as error:
            if not session.is_lost(error):
                raise
        self._disconnect()
        session = self._connect(generate=False)
        try:
            return work(session)
        except pkcs11.PKCS11Error as error:
            if not session.is_lost(error):
                raise
            raise ModuleError(f"the token {self._choice.token} was lost twice: {describe(error)}") from None

    def _unwrap(self, session: Pkcs11Session, wrapped_key: bytes) -> _ImportedKey:
        return _ImportedKey(wrapped_key, session, session.unwrap(wrapped_key, self.wrapping_algorithm))

    def _connect(self, *, generate: bool) -> Pkcs11Session:
        if self._refused:
            raise ModuleError(self._refused)
        try:
            session = Pkcs11Session(self._library, self._choice, generate=generate)
        except WrongPinError as error:
            self._refused = str(error)
            raise
        except pkcs11.PKCS11Error as error:
            raise ModuleError(f"the token {self._choice.token} does not open: {describe(error)}") from None
        if self._public_numbers not in (None, (session.modulus, session.exponent)):
            session.close()
            raise ModuleError(f"the token has another key pair {self._choice.key_label!r} now")
        self._session = session
        self._closing = weakref.finalize(self, _close, session)
        self._closing.atexit = False  # the token ends a session whose process ends
        return session

    def _disconnect(self) -> None:
        if self._session is not None:
            self._session = None
            self._closing()

    def _sweep(self) -> None:
        while self._abandoned:
            with contextlib.suppress(pkcs11.PKCS11Error):
                self._destroy(self._abandoned.popleft())

    def _destroy(self, imported_key: _ImportedKey) -> None:
        key_object, imported_key.key = imported_key.key, None
        if key_object is None or imported_key.session is not self._session or imported_key.session.is_stale:
            return  # already destroyed, or lost with its session
        try:
            key_object.destroy()
        except pkcs11.PKCS11Error as error:
            if not imported_key.session.is_lost(error):
                raise

    def after_fork(self) -> None:
        self._session = None  # it belongs to the parent


# A fork waits for calls in flight. A library that does not notice the fork would otherwise leave the locks of these calls
# locked in the child for ever.
_locked_modules: Final[list[Pkcs11Module]] = []


def _before_fork() -> None:
    _registry.acquire()
    for module in _modules:
        module.lock.acquire()
        _locked_modules.append(module)


def _release_locks() -> None:
    while _locked_modules:
        _locked_modules.pop().lock.release()
    _registry.release()


def _after_fork() -> None:
    for module in _locked_modules:
        module.after_fork()
    _release_locks()


os.register_at_fork(before=_before_fork, after_in_parent=_release_locks, after_in_child=_after_fork)


def _close(session: Pkcs11Session) -> None:
    with contextlib.suppress(pkcs11.PKCS11Error):
        session.close()


@contextlib.contextmanager
def _translated(action: str, data_error: str | None = None) -> Iterator[None]:
    """Convert the token's errors into `ModuleError`.

    Errors that the data may have caused all get the text `data_error`, if it is set. Other errors get their own reason.
    """
    try:
        yield
    except pkcs11.PKCS11Error as error:
        if data_error and not isinstance(error, _TOKEN_ERRORS):
            raise ModuleError(data_error) from None
        raise ModuleError(f"the token could not {action}: {describe(error)}") from None
