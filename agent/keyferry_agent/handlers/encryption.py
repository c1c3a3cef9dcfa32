"""Encryption of small plaintexts under a master key: Encrypt, Decrypt, ReEncrypt."""

from typing import Final

from keyferry import operations
from keyferry.parameters import (
    CIPHERTEXT_BLOB,
    DESTINATION_ENCRYPTION_CONTEXT,
    DESTINATION_KEY_ID,
    DRY_RUN,
    KEY_ID,
    SOURCE_ENCRYPTION_CONTEXT,
    encode_base64,
)
from keyferry.parameters import PLAINTEXT as PLAINTEXT_PARAMETER

from ..authz.grants import PLAINTEXT
from .common import (
    Job,
    Request,
    authorize,
    find_key,
    find_version,
    no_permission,
    open_blob,
    plaintext_size,
    require_usable,
    sealing,
    would_succeed,
)

__all__ = ["decrypt", "encrypt", "re_encrypt"]

_FROM: Final = "kms:ReEncryptFrom"
_TO: Final = "kms:ReEncryptTo"


def encrypt(request: Request) -> Job:
    """Prepare the encryption of the plaintext in the request.

    The caller chooses the plaintext, and ExportDataKey would export it. So a grant with recipients does not cover Encrypt.
    """
    plaintext, context = request.values.need(PLAINTEXT_PARAMETER), request.context()
    key = find_key(request, KEY_ID, pin=PLAINTEXT, context=context)
    require_usable(key)
    version, scratch = key.primary, request.agent.scratch
    request.audited.key_version_id = version.version_id
    if request.values.get(DRY_RUN):
        raise would_succeed()
    seal = sealing(key, version, context, scratch)

    def run() -> operations.EncryptResult:
        blob = seal(memoryview(plaintext))
        return operations.EncryptResult(key.key_id, version.version_id, encode_base64(blob))

    return Job(run)


def decrypt(request: Request) -> Job:
    """Prepare the decryption of a blob; the answer contains the plaintext."""
    blob, context = request.values.need(CIPHERTEXT_BLOB), request.context()
    key, version = find_version(request, blob, pin=PLAINTEXT, context=context)
    require_usable(key, version)
    scratch, dry_run = request.agent.scratch, request.values.get(DRY_RUN)

    def run() -> operations.DecryptResult:
        with scratch.borrow(plaintext_size(blob)) as plaintext:
            open_blob(key, version, context, blob, plaintext, scratch)
            if dry_run:
                raise would_succeed()
            return operations.DecryptResult(key.key_id, version.version_id, encode_base64(plaintext))

    return Job(run)


def re_encrypt(request: Request) -> Job:
    """Prepare the decryption of a blob and the encryption of its plaintext again; the caller never has the plaintext."""
    blob = request.values.need(CIPHERTEXT_BLOB)
    old_context, new_context = (
        request.context(SOURCE_ENCRYPTION_CONTEXT),
        request.context(DESTINATION_ENCRYPTION_CONTEXT),
    )
    if not request.caller.granted.with_action(_TO):
        raise no_permission()  # before any error reveals something about the blob
    source, old = find_version(request, blob, action=_FROM, context=old_context)
    destination = find_key(request, DESTINATION_KEY_ID, action=_TO, context=new_context)
    # Under another key or another EncryptionContext, other grants decide which callers get the plaintext. ReEncrypt must not
    # bypass the recipients of a grant. Nor must a plaintext that the caller chose under another key become a data key under
    # this one.
    stays = destination.key_id == source.key_id and new_context == old_context
    authorize(request, destination, _TO, pin=None if stays else PLAINTEXT, context=new_context)
    authorize(request, source, _FROM, pin=None if stays else PLAINTEXT, context=old_context)
    require_usable(source, old)
    require_usable(destination)
    new, scratch, dry_run = destination.primary, request.agent.scratch, request.values.get(DRY_RUN)
    request.audited.destination_key_id = destination.key_id
    request.audited.destination_key_version_id = new.version_id
    seal = sealing(destination, new, new_context, scratch)

    def run() -> operations.ReEncryptResult:
        with scratch.borrow(plaintext_size(blob)) as plaintext:
            open_blob(source, old, old_context, blob, plaintext, scratch)
            if dry_run:
                raise would_succeed()
            sealed = seal(plaintext)
        return operations.ReEncryptResult(
            key_id=source.key_id,
            key_version_id=old.version_id,
            destination_key_id=destination.key_id,
            destination_key_version_id=new.version_id,
            ciphertext_blob=encode_base64(sealed),
        )

    return Job(run)
