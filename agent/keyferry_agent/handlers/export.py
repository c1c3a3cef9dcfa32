"""Data keys for a cryptographic module: GenerateAndExportDataKey, ExportDataKey. No answer contains a plaintext data key."""

from typing import NamedTuple

from keyferry import operations
from keyferry.errors import invalid_parameter, kms_error
from keyferry.parameters import (
    CIPHERTEXT_BLOB,
    KEY_ID,
    NUMBER_OF_BYTES,
    PUBLIC_KEY_BLOB,
    WRAPPING_ALGORITHM,
    WRAPPING_KEY_SPEC,
    encode_base64,
)
from keyferry.secret import SecretMemory, fill_random

from ..crypto import wrapping
from ..crypto.public_key import PublicKeyError
from ..keyring.keyring import Key
from .common import BlobDecryptor, BlobEncryptor, Job, Request, find_key, find_version, require_usable
from .data_keys import data_key_size

__all__ = ["export_data_key", "generate_and_export_data_key"]


def generate_and_export_data_key(request: Request) -> Job:
    """Prepare a fresh data key, which the answer contains encrypted under the master key and wrapped for the module."""
    size, context = data_key_size(request), request.context()
    recipient = _recipient(request)
    _check_capacity(recipient, size, NUMBER_OF_BYTES.name)
    key = find_key(request, KEY_ID, fingerprint=recipient.fingerprint, context=context)
    require_usable(key)
    request.key_version_id = key.primary.version_id
    generation = _DataKeyGeneration(
        key, size, BlobEncryptor.of(request, key, context), recipient, request.agent.scratch
    )
    return Job(generation.run, recipient.wrapping.offload, key.enabled, repeatable=True)


class _DataKeyGeneration(NamedTuple):
    """The parameters of the job of GenerateAndExportDataKey.

    A NamedTuple, not a closure: it is cached for each request that may be repeated, and the garbage collector scans fewer
    objects.
    """

    key: Key
    size: int
    encryptor: BlobEncryptor
    recipient: wrapping.Recipient
    scratch: SecretMemory

    def run(self) -> operations.GenerateAndExportDataKeyResult:
        """Generate a data key, encrypt it under the master key, and wrap it for the module."""
        with self.scratch.borrow(self.size) as data_key:
            fill_random(data_key)
            blob = self.encryptor.encrypt(data_key)
            wrapped_key = self.recipient.wrap(data_key, self.scratch)
        return operations.GenerateAndExportDataKeyResult(
            self.key.key_id, self.key.primary.version_id, encode_base64(blob), encode_base64(wrapped_key)
        )


def export_data_key(request: Request) -> Job:
    """Prepare the decryption of a data key and its wrapping for the module."""
    blob, context = request.values.need(CIPHERTEXT_BLOB), request.context()
    recipient = _recipient(request)
    key, version = find_version(request, blob, fingerprint=recipient.fingerprint, context=context)
    require_usable(key, version)
    decryptor = BlobDecryptor(key, version, context, blob, request.agent.scratch)

    # The capacity is checked after the decryption: a damaged blob gets the error for damage, not one for its size.
    def verify() -> None:
        decryptor.verify()
        _check_capacity(recipient, decryptor.size, CIPHERTEXT_BLOB.name)

    def run() -> operations.ExportDataKeyResult:
        with decryptor.scratch.borrow(decryptor.size) as data_key:
            decryptor.decrypt_into(data_key)
            _check_capacity(recipient, decryptor.size, CIPHERTEXT_BLOB.name)
            wrapped_key = recipient.wrap(data_key, decryptor.scratch)
        return operations.ExportDataKeyResult(key.key_id, version.version_id, encode_base64(wrapped_key))

    return Job(run, recipient.wrapping.offload, key.enabled, verify=verify)


def _recipient(request: Request) -> wrapping.Recipient:
    """Return the checked public key for which the data key is to be wrapped. Raises `KmsError`."""
    values = request.values
    algorithm = wrapping.find(values.need(WRAPPING_KEY_SPEC), values.need(WRAPPING_ALGORITHM))
    if algorithm is None:
        raise invalid_parameter(
            WRAPPING_ALGORITHM.name, f"it does not go with this WrappingKeySpec; there are {wrapping.pairs()}."
        )
    try:
        recipient = wrapping.recipient(
            algorithm, values.need(PUBLIC_KEY_BLOB), sm2_fallback=request.agent.settings.sm2_fallback == "gmssl"
        )
    except PublicKeyError as error:
        raise invalid_parameter(PUBLIC_KEY_BLOB.name, str(error)) from None
    except wrapping.WrappingError as error:
        raise kms_error("UnsupportedOperation", str(error)) from None
    request.recipient = recipient.fingerprint
    return recipient


def _check_capacity(recipient: wrapping.Recipient, size: int, name: str) -> None:
    """Raise `KmsError` if the data key is too long for the wrapping. `name`: the parameter that determines the size."""
    algorithm = recipient.wrapping
    if size > algorithm.capacity:
        raise invalid_parameter(
            name, f"the data key has {size} bytes; {algorithm.name} carries at most {algorithm.capacity}."
        )
