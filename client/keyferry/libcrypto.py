"""The system's libcrypto, by ctypes: public-key encryption (EVP_PKEY) from buffer to buffer. The only file that calls it.

The `cryptography` package does not suffice: it lacks SM2, and its RSA accepts only `bytes`, which cannot be wiped. Here the
plaintext is read from, and written to, a writable buffer of the caller.

libcrypto accepts trailing bytes, other curves and explicit parameters in a public key. So callers parse keys strictly before
they load them. Needs OpenSSL 3.0 or newer (Debian 12, Alpine 3.17, Ubuntu 22.04).
"""

import ctypes
import functools
from collections.abc import Callable
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_long, c_size_t, c_void_p
from typing import Any, Final, NamedTuple, TypeAlias

from .openssl_configuration import configuration

__all__ = [
    "Key",
    "LibcryptoError",
    "generate_rsa_2048",
    "generate_sm2",
    "has_oaep",
    "has_sm2",
    "load",
    "oaep",
    "offers",
    "private_key",
    "public_key",
    "version",
    "why_missing",
]

Buffer: TypeAlias = bytearray | memoryview
Options: TypeAlias = tuple[tuple[bytes, bytes], ...]

_LIBRARY_NAMES: Final = ("libcrypto.so.3", "libcrypto.so")
_RSA, _SM2 = b"RSA", b"SM2"
_MIN_VERSION: Final = 0x30000000
_NO_PADDING: Final = ((b"rsa_padding_mode", b"none"),)
_TRIAL_KEY: Final = (
    bytes.fromhex("30820122300d06092a864886f70d01010105000382010f003082010a0282010100")
    + (2**2048 - 159).to_bytes(256, "big")
    + bytes.fromhex("0203010001")
)
"""A public key of RSA, whose modulus has not been factored. It serves to try out encryption."""


class LibcryptoError(Exception):
    """libcrypto is missing or too old, or refused its input. The message contains nothing of the data."""


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library once, and return it. Raises `LibcryptoError` if it is missing, or older than 3.0."""
    for name in _LIBRARY_NAMES:
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        raise LibcryptoError("libcrypto.so.3 was not found; install OpenSSL 3 (Debian: apt-get install libssl3)")
    prototypes: dict[str, tuple[object, list[object]]] = {
        "OpenSSL_version": (c_char_p, [c_int]),
        "OpenSSL_version_num": (ctypes.c_ulong, []),
        "ERR_clear_error": (None, []),
        "d2i_PUBKEY": (c_void_p, [c_void_p, POINTER(c_void_p), c_long]),
        "i2d_PUBKEY": (c_int, [c_void_p, c_void_p]),
        "d2i_AutoPrivateKey": (c_void_p, [c_void_p, POINTER(c_void_p), c_long]),
        "EVP_PKEY2PKCS8": (c_void_p, [c_void_p]),
        "i2d_PKCS8_PRIV_KEY_INFO": (c_int, [c_void_p, c_void_p]),
        "PKCS8_PRIV_KEY_INFO_free": (None, [c_void_p]),
        "EVP_PKEY_get_size": (c_int, [c_void_p]),
        "EVP_PKEY_is_a": (c_int, [c_void_p, c_char_p]),
        "EVP_PKEY_free": (None, [c_void_p]),
        "EVP_PKEY_Q_keygen": (c_void_p, [c_void_p, c_char_p, c_char_p]),  # and a size_t, for RSA
        "EVP_get_digestbyname": (c_void_p, [c_char_p]),
        "OSSL_LIB_CTX_new": (c_void_p, []),
        "OSSL_LIB_CTX_free": (None, [c_void_p]),
        "OSSL_PROVIDER_load": (c_void_p, [c_void_p, c_char_p]),
        "OSSL_PROVIDER_unload": (c_int, [c_void_p]),
        "EVP_KEYMGMT_fetch": (c_void_p, [c_void_p, c_char_p, c_char_p]),
        "EVP_KEYMGMT_free": (None, [c_void_p]),
        "EVP_MD_fetch": (c_void_p, [c_void_p, c_char_p, c_char_p]),
        "EVP_MD_free": (None, [c_void_p]),
        "RSA_padding_check_PKCS1_OAEP_mgf1": (c_int, [*[c_void_p, c_int] * 2, c_int, c_void_p, c_int, *[c_void_p] * 2]),
        "RSA_padding_add_PKCS1_OAEP_mgf1": (c_int, [*[c_void_p, c_int] * 3, *[c_void_p] * 2]),
        "EVP_PKEY_CTX_new": (c_void_p, [c_void_p, c_void_p]),
        "EVP_PKEY_CTX_free": (None, [c_void_p]),
        "EVP_PKEY_CTX_ctrl_str": (c_int, [c_void_p, c_char_p, c_char_p]),
        "EVP_PKEY_encrypt_init": (c_int, [c_void_p]),
        "EVP_PKEY_encrypt": (c_int, [c_void_p, c_void_p, POINTER(c_size_t), c_void_p, c_size_t]),
        "EVP_PKEY_decrypt_init": (c_int, [c_void_p]),
        "EVP_PKEY_decrypt": (c_int, [c_void_p, c_void_p, POINTER(c_size_t), c_void_p, c_size_t]),
    }
    try:
        for function, (result, arguments) in prototypes.items():
            prototype = getattr(library, function)
            prototype.restype, prototype.argtypes = result, arguments
    except AttributeError as error:
        raise LibcryptoError(f"{name} is older than OpenSSL 3.0, which is needed: {error}") from None
    if library.OpenSSL_version_num() < _MIN_VERSION:
        raise LibcryptoError(f"{name} is older than OpenSSL 3.0, which is needed")
    return library


def version() -> str:
    """Return the library's name and version, for the log."""
    return str(load().OpenSSL_version(0), "ascii")


def offers(algorithm: str) -> bool:
    """Return whether this libcrypto, as it is configured, supports keys of a type or a hash: "RSA", "SM2", "SHA-1"."""
    return _is_offered(algorithm, None)


def _is_offered(algorithm: str, context: int | None) -> bool:
    library = load()
    kind = "MD" if algorithm.startswith("SHA") else "KEYMGMT"
    pointer = getattr(library, f"EVP_{kind}_fetch")(context, algorithm.encode(), None)
    if pointer:
        getattr(library, f"EVP_{kind}_free")(pointer)
    library.ERR_clear_error()
    return bool(pointer)


def why_missing(algorithm: str) -> str:
    """Return why this libcrypto does not offer an algorithm ("RSA", "SM2", "SHA-1"): its configuration, or its build.

    A new library context has no configuration, and so offers every algorithm that was built.
    """
    library = load()
    context = library.OSSL_LIB_CTX_new()
    is_built_in = not context  # the configuration stopped libcrypto from starting
    if context:
        provider = library.OSSL_PROVIDER_load(context, b"default")
        is_built_in = _is_offered(algorithm, context)
        if provider:
            library.OSSL_PROVIDER_unload(provider)
        library.OSSL_LIB_CTX_free(context)
    library.ERR_clear_error()
    if is_built_in:
        return f"this OpenSSL's configuration does not offer {algorithm}"
    return f"this system's libcrypto was built without {algorithm}"


class Key:
    """A public or private key inside libcrypto. Safe to use from several threads: each call has a context of its own."""

    __slots__ = ("_contexts", "_library", "_pkey", "_size")

    def __init__(self, pkey: int) -> None:
        self._library = load()
        self._pkey = pkey
        # Contexts that are set up and not in use. To set one up, libcrypto looks up every algorithm by its name, which takes
        # as long as RSA itself. append() and pop() of a list are atomic, with and without the GIL, so each context belongs to
        # one thread at a time. A lock would take 0.3 µs, and a child that was forked while another thread held it would hang.
        self._contexts: dict[tuple[str, Options], list[_Context]] = {}
        # An RSA ciphertext is as long as the modulus. libcrypto returns the length of an SM2 ciphertext for each plaintext.
        self._size = self._library.EVP_PKEY_get_size(pkey) if self.is_a(_RSA) else 0

    def __del__(self) -> None:
        for contexts in self._contexts.values():
            for context in contexts:
                self._library.EVP_PKEY_CTX_free(context.pointer)
        self._library.EVP_PKEY_free(self._pkey)

    def __repr__(self) -> str:
        return "Key(...)"

    def is_a(self, name: bytes) -> bool:
        """Return whether this is a key of the named type: b"RSA", b"SM2"."""
        return bool(self._library.EVP_PKEY_is_a(self._pkey, name) == 1)

    def encrypt(self, plaintext: Buffer, options: Options = ()) -> bytes:
        """Encrypt the buffer's bytes, at least one. Raises `LibcryptoError`."""
        return self.encryptor(options)(plaintext)

    def encryptor(self, options: Options = ()) -> Callable[[Buffer], bytes]:
        """Return a function that encrypts a buffer's bytes, at least one, and is reusable for any number of buffers.

        The function raises `LibcryptoError`.
        """
        function, size = self._library.EVP_PKEY_encrypt, self._size
        contexts = self._contexts.setdefault(("encrypt", options), [])

        def encrypt(plaintext: Buffer) -> bytes:
            if not plaintext:
                raise LibcryptoError("libcrypto could not encrypt")
            context = self._context("encrypt", options, contexts)
            pointer, out, out_address, used_bytes, used_address = context
            length, address = len(plaintext), _reference(plaintext)
            used_bytes.value = size
            if (
                not size
            ):  # libcrypto's SM2 does not check the size of the buffer, so the buffer has the size that it returns
                if function(pointer, None, used_address, address, length) <= 0:
                    raise self._failed("encrypt", context)
                out = bytearray(used_bytes.value)
                out_address = _reference(out)
            if function(pointer, out_address, used_address, address, length) <= 0:
                raise self._failed("encrypt", context)
            contexts.append(context)
            return bytes(out) if used_bytes.value == len(out) else bytes(out[: used_bytes.value])

        return encrypt

    def oaep_encryptor(self, digest: bytes) -> Callable[[Buffer, Buffer], bytes]:
        """Return a function that encrypts with RSAES-OAEP (RFC 8017; MGF1 with the same hash, empty label).

        The function takes the plaintext, and a buffer as long as the modulus, which the caller wipes. It pads in that buffer,
        and encrypts in a second step. In one step, libcrypto would free the padded message, which shows the plaintext, without
        wiping it. The function raises `LibcryptoError`.
        """
        library, size, hashes = self._library, self._size, 2 * (_digest(digest),)
        pad, encrypt = library.RSA_padding_add_PKCS1_OAEP_mgf1, self.encryptor(_NO_PADDING)

        def oaep_encrypt(plaintext: Buffer, padded: Buffer) -> bytes:
            count = len(plaintext) if len(padded) == size else 0  # libcrypto does not check the size of its output
            if not count or pad(_reference(padded), size, _reference(plaintext), count, None, 0, *hashes) != 1:
                library.ERR_clear_error()
                raise LibcryptoError("libcrypto could not encrypt")
            return encrypt(padded)

        return oaep_encrypt

    def decrypt_into(self, ciphertext: Buffer, out: Buffer, options: Options = ()) -> int:
        """Decrypt into `out`, and return the number of bytes written. Raises the same `LibcryptoError` for every fault."""
        if not (ciphertext and out):  # without an output buffer, libcrypto would return the length and succeed
            raise LibcryptoError("libcrypto could not decrypt")
        function, contexts = self._library.EVP_PKEY_decrypt, self._contexts.setdefault(("decrypt", options), [])
        context, used_bytes = self._context("decrypt", options, contexts), c_size_t(len(out))
        if function(context.pointer, _address(out), byref(used_bytes), _address(ciphertext), len(ciphertext)) <= 0:
            raise self._failed("decrypt", context)
        contexts.append(context)
        return used_bytes.value

    def decrypt_oaep_into(self, ciphertext: Buffer, padded: Buffer, out: Buffer, digest: bytes) -> int:
        """Decrypt RSAES-OAEP (RFC 8017; MGF1 with the same hash, empty label) into `out`, and return the number of bytes.

        The decryption takes two steps. In one step, libcrypto would free the padded message, which shows the plaintext, without
        wiping it. Here the message stays in `padded`, a buffer as long as the modulus, which the caller wipes. Raises the same
        `LibcryptoError` for every fault.
        """
        size = self.decrypt_into(ciphertext, padded, _NO_PADDING)
        library = self._library
        algorithm = _digest(digest)
        plaintext: int = library.RSA_padding_check_PKCS1_OAEP_mgf1(
            _address(out), len(out), _address(padded), size, size, None, 0, algorithm, algorithm
        )
        if plaintext < 0:
            library.ERR_clear_error()
            raise LibcryptoError("libcrypto could not decrypt")
        return plaintext

    def public_der(self) -> bytes:
        """Return the public key as DER SubjectPublicKeyInfo."""
        return bytes(_der(self._library.i2d_PUBKEY, self._pkey))

    def private_der(self) -> bytearray:
        """Return the private key as DER PKCS #8 PrivateKeyInfo, in a buffer that the caller wipes. Raises `LibcryptoError`."""
        info = self._library.EVP_PKEY2PKCS8(self._pkey)
        if not info:
            raise LibcryptoError("the key is not a private key")
        try:
            return _der(self._library.i2d_PKCS8_PRIV_KEY_INFO, info)
        finally:
            self._library.PKCS8_PRIV_KEY_INFO_free(info)

    def _context(self, verb: str, options: Options, contexts: "list[_Context]") -> "_Context":
        try:
            return contexts.pop()
        except IndexError:
            return self._set_up(verb, options)

    def _failed(self, verb: str, context: "_Context") -> LibcryptoError:
        self._library.EVP_PKEY_CTX_free(context.pointer)
        self._library.ERR_clear_error()
        return LibcryptoError(f"libcrypto could not {verb}")

    def _set_up(self, verb: str, options: Options) -> "_Context":
        library = self._library
        context: int | None = library.EVP_PKEY_CTX_new(self._pkey, None)
        try:
            if not context or getattr(library, f"EVP_PKEY_{verb}_init")(context) <= 0:
                raise LibcryptoError(f"this libcrypto cannot {verb} with such a key")
            for name, value in options:
                if library.EVP_PKEY_CTX_ctrl_str(context, name, value) <= 0:
                    raise LibcryptoError(f"this libcrypto refuses {name.decode()}={value.decode()}")
        except LibcryptoError:
            library.EVP_PKEY_CTX_free(context)
            library.ERR_clear_error()
            raise
        out, used_bytes = bytearray(self._size if verb == "encrypt" else 0), c_size_t()
        return _Context(c_void_p(context), out, _reference(out) if out else None, used_bytes, byref(used_bytes))


class _Context(NamedTuple):
    """A context of libcrypto and its output buffers. One thread uses it at a time."""

    pointer: c_void_p
    out: bytearray
    out_address: Any
    used: c_size_t
    used_address: Any


def public_key(der: bytes) -> Key:
    """Load a DER SubjectPublicKeyInfo, which the caller has already parsed strictly. Raises `LibcryptoError`."""
    return _load("d2i_PUBKEY", bytearray(der), "public")


def private_key(der: Buffer) -> Key:
    """Load a DER PKCS #8 PrivateKeyInfo. Raises `LibcryptoError`."""
    return _load("d2i_AutoPrivateKey", der, "private")


def oaep(digest: bytes) -> Options:
    """Return the options of RSAES-OAEP with MGF1 over the same hash (b"sha256") and an empty label (RFC 8017)."""
    return ((b"rsa_padding_mode", b"oaep"), (b"rsa_oaep_md", digest), (b"rsa_mgf1_md", digest))


def generate_rsa_2048() -> Key:
    """Generate an RSA key pair of 2,048 bits, with the exponent 65537. Raises `LibcryptoError`."""
    pkey = load().EVP_PKEY_Q_keygen(None, None, _RSA, c_size_t(2_048))
    load().ERR_clear_error()
    if not pkey:
        raise LibcryptoError(f"a key pair cannot be generated without RSA: {why_missing('RSA')} ({configuration()})")
    return Key(pkey)


def generate_sm2() -> Key:
    """Generate an SM2 key pair. Raises `LibcryptoError` where this libcrypto lacks SM2 (Fedora and RHEL build without it)."""
    pkey = load().EVP_PKEY_Q_keygen(None, None, _SM2) if has_sm2() else None
    if not pkey:
        raise LibcryptoError(f"a key pair cannot be generated without SM2: {why_missing('SM2')} ({configuration()})")
    return Key(pkey)


@functools.cache
def has_oaep(digest: bytes) -> bool:
    """Return whether this libcrypto encrypts with RSAES-OAEP and a hash. It tries: the version number does not suffice."""
    try:
        public_key(_TRIAL_KEY).oaep_encryptor(digest)(bytearray(1), bytearray(256))
    except LibcryptoError:
        return False
    return True


@functools.cache
def has_sm2() -> bool:
    """Return whether this libcrypto supports SM2. It generates a key: the version number does not suffice."""
    library = load()
    pkey = library.EVP_PKEY_Q_keygen(None, None, _SM2)
    if not pkey:
        library.ERR_clear_error()
        return False
    return Key(pkey).is_a(_SM2)


@functools.cache
def _digest(name: bytes) -> int:
    """Return a hash of libcrypto, fetched once: by its name alone, libcrypto would look it up for each call of it."""
    library = load()
    algorithm: int | None = library.EVP_MD_fetch(None, name, None)
    if not algorithm:
        library.ERR_clear_error()
        raise LibcryptoError(f"this libcrypto offers no {name.decode()}")
    return algorithm


def _load(function: str, der: Buffer, kind: str) -> Key:
    library = load()
    if not der:
        raise LibcryptoError(f"the {kind} key is empty")
    end = c_void_p(_address(der))
    pkey = getattr(library, function)(None, byref(end), len(der))
    if not pkey:
        library.ERR_clear_error()
        raise LibcryptoError(f"libcrypto does not accept this {kind} key")
    return Key(pkey)


def _der(encode: Any, pointer: int) -> bytearray:
    size = encode(pointer, None)
    if size <= 0:
        raise LibcryptoError("libcrypto could not encode the key")
    out = bytearray(size)
    cursor = c_void_p(_address(out))  # libcrypto moves the pointer to the end of its output
    encode(pointer, byref(cursor))
    return out


def _reference(buffer: Buffer) -> Any:
    return byref(c_char.from_buffer(buffer))


def _address(buffer: Buffer) -> int:
    return ctypes.addressof(c_char.from_buffer(buffer))
