"""Moves every record to its master key's primary version by ReEncrypt. No plaintext data key leaves the agent.

For each page of records:

1. ReEncrypt each record, in one pipeline. The answer names both versions, and so does the new blob itself.
2. Have the agent decrypt each new blob under the record's context, by a ReEncrypt with DryRun, which returns no data.
   It needs the same grants as step 1, and in particular not kms:Decrypt.
3. With a cryptographic module, prove in it that both blobs hold the same data key: encrypt with the old, decrypt with the new.
4. Replace the old blobs in the database by those that passed, in one transaction. A row that has changed since it was read
   stays as it is.

Before step 4 commits, the database is unchanged; afterwards the page is done. So a run that is killed at any point leaves every
record readable, under its old version or its new one, and the next run finds the remaining records. Two concurrent runs do the
same work twice; one of them finds its rows changed, and leaves them.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from .. import operations
from ..client import Client
from ..errors import KmsError, ServiceUnavailable, Throttled
from ..module.interface import CryptographicModule, ModuleError
from ..parameters import decode_base64
from .record import VERSION_PREFIX, Record, StoreError, printable, version_prefix
from .store import Store

__all__ = ["Outcome", "rewrap"]

_WOULD_SUCCEED: Final = "DryRunOperationError"
_RETRY_SECONDS: Final = 0.5
"""Seconds to wait before repeating requests that the agent throttled or could not serve."""
_MAX_FRUITLESS_RETRIES: Final = 60
"""Consecutive retries without progress on any request, after which the requests fail."""
_PROBE: Final = b"keyferry rewrap"


class Outcome(NamedTuple):
    """Result of a rewrap, in numbers of records."""

    records: int
    """Records in the store."""
    found: int
    """Records under a version other than their master key's primary one."""
    moved: int
    """Records that were moved; in a dry run, those that can be."""
    changed: int
    """Records left as they are, because another process changed them meanwhile: most likely another rewrap."""
    failed: int
    """Records left as they were, each reported to `failed`."""


def rewrap(
    store: Store,
    kms: Client,
    *,
    dry_run: bool = False,
    module: CryptographicModule | None = None,
    failed: Callable[[str], None] = lambda _why: None,
    found: Callable[[int], None] = lambda _count: None,
    advanced: Callable[[int], None] = lambda _count: None,
) -> Outcome:
    """Move every record to its master key's primary version; with `dry_run`, only check whether each record can be moved.

    The caller needs kms:DescribeKey, kms:ReEncryptFrom and kms:ReEncryptTo on the keys. With `module`, which then proves that
    each data key stayed the same, the caller also needs kms:ExportDataKey to it.

    `failed` is called with the reason for each record that cannot be moved, `found` with the number of records to move, and
    `advanced` with the size of each page that is done. Raises `StoreError`, `AgentUnavailable` or `ProtocolError` when the run
    cannot go on. Records moved until then stay moved, and the next run continues with the others.
    """
    work = _Rewrap(store, kms, dry_run=dry_run, module=module, failed=failed, advanced=advanced)
    while versions := work.new_primary_versions():  # repeats if a key was rotated meanwhile
        found(work.found)
        for key_id, version in versions.items():
            work.move_all(key_id, version)
    return Outcome(store.count(), work.found, work.moved, work.changed, work.failures)


class _Rewrap:
    """One run of `rewrap` over a store, with its counts."""

    def __init__(
        self,
        store: Store,
        kms: Client,
        *,
        dry_run: bool,
        module: CryptographicModule | None,
        failed: Callable[[str], None],
        advanced: Callable[[int], None],
    ) -> None:
        self._store = store
        self._kms = kms
        self._dry_run = dry_run
        self._module = module
        self._failed = failed
        self._advanced = advanced
        self._primary_versions: dict[str, str | None] = {}
        self.found = self.moved = self.changed = self.failures = 0

    def new_primary_versions(self) -> dict[str, str]:
        """Return the primary versions that are new since the last call, by master key; count the records to move."""
        versions = {}
        for key_id in self._store.key_ids():
            if key_id in self._primary_versions and self._primary_versions[key_id] is None:
                continue
            (answer,) = self._pipeline([operations.DescribeKey(key_id=key_id)])
            if isinstance(answer, KmsError):
                count, self._primary_versions[key_id] = self._store.count(key_id), None
                self.found += count
                self.failures += count
                self._failed(f"{count} records of master key {printable(key_id)}: {answer}")
                continue
            version = answer.key_metadata.primary_key_version
            if self._primary_versions.get(key_id) == version:
                continue
            versions[key_id] = self._primary_versions[key_id] = version
            self.found += self._store.count(key_id, not_under=version)
        return versions

    def move_all(self, key_id: str, version: str) -> None:
        """Move the records of one master key, page by page."""
        for page in self._store.not_under(key_id, version):
            self._move(page)
            self._advanced(len(page))

    def _move(self, page: Sequence[Record]) -> None:
        records = [record for record in page if self._has_readable_context(record)]
        if self._dry_run:
            self.moved += len(self._decryptable([(record, record.ciphertext_blob) for record in records]))
            return
        answers = self._pipeline(_re_encrypt(record, record.ciphertext_blob) for record in records)
        new_blobs = [
            (record, answer.ciphertext_blob)
            for record, answer in zip(records, answers, strict=True)
            if self._fits(record, answer)
        ]
        changes = [(record, blob) for record, blob in self._decryptable(new_blobs) if self._same_key(record, blob)]
        moved_count = self._store.replace((record, blob, _version_of(blob)) for record, blob in changes)
        self.moved += moved_count
        self.changed += len(changes) - moved_count

    def _has_readable_context(self, record: Record) -> bool:
        """Return True if the record's EncryptionContext can be read; otherwise report a failure."""
        try:
            return record.encryption_context is not None
        except StoreError as error:
            return self._fail(record, error)

    def _fits(self, record: Record, answer: Any) -> bool:
        """Return True if the answer to a ReEncrypt fits the record: its master key, its old version, and a new blob."""
        if isinstance(answer, KmsError):
            return self._fail(record, answer)
        blob, version = answer.ciphertext_blob, answer.destination_key_version_id
        same_key_id = answer.key_id == answer.destination_key_id == record.key_id
        has_old_version = record.ciphertext_blob.startswith(version_prefix(answer.key_version_id))
        has_new_version = blob.startswith(version_prefix(version)) and blob != record.ciphertext_blob
        return (same_key_id and has_old_version and has_new_version) or self._fail(
            record, "the agent's answer does not match the record, which was left unchanged"
        )

    def _decryptable(self, blobs: Sequence[tuple[Record, str]]) -> list[tuple[Record, str]]:
        """Return the blobs that the agent can decrypt under their records' contexts and encrypt under the primary version."""
        answers = self._pipeline(_re_encrypt(record, blob, dry_run=True) for record, blob in blobs)
        return [
            (record, blob)
            for (record, blob), answer in zip(blobs, answers, strict=True)
            if getattr(answer, "code", None) == _WOULD_SUCCEED or self._fail(record, answer)
        ]

    def _same_key(self, record: Record, blob: str) -> bool:
        """Return True if the module proves that both blobs hold one data key, or without a module."""
        module = self._module
        if module is None:
            return True
        key_record = record.data_key_record()
        keys = []
        try:
            keys.append(module.recover_data_key(self._kms, key_record))
            keys.append(module.recover_data_key(self._kms, {**key_record, "CiphertextBlob": blob}))
            old_key, new_key = keys
            module.decrypt(new_key, module.encrypt(old_key, _PROBE))
        except (KmsError, ModuleError) as error:
            return self._fail(record, f"the module cannot prove that its data key stayed the same: {error}")
        finally:
            for key in keys:
                module.forget(key)
        return True

    def _pipeline(self, requests: Iterable[Any]) -> list[Any]:
        """Return the outcome of each request, in one pipeline. Throttled or unserved requests are repeated later."""
        calls = list(requests)
        answers = self._kms.pipeline(calls)
        retries_left = _MAX_FRUITLESS_RETRIES
        while retries_left and (indexes := [index for index, answer in enumerate(answers) if _can_retry(answer)]):
            time.sleep(_RETRY_SECONDS)
            new_answers = self._kms.pipeline(calls[index] for index in indexes)
            for index, answer in zip(indexes, new_answers, strict=True):
                answers[index] = answer
            is_stuck = all(_can_retry(answer) for answer in new_answers)
            retries_left = retries_left - 1 if is_stuck else _MAX_FRUITLESS_RETRIES
        return answers

    def _fail(self, record: Record, why: object) -> bool:
        self.failures += 1
        self._failed(f"{printable(record.name)}: {why}")
        return False


def _can_retry(answer: Any) -> bool:
    """Return True if the agent may serve the same request later."""
    return isinstance(answer, Throttled | ServiceUnavailable)


def _re_encrypt(record: Record, blob: str, *, dry_run: bool = False) -> operations.ReEncrypt:
    context = record.encryption_context or None
    return operations.ReEncrypt(
        ciphertext_blob=blob,
        source_encryption_context=context,
        destination_key_id=record.key_id,
        destination_encryption_context=context,
        dry_run=dry_run,
    )


def _version_of(blob: str) -> str:
    """Return the KeyVersionId in a CiphertextBlob. `_fits` has compared the blob's prefix with a version."""
    return decode_base64(blob[:VERSION_PREFIX]).decode()
