"""The workload of a client: every operation, with right and wrong contexts, keys of each state and unknown ones.

It connects to no agent itself: it yields requests, and is sent their outcomes.
"""

import random
from collections import deque
from collections.abc import Generator
from typing import Any, TypeAlias

from support.keys import Recipient

from keyferry import KmsError, operations
from keyferry.parameters import encode_base64

from .journal import CiphertextEntry, Journal, digest

__all__ = ["KEYS", "SELDOM", "SOMETIMES", "Workload"]

KEYS = ("alias/a", "alias/sm4")
SOMETIMES = "alias/sometimes"
"""Encrypting under it is granted in one of the operator's two configurations only."""
SELDOM = "alias/seldom"
"""Is disabled and enabled again."""
_KEPT = 200
_TENANTS = 50

Asking: TypeAlias = Generator[Any, Any, None]


class Workload:
    """One client's requests."""

    def __init__(self, seed: int, to: Recipient, journal: Journal) -> None:
        self._random = random.Random(seed)
        self._to = to
        self._journal = journal
        self._kept: deque[CiphertextEntry] = deque(maxlen=_KEPT)

    def requests(self) -> Asking:
        """Requests without end."""
        rounds = (
            self._export,
            self._hidden,
            self._plain,
            self._encrypt,
            self._open,
            self._mistake,
            self._move,
            self._look,
            self._refused,
            self._affected_by_operator,
        )
        while True:
            for each in self._random.sample(rounds, len(rounds)):
                yield from each()

    def _context(self) -> dict[str, str]:
        return {"tenant": str(self._random.randrange(_TENANTS)), "n": self._random.randbytes(4).hex()}

    def _make(
        self, result: Any, context: dict[str, str], plaintext: str | bytes, *, keep: bool = True
    ) -> CiphertextEntry:
        made = CiphertextEntry(result.ciphertext_blob, context, digest(plaintext), result.key_id, result.key_version_id)
        self._journal.write(made)
        if keep:
            self._kept.append(made)
        return made

    def _good(self, outcome: Any) -> bool:
        self._journal.expect(f"refused: {outcome!r}", right=not isinstance(outcome, KmsError))
        return not isinstance(outcome, KmsError)

    def _same(self, made: CiphertextEntry, plaintext: str | bytes, outcome: Any) -> None:
        right = (made.plaintext, made.key_id, made.version) == (
            digest(plaintext),
            outcome.key_id,
            outcome.key_version_id,
        )
        self._journal.expect(f"{made.blob[:60]} opened to something else", right=right)

    def _code(self, outcome: Any, *codes: str) -> None:
        code = outcome.code if isinstance(outcome, KmsError) else "OK"
        self._journal.expect(f"{code}, where {codes} was expected", right=code in codes)

    def _export(self) -> Asking:
        context = self._context()
        result = yield operations.GenerateAndExportDataKey(
            key_id=self._random.choice(KEYS), encryption_context=context, **self._to.arguments
        )
        if not self._good(result):
            return
        made = self._make(result, context, self._to.unwrap(result.exported_data_key))
        again = yield operations.ExportDataKey(
            ciphertext_blob=made.blob, encryption_context=context, **self._to.arguments
        )
        if self._good(again):
            self._same(made, self._to.unwrap(again.exported_data_key), again)

    def _hidden(self) -> Asking:
        context = self._context()
        result = yield operations.GenerateDataKeyWithoutPlaintext(
            key_id=self._random.choice(KEYS),
            number_of_bytes=self._random.randint(1, 1_024),
            encryption_context=context,
        )
        if not self._good(result):
            return
        opened = yield operations.Decrypt(ciphertext_blob=result.ciphertext_blob, encryption_context=context)
        if self._good(opened):
            self._make(result, context, opened.plaintext)

    def _plain(self) -> Asking:
        context = self._context()
        result = yield operations.GenerateDataKey(key_id=self._random.choice(KEYS), encryption_context=context)
        if self._good(result):
            self._make(result, context, result.plaintext)

    def _encrypt(self) -> Asking:
        context, plaintext = self._context(), self._random.randbytes(self._random.randint(1, 6_144))
        result = yield operations.Encrypt(
            key_id=self._random.choice(KEYS), plaintext=encode_base64(plaintext), encryption_context=context
        )
        if self._good(result):
            self._make(result, context, plaintext)

    def _open(self) -> Asking:
        if self._kept:
            made = self._random.choice(self._kept)
            opened = yield operations.Decrypt(ciphertext_blob=made.blob, encryption_context=made.context)
            if self._good(opened):
                self._same(made, opened.plaintext, opened)

    def _mistake(self) -> Asking:
        if self._kept:
            made = self._random.choice(self._kept)
            opened = yield operations.Decrypt(ciphertext_blob=made.blob, encryption_context=self._context())
            self._code(opened, "InvalidParameter")

    def _move(self) -> Asking:
        if self._kept:
            made, context = self._random.choice(self._kept), self._context()
            moved = yield operations.ReEncrypt(
                ciphertext_blob=made.blob,
                source_encryption_context=made.context,
                destination_key_id=self._random.choice(KEYS),
                destination_encryption_context=context,
            )
            if self._good(moved):
                here = CiphertextEntry(
                    moved.ciphertext_blob,
                    context,
                    made.plaintext,
                    moved.destination_key_id,
                    moved.destination_key_version_id,
                )
                self._journal.write(here)
                self._kept.append(here)

    def _look(self) -> Asking:
        self._good((yield operations.DescribeKey(key_id=self._random.choice(KEYS))))
        self._good((yield operations.ListKeys(page_size=100)))
        self._good((yield operations.ListKeyVersions(key_id=KEYS[0])))
        self._good((yield operations.ListAliases(page_number=1)))
        self._good((yield operations.GetAgentStatus()))

    def _refused(self) -> Asking:
        self._code((yield operations.GenerateDataKey(key_id=KEYS[0], dry_run=True)), "DryRunOperationError")
        self._code((yield operations.DescribeKey(key_id="alias/never")), "Forbidden.AliasNotFound")
        self._code((yield operations.GenerateDataKey(key_id=KEYS[0], number_of_bytes=2_000)), "InvalidParameter")
        self._code((yield "Explode", {}), "InvalidAction.NotFound")

    def _affected_by_operator(self) -> Asking:
        context = self._context()
        result = yield operations.GenerateDataKey(key_id=SELDOM, encryption_context=context)
        self._code(result, "OK", "Rejected.Disabled")
        if not isinstance(result, KmsError):
            self._make(result, context, result.plaintext, keep=False)
        sometimes = yield operations.Encrypt(key_id=SOMETIMES, plaintext=encode_base64(b"now and then"))
        self._code(sometimes, "OK", "Forbidden.NoPermission")
        if not isinstance(sometimes, KmsError):
            self._make(sometimes, {}, b"now and then", keep=False)
