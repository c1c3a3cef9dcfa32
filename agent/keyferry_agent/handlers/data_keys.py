"""Data keys for the caller itself: GenerateDataKey, GenerateDataKeyWithoutPlaintext."""

from typing import Final

from keyferry import operations
from keyferry.parameters import DATA_KEY_SPECS, KEY_ID, KEY_SPEC, NUMBER_OF_BYTES, encode_base64
from keyferry.secret import fill_random

from ..authz.grants import PLAINTEXT
from .common import BlobEncryptor, Job, Request, find_key, require_usable

__all__ = ["data_key_size", "generate_data_key", "generate_data_key_without_plaintext"]

_DEFAULT_SIZE: Final = DATA_KEY_SPECS["AES_256"]


def data_key_size(request: Request) -> int:
    """Return the size of the requested data key, in bytes."""
    return request.values.get(NUMBER_OF_BYTES) or request.values.get(KEY_SPEC) or _DEFAULT_SIZE


def generate_data_key(request: Request) -> Job:
    """Prepare a fresh data key, which the answer contains in plaintext and encrypted."""
    return _generate(request, plaintext=True)


def generate_data_key_without_plaintext(request: Request) -> Job:
    """Prepare a fresh data key, which the answer contains only encrypted."""
    return _generate(request, plaintext=False)


def _generate(request: Request, *, plaintext: bool) -> Job:
    size, context = data_key_size(request), request.context()
    key = find_key(request, KEY_ID, fingerprint=PLAINTEXT if plaintext else None, context=context)
    require_usable(key)
    version, scratch = key.primary, request.agent.scratch
    request.key_version_id = version.version_id
    encryptor = BlobEncryptor.of(request, key, context)

    def run() -> "operations.GenerateDataKeyResult | operations.GenerateDataKeyWithoutPlaintextResult":
        with scratch.borrow(size) as data_key:
            fill_random(data_key)
            blob = encode_base64(encryptor.encrypt(data_key))
            if plaintext:
                return operations.GenerateDataKeyResult(key.key_id, version.version_id, blob, encode_base64(data_key))
        return operations.GenerateDataKeyWithoutPlaintextResult(key.key_id, version.version_id, blob)

    return Job(run, holds=key.enabled, repeatable=True)
