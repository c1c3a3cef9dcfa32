"""Data keys for a cryptographic module: GenerateAndExportDataKey, ExportDataKey. No answer contains a plaintext data key."""

from typing import NamedTuple

from keyferry import operations
from keyferry.errors import invalid_parameter, kms_error
from keyferry.parameters import (
    CIPHERTEXT_BLOB,
    DRY_RUN,
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
from .common import (
    BlobEncryptor,
    Job,
    Request,
    find_key,
    find_version,
    open_blob,
    plaintext_size,
    require_usable,
    sealing,
    would_succeed,
)
from .data_keys import data_key_size

__all__ = ["export_data_key", "generate_and_export_data_key"]


def generate_and_export_data_key(request: Request) -> Job:
    """Prepare a fresh data key, which the answer contains encrypted under the master key and wrapped for the module."""
    size, context = data_key_size(request), request.context()
    recipient = _recipient(request)
    _fits(recipient, size, NUMBER_OF_BYTES.name)
    key = find_key(request, KEY_ID, pin=recipient.pin, context=context)
    require_usable(key)
    version, scratch = key.primary, request.agent.scratch
    request.audited.key_version_id = version.version_id
    if request.values.get(DRY_RUN):
        raise would_succeed()
    making = _Making(key, size, sealing(key, version, context, scratch), recipient, scratch)
    return Job(
        making.run,
        recipient.wrapping.slow,
        key.enabled,
        repeatable=True,
    )


class _Making(NamedTuple):
    """The parameters of the job of GenerateAndExportDataKey.

    A NamedTuple, not a closure: it is cached for each request that may be repeated, and the garbage collector scans fewer
    objects.
    """

    key: Key
    size: int
    seal: BlobEncryptor
    recipient: wrapping.Recipient
    scratch: SecretMemory

    def run(self) -> operations.GenerateAndExportDataKeyResult:
        """Generate a data key, encrypt it under the master key, and wrap it for the module."""
        with self.scratch.borrow(self.size) as data_key:
            fill_random(data_key)
            blob = self.seal(data_key)
            exported = self.recipient.wrap(data_key)
        return operations.GenerateAndExportDataKeyResult(
            self.key.key_id, self.key.primary.version_id, encode_base64(blob), encode_base64(exported)
        )


def export_data_key(request: Request) -> Job:
    """Prepare the decryption of a data key and its wrapping for the module."""
    blob, context = request.values.need(CIPHERTEXT_BLOB), request.context()
    recipient = _recipient(request)
    key, version = find_version(request, blob, pin=recipient.pin, context=context)
    require_usable(key, version)
    scratch, dry_run = request.agent.scratch, request.values.get(DRY_RUN)

    def run() -> "operations.ExportDataKeyResult":
        size = plaintext_size(blob)
        with scratch.borrow(size) as data_key:
            open_blob(key, version, context, blob, data_key, scratch)
            _fits(
                recipient, size, CIPHERTEXT_BLOB.name
            )  # after decryption: a damaged blob gets the error for damage, not one for its size
            if dry_run:
                raise would_succeed()
            exported = recipient.wrap(data_key)
        return operations.ExportDataKeyResult(key.key_id, version.version_id, encode_base64(exported))

    return Job(run, recipient.wrapping.slow, key.enabled)


def _recipient(request: Request) -> wrapping.Recipient:
    """Return the checked public key for which the data key is to be wrapped. Raises `KmsError`."""
    values = request.values
    way = wrapping.find(values.need(WRAPPING_KEY_SPEC), values.need(WRAPPING_ALGORITHM))
    if way is None:
        raise invalid_parameter(
            WRAPPING_ALGORITHM.name, f"it does not go with this WrappingKeySpec; there are {wrapping.pairs()}."
        )
    try:
        recipient = wrapping.recipient(
            way, values.need(PUBLIC_KEY_BLOB), sm2_fallback=request.agent.settings.sm2_fallback == "gmssl"
        )
    except PublicKeyError as error:
        raise invalid_parameter(PUBLIC_KEY_BLOB.name, str(error)) from None
    except wrapping.WrappingError as error:
        raise kms_error("UnsupportedOperation", str(error)) from None
    request.audited.recipient = recipient.pin
    return recipient


def _fits(recipient: wrapping.Recipient, size: int, name: str) -> None:
    """Raise `KmsError` if the data key is too long for the wrapping. `name`: the parameter that determines the size."""
    way = recipient.wrapping
    if size > way.capacity:
        raise invalid_parameter(name, f"the data key has {size} bytes; {way.name} carries at most {way.capacity}.")
