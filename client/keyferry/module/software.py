"""A cryptographic module in software: the private key and the data keys are in this process.

Protected: data keys, and the padded messages that contain them, are in locked memory if the system provides it. They are never
Python objects, and the API cannot read them out. Between calls, this process's ordinary memory does not contain them.

Not protected: the private key is in libcrypto's ordinary memory, and so are copies that libraries make when it is loaded or
saved. An attacker who can read this process's memory, or the file and its passphrase, has the private key. Use a PKCS#11 token
against that.
"""

import contextlib
import io
import os
import weakref
from collections.abc import Iterator
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from .. import age_passphrase, content, libcrypto, new_files, openssl_configuration, private_files
from .. import passphrase as passphrases
from ..parameters import decode_base64, encode_base64
from ..secret import Secret, SecretMemory, SecretMemoryError
from ..sm2_ciphertext import RAW_OVERHEAD, raw_to_der
from .interface import (
    NONCE_SIZE,
    NOT_AUTHENTIC,
    NOT_HELD,
    NOT_OURS,
    TAG,
    CryptographicModule,
    DataKey,
    ModuleError,
    check_size,
)

_BUFFER_BYTES: Final = 256
"""Bytes of the output buffer that libcrypto requires for decryption: the size of an RSA-2048 modulus."""
_MEMORY_BYTES: Final = 16 * 1024
"""Bytes of locked memory to allocate at a time: 512 keys of 32 bytes."""


class SoftwareModule(CryptographicModule):
    """A private key and data keys in this process, made with `generate` or `load`."""

    def __init__(self, private_key: libcrypto.Key) -> None:
        self._private_key = private_key
        sm2 = private_key.is_a(b"SM2")
        self.wrapping_key_spec = "EC_SM2" if sm2 else "RSA_2048"
        self.wrapping_algorithm = "SM2PKE" if sm2 else "RSAES_OAEP_SHA_256"
        self._public_key_blob = encode_base64(private_key.public_der())
        self._keys: weakref.WeakKeyDictionary[DataKey, Secret] = weakref.WeakKeyDictionary()
        self._memory: list[SecretMemory] = []

    def __repr__(self) -> str:
        return f"SoftwareModule({self.wrapping_key_spec})"

    @classmethod
    def generate(cls, key_spec: str = "RSA_2048") -> Self:
        """Generate a key pair: "RSA_2048" or "EC_SM2". Raises ValueError, or `ModuleError` if libcrypto lacks RSA or SM2."""
        generate = {"RSA_2048": libcrypto.generate_rsa_2048, "EC_SM2": libcrypto.generate_sm2}.get(key_spec)
        if generate is None:
            raise ValueError(f"RSA_2048 or EC_SM2 is expected, not {key_spec!r}")
        try:
            return cls(generate())
        except libcrypto.LibcryptoError as error:
            raise ModuleError(str(error)) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], passphrase: str) -> Self:
        """Load a module that `save` wrote.

        Raises OSError, or `ModuleError` for a wrong passphrase, a damaged file, or a file that other users can read or write.
        """
        with open(path, "rb") as file:
            try:
                private_files.check(file.fileno(), path, secret=True, owners=None)
            except private_files.PrivateFileError as error:
                raise ModuleError(str(error)) from None
            sealed_bytes = file.read()
        try:
            der = age_passphrase.unseal(sealed_bytes, passphrase)
        except age_passphrase.PassphraseError as error:
            raise ModuleError(f"{os.fspath(path)}: not a module file, or it does not open: {error}") from None
        try:
            key = libcrypto.private_key(der)
            algorithm = "SM2" if key.is_a(b"SM2") else "RSA"
        except libcrypto.LibcryptoError:
            is_key = content.der_kind(bytes(der)) == content.DER_KEY
            missing_algorithms = [name for name in ("RSA", "SM2") if is_key and not libcrypto.offers(name)]
            if not missing_algorithms:
                raise ModuleError(f"{os.fspath(path)}: not a module file") from None
            algorithm = missing_algorithms[0]
        finally:
            der[:] = bytes(len(der))
        if not libcrypto.offers(algorithm):  # libcrypto may have loaded the key, although it cannot use it
            raise ModuleError(
                f"{os.fspath(path)}: nothing works with its private key: {libcrypto.why_missing(algorithm)} "
                f"({openssl_configuration.configuration()})"
            )
        return cls(key)

    def save(self, path: str | os.PathLike[str], passphrase: str) -> None:
        """Write the private key to a new file of mode 0600: PKCS #8, sealed to the passphrase in age's format.

        The work factor is always `keyferry.age_passphrase.WORK_FACTOR`. Data keys are not saved: their data-key records recover
        them. An existing file is never replaced, and the new file appears atomically. Raises OSError, `ModuleError` if memory
        is short, or ValueError for a passphrase that is empty, that looks like a key, a recipient or a comment, or that has
        more than one line.
        """
        new_files.create(path, self.sealed(passphrase))

    def sealed(self, passphrase: str) -> bytes:
        """Return the bytes of the file that `save` writes. Raises ValueError, or `ModuleError` if memory is short."""
        passphrases.check(passphrase)
        der = self._private_key.private_der()
        try:
            return age_passphrase.seal(der, passphrase)
        except age_passphrase.PassphraseError as error:
            raise ModuleError(str(error)) from None
        finally:
            der[:] = bytes(len(der))

    @property
    def public_key_blob(self) -> str:
        return self._public_key_blob

    def import_data_key(self, exported_data_key: str | bytes) -> DataKey:
        try:
            wrapped_key = decode_base64(exported_data_key) if isinstance(exported_data_key, str) else exported_data_key
            sm2 = self.wrapping_key_spec == "EC_SM2"
            if sm2:
                if len(wrapped_key) - RAW_OVERHEAD > _BUFFER_BYTES:
                    check_size(len(wrapped_key) - RAW_OVERHEAD)
                wrapped_key = raw_to_der(wrapped_key)
        except ValueError:
            raise ModuleError(NOT_OURS) from None
        scratch = self._allocate(2 * _BUFFER_BYTES)
        try:
            with scratch.lend() as buffer:
                out, padding_buffer = buffer[:_BUFFER_BYTES], buffer[_BUFFER_BYTES:]
                if sm2:
                    size = self._private_key.decrypt_into(bytearray(wrapped_key), out)
                else:
                    size = self._private_key.decrypt_oaep_into(bytearray(wrapped_key), padding_buffer, out, b"sha256")
                check_size(size)
                secret = self._allocate(size)
                with secret.lend() as data_key:
                    data_key[:] = out[:size]
        except libcrypto.LibcryptoError:
            raise ModuleError(NOT_OURS) from None
        finally:
            scratch.free()
        key = DataKey()
        self._keys[key] = secret
        weakref.finalize(key, secret.free)
        return key

    def encrypt(self, key: DataKey, plaintext: bytes, aad: bytes = b"") -> bytes:
        nonce = os.urandom(NONCE_SIZE)
        # Encrypted directly into the returned buffer: to prepend the nonce afterwards would copy the ciphertext, and another
        # megabyte of fresh memory takes four times as long as AES.
        out = io.BytesIO(bytes(NONCE_SIZE + len(plaintext) + TAG))
        with self._lent(key) as data_key, out.getbuffer() as buffer:
            buffer[:NONCE_SIZE] = nonce
            AESGCM(data_key).encrypt_into(nonce, plaintext, aad, buffer[NONCE_SIZE:])
        return out.getvalue()

    def decrypt(self, key: DataKey, sealed: bytes, aad: bytes = b"") -> bytes:
        if len(sealed) < NONCE_SIZE + TAG:
            raise ModuleError(NOT_AUTHENTIC)
        view = memoryview(sealed)
        with self._lent(key) as data_key:
            try:
                return AESGCM(data_key).decrypt(view[:NONCE_SIZE], view[NONCE_SIZE:], aad)
            except InvalidTag:
                raise ModuleError(NOT_AUTHENTIC) from None

    def forget(self, key: DataKey) -> None:
        secret = self._keys.pop(key, None)
        if secret is None:
            raise ModuleError(NOT_HELD)
        secret.free()  # a thread that is encrypting with it finishes first

    @contextlib.contextmanager
    def _lent(self, key: DataKey) -> Iterator[memoryview]:
        with contextlib.ExitStack() as stack:
            try:
                data_key = stack.enter_context(self._keys[key].lend())
            except (KeyError, SecretMemoryError):
                raise ModuleError(NOT_HELD) from None
            yield data_key

    def _allocate(self, size: int) -> Secret:
        for memory in reversed(self._memory):
            with contextlib.suppress(SecretMemoryError):
                return memory.allocate(size)
        # Not memfd_secret: a forked child shares such memory, and its `forget` would wipe the parent's key too.
        self._memory.append(SecretMemory(_MEMORY_BYTES, backing="mlock", require=False))
        return self._memory[-1].allocate(size)
