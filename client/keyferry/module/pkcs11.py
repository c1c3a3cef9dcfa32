"""A cryptographic module in a PKCS#11 token: it unwraps exported data keys in there, and encrypts with them in there.

What it protects: private key and data keys are objects of the token, sensitive and not extractable; they never exist outside.
What it cannot: whoever can use this process, or has the PIN, can use them. And the token's word is taken for what it is asked.

A data key is an object of the session: it is gone when the process ends, and from its record it comes back. When the token was
reset or this process was forked, it is unwrapped once more, from the ExportedDataKey, which only the token can open.
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
from .token import Connection, Wanted, WrongPinError, describe
from .token_choice import TokenChoice
from .trial import try_out

T = TypeVar("T")

_TROUBLE: Final = (
    pkcs11.DeviceError,
    pkcs11.DeviceMemory,
    pkcs11.DeviceRemoved,
    pkcs11.HostMemory,
    pkcs11.TokenNotPresent,
)
"""What says nothing of the data: not to be taken for a ciphertext that is not authentic."""

_modules: "weakref.WeakSet[Pkcs11Module]" = weakref.WeakSet()
_registry: Final = threading.Lock()


class _Held:
    """A data key in the token, and what brings it back when its session is lost."""

    __slots__ = ("connection", "key", "wrapped")

    def __init__(self, wrapped: bytes, connection: Connection, key: Any) -> None:
        self.wrapped = wrapped
        self.connection = connection
        self.key = key


class Pkcs11Module(CryptographicModule):
    """A key pair in a token, and data keys there. Get one with `open`. Safe for threads (calls take turns) and after fork."""

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
        """Open the key pair `key_label` in a token of the PKCS#11 library `path`, and try it out.

        The token is the one with `token_label`, `token_serial`, the slot ID `slot`, and what `token_uri` requires (RFC 7512:
        "pkcs11:token=app;serial=..."). At least one of them is needed; each that is there must hold, of one token only.
        The PIN is the first line of `pin_file` ("credential:NAME" is systemd's), or what `pin` gives, for example
        `getpass.getpass`; it is kept in locked memory, for when the token was reset. A wrong one is tried once.
        `generate` makes the key pair, RSA of 2,048 bits, if it is not there. `library_parameters` are for libraries that want
        some to initialise (NSS: "configdir='sql:/path' ...").

        To try it out, a throw-away key is wrapped here and used there: so `wrapping_algorithm` is one that the token really
        knows, and what it encrypts is what every other module decrypts. Raises `ModuleError`.
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
        """Close the session: the token forgets all data keys. The module is of no further use."""
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
        # Not destroyed right here, wherever the garbage collector happens to run: by the next call, in its turn.
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
        """Do it; when the session turns out to be lost, once more in a new one. Nothing here changes the token for good."""
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
            return  # destroyed, or gone with its session
        try:
            inside.destroy()
        except pkcs11.PKCS11Error as error:
            if not held.connection.is_lost(error):
                raise

    def _after_fork(self) -> None:
        self._connection = None  # the parent's


# A fork waits for calls that are under way: a library that does not notice it would leave their locks to the child for ever.
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
    """Turn the token's refusals into `ModuleError`: one for all that may be due to the data, else with its reason."""
    try:
        yield
    except pkcs11.PKCS11Error as error:
        if otherwise and not isinstance(error, _TROUBLE):
            raise ModuleError(otherwise) from None
        raise ModuleError(f"the token could not {what}: {describe(error)}") from None
