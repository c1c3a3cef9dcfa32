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
from .interface import NONCE, NOT_AUTHENTIC, NOT_HELD, NOT_OURS, TAG, CryptographicModule, DataKey, ModuleError
from .pin import read_pin
from .probe import try_out
from .token import Connection, Wanted, WrongPinError, describe
from .token_choice import TokenChoice

T = TypeVar("T")

_TROUBLE: Final = (
    pkcs11.DeviceError,
    pkcs11.DeviceMemory,
    pkcs11.DeviceRemoved,
    pkcs11.HostMemory,
    pkcs11.TokenNotPresent,
)
"""Errors that are not about the data. They must not be reported as a ciphertext that is not authentic."""

_modules: "weakref.WeakSet[Pkcs11Module]" = weakref.WeakSet()
_registry: Final = threading.Lock()


class _Held:
    """A data key in the token, and the ExportedDataKey from which it is unwrapped again when its session is lost."""

    __slots__ = ("connection", "key", "wrapped")

    def __init__(self, wrapped: bytes, connection: Connection, key: Any) -> None:
        self.wrapped = wrapped
        self.connection = connection
        self.key = key


class Pkcs11Module(CryptographicModule):
    """A key pair and data keys in a token, opened with `open`. Safe after fork, and for threads: calls run one at a time."""

    wrapping_key_spec = "RSA_2048"

    def __init__(self, library: Library, wanted: Wanted, *, generate: bool) -> None:
        self._library = library
        self._wanted = wanted
        self._keys: weakref.WeakKeyDictionary[DataKey, _Held] = weakref.WeakKeyDictionary()
        self._abandoned: deque[_Held] = deque()
        self._refused: str | None = None
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._public_numbers: tuple[int, int] | None = None
        with _saying("be opened"):
            connection = self._connect(generate=generate)
            self._public_numbers = connection.modulus, connection.exponent
            public = rsa.RSAPublicNumbers(connection.exponent, connection.modulus).public_key()
            self._public_key_blob = encode_base64(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
            self.wrapping_algorithm = try_out(connection, public)
        with _registry:
            _modules.add(self)

    def __repr__(self) -> str:
        return f"Pkcs11Module({self._wanted.choice}, {self._wanted.key_label!r})"

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
        choice = TokenChoice.of(label=token_label, serial=token_serial, slot=slot, uri=token_uri)
        try:
            library = Library(path, library_parameters)
        except OSError as error:
            raise ModuleError(f"the PKCS#11 library does not load: {error}") from None
        return cls(library, Wanted(choice, key_label, read_pin(pin_file, pin)), generate=generate)

    def close(self) -> None:
        """Close the session, which destroys all its data keys. The module cannot be used afterwards."""
        with self._lock:
            self._keys.clear()
            self._refused = "this module was closed"
            self._disconnect()

    @property
    def public_key_blob(self) -> str:
        return self._public_key_blob

    def import_data_key(self, exported_data_key: str | bytes) -> DataKey:
        try:
            wrapped = (
                decode_base64(exported_data_key) if isinstance(exported_data_key, str) else bytes(exported_data_key)
            )
        except ValueError:
            raise ModuleError(NOT_OURS) from None
        if len(wrapped) != 256:
            raise ModuleError(NOT_OURS)
        with _saying("import this", NOT_OURS), self._lock:
            held = self._run(lambda connection: self._unwrap(connection, wrapped))
            key = DataKey()
            self._keys[key] = held
        # The finalizer does not destroy the key: the garbage collector can run in any thread. The next call destroys it, while
        # it holds the lock.
        weakref.finalize(key, self._abandoned.append, held).atexit = False
        return key

    def encrypt(self, key: DataKey, plaintext: bytes, aad: bytes = b"") -> bytes:
        nonce = os.urandom(NONCE)
        with _saying(f"encrypt {len(plaintext)} bytes"):
            return nonce + self._use(
                key, lambda where, inside: where.encrypt(inside, nonce, bytes(plaintext), bytes(aad))
            )

    def decrypt(self, key: DataKey, sealed: bytes, aad: bytes = b"") -> bytes:
        sealed = bytes(sealed)
        if len(sealed) < NONCE + TAG:
            raise ModuleError(NOT_AUTHENTIC)
        nonce, ciphertext = sealed[:NONCE], sealed[NONCE:]
        with _saying("decrypt this", NOT_AUTHENTIC):
            return self._use(key, lambda where, inside: where.decrypt(inside, nonce, ciphertext, bytes(aad)))

    def forget(self, key: DataKey) -> None:
        with _saying("destroy this key"), self._lock:
            held = self._keys.pop(key, None)
            if held is None:
                raise ModuleError(NOT_HELD)
            self._destroy(held)

    # --- sessions -----------------------------------------------------------------------------------------------------

    def _use(self, key: DataKey, work: Callable[[Connection, Any], T]) -> T:
        with self._lock:
            held = self._keys.get(key)
            if held is None:
                raise ModuleError(NOT_HELD)

            def with_key(connection: Connection) -> T:
                if held.connection is not connection:
                    again = self._unwrap(connection, held.wrapped)
                    held.connection, held.key = again.connection, again.key
                return work(connection, held.key)

            return self._run(with_key)

    def _run(self, work: Callable[[Connection], T]) -> T:
        """Return the result of `work`; if the session was lost, repeat `work` once in a new session.

        The repetition is safe, because `work` never changes the token permanently.
        """
        if self._connection is not None and self._connection.is_overtaken:
            self._disconnect()
        connection = self._connection or self._connect(generate=False)
        self._sweep()
        try:
            return work(connection)
        except pkcs11.PKCS11Error as error:
            if not connection.is_lost(error):
                raise
        self._disconnect()
        connection = self._connect(generate=False)
        try:
            return work(connection)
        except pkcs11.PKCS11Error as error:
            if not connection.is_lost(error):
                raise
            raise ModuleError(f"the token {self._wanted.choice} was lost twice: {describe(error)}") from None

    def _unwrap(self, connection: Connection, wrapped: bytes) -> _Held:
        return _Held(wrapped, connection, connection.unwrap(wrapped, self.wrapping_algorithm))

    def _connect(self, *, generate: bool) -> Connection:
        if self._refused:
            raise ModuleError(self._refused)
        try:
            connection = Connection(self._library, self._wanted, generate=generate)
        except WrongPinError as error:
            self._refused = str(error)
            raise
        except pkcs11.PKCS11Error as error:
            raise ModuleError(f"the token {self._wanted.choice} does not open: {describe(error)}") from None
        if self._public_numbers not in (None, (connection.modulus, connection.exponent)):
            connection.close()
            raise ModuleError(f"the token has another key pair {self._wanted.key_label!r} now")
        self._connection = connection
        self._closing = weakref.finalize(self, _close, connection)
        self._closing.atexit = False  # the token ends a session whose process ends
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection = None
            self._closing()

    def _sweep(self) -> None:
        while self._abandoned:
            with contextlib.suppress(pkcs11.PKCS11Error):
                self._destroy(self._abandoned.popleft())

    def _destroy(self, held: _Held) -> None:
        inside, held.key = held.key, None
        if inside is None or held.connection is not self._connection or held.connection.is_overtaken:
            return  # already destroyed, or lost with its session
        try:
            inside.destroy()
        except pkcs11.PKCS11Error as error:
            if not held.connection.is_lost(error):
                raise

    def _after_fork(self) -> None:
        self._connection = None  # it belongs to the parent


# A fork waits for calls in flight. A library that does not notice the fork would otherwise leave the locks of these calls
# locked in the child for ever.
_stopped: Final[list[Pkcs11Module]] = []


def _before_fork() -> None:
    _registry.acquire()
    for module in _modules:
        module._lock.acquire()
        _stopped.append(module)


def _go_on() -> None:
    while _stopped:
        _stopped.pop()._lock.release()
    _registry.release()


def _after_fork() -> None:
    for module in _stopped:
        module._after_fork()
    _go_on()


os.register_at_fork(before=_before_fork, after_in_parent=_go_on, after_in_child=_after_fork)


def _close(connection: Connection) -> None:
    with contextlib.suppress(pkcs11.PKCS11Error):
        connection.close()


@contextlib.contextmanager
def _saying(what: str, otherwise: str | None = None) -> Iterator[None]:
    """Convert the token's errors into `ModuleError`.

    Errors that the data may have caused all get the text `otherwise`, if it is set. Other errors get their own reason.
    """
    try:
        yield
    except pkcs11.PKCS11Error as error:
        if otherwise and not isinstance(error, _TROUBLE):
            raise ModuleError(otherwise) from None
        raise ModuleError(f"the token could not {what}: {describe(error)}") from None
