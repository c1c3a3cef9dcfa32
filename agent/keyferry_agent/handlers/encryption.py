"""Encryption of small plaintexts under a master key: Encrypt, Decrypt, ReEncrypt."""

from typing import Final

from keyferry import operations
from keyferry.parameters import (
    CIPHERTEXT_BLOB,
    DESTINATION_ENCRYPTION_CONTEXT,
    DESTINATION_KEY_ID,
    KEY_ID,
    SOURCE_ENCRYPTION_CONTEXT,
    encode_base64,
)
from keyferry.parameters import PLAINTEXT as PLAINTEXT_PARAMETER

from ..authz.grants import PLAINTEXT
from .common import (
    BlobDecryptor,
    BlobEncryptor,
    Job,
    Request,
    authorize,
    find_key,
    find_version,
    no_permission,
    require_usable,
)

__all__ = ["decrypt", "encrypt", "re_encrypt"]

_FROM: Final = "kms:ReEncryptFrom"
_TO: Final = "kms:ReEncryptTo"


def encrypt(request: Request) -> Job:
    """Prepare the encryption of the plaintext in the request.

    The caller chooses the plaintext, and ExportDataKey would export it. So a grant with recipients does not cover Encrypt.
    """
    plaintext, context = request.values.need(PLAINTEXT_PARAMETER), request.context()
    key = find_key(request, KEY_ID, fingerprint=PLAINTEXT, context=context)
    require_usable(key)
    version, encryptor = key.primary, BlobEncryptor.of(request, key, context)
    request.key_version_id = version.version_id

    def run() -> operations.EncryptResult:
        blob = encryptor.encrypt(memoryview(plaintext))
        return operations.EncryptResult(key.key_id, version.version_id, encode_base64(blob))

    return Job(run)


def decrypt(request: Request) -> Job:
    """Prepare the decryption of a blob; the answer contains the plaintext."""
    blob, context = request.values.need(CIPHERTEXT_BLOB), request.context()
    key, version = find_version(request, blob, fingerprint=PLAINTEXT, context=context)
    require_usable(key, version)
    decryptor = BlobDecryptor(key, version, context, blob, request.agent.scratch)

    def run() -> operations.DecryptResult:
        with decryptor.scratch.borrow(decryptor.size) as plaintext:
            decryptor.decrypt_into(plaintext)
            return operations.DecryptResult(key.key_id, version.version_id, encode_base64(plaintext))

    return Job(run, verify=decryptor.verify)


def re_encrypt(request: Request) -> Job:
    """Prepare the decryption of a blob and the encryption of its plaintext again; the caller never has the plaintext."""
    blob = request.values.need(CIPHERTEXT_BLOB)
    old_context, new_context = (
        request.context(SOURCE_ENCRYPTION_CONTEXT),
        request.context(DESTINATION_ENCRYPTION_CONTEXT),
    )
    if not request.caller.granted.with_action(_TO):
        raise no_permission()  # before any error reveals something about the blob
    source, source_version = find_version(request, blob, action=_FROM, context=old_context)
    destination = find_key(request, DESTINATION_KEY_ID, action=_TO, context=new_context)
    # Under another key or another EncryptionContext, other grants decide which callers get the plaintext. ReEncrypt must not
    # bypass the recipients of a grant. Nor must a plaintext that the caller chose under another key become a data key under
    # this one.
    is_unchanged = destination.key_id == source.key_id and new_context == old_context
    authorize(request, destination, _TO, fingerprint=None if is_unchanged else PLAINTEXT, context=new_context)
    authorize(request, source, _FROM, fingerprint=None if is_unchanged else PLAINTEXT, context=old_context)
    require_usable(source, source_version)
    require_usable(destination)
    primary = destination.primary
    request.destination_key_id = destination.key_id
    request.destination_key_version_id = primary.version_id
    decryptor = BlobDecryptor(source, source_version, old_context, blob, request.agent.scratch)
    encryptor = BlobEncryptor.of(request, destination, new_context)

    def run() -> operations.ReEncryptResult:
        with decryptor.scratch.borrow(decryptor.size) as plaintext:
            decryptor.decrypt_into(plaintext)
            new_blob = encryptor.encrypt(plaintext)
        return operations.ReEncryptResult(
            key_id=source.key_id,
            key_version_id=source_version.version_id,
            destination_key_id=destination.key_id,
            destination_key_version_id=primary.version_id,
            ciphertext_blob=encode_base64(new_blob),
        )

    return Job(run, verify=decryptor.verify)
