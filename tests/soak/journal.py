"""A client's journal of its answers, line by line: a killed client loses at most its last line."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from keyferry import KmsError
from keyferry.parameters import decode_base64

__all__ = ["Answer", "CiphertextEntry", "Journal", "Violation", "digest", "read"]


class Answer(NamedTuple):
    """One answered request: its RequestId, its time (on the host's monotonic clock), its seconds, and its outcome."""

    request_id: str
    operation: str
    at: float
    seconds: float
    outcome: str


class CiphertextEntry(NamedTuple):
    """One ciphertext, and `plaintext`, the SHA-256 of its plaintext."""

    blob: str
    context: dict[str, str]
    plaintext: str
    key_id: str
    version: str


class Violation(NamedTuple):
    """Something that should not have been."""

    what: str


_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Answer, CiphertextEntry, Violation)}


class Journal:
    """A client's notes, in a file of its own."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)  # a line is one write: threads share a journal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def write(self, entry: Answer | CiphertextEntry | Violation) -> None:
        """Write an entry down."""
        self._file.write(json.dumps([type(entry).__name__, *entry]).encode() + b"\n")

    def answered(self, operation: str, outcome: Any, at: float, seconds: float) -> None:
        """Note one answer: a result, or a refusal."""
        code = outcome.code if isinstance(outcome, KmsError) else "OK"
        self.write(Answer(outcome.request_id, operation, at, seconds, code))

    def expect(self, what: str, *, right: bool) -> None:
        """Note a failed expectation."""
        if not right:
            self.write(Violation(what))


def read(paths: list[Path]) -> Iterator[Answer | CiphertextEntry | Violation]:
    """Yield all entries of journals, without partial last lines."""
    for path in paths:
        with path.open() as file:
            for line in file:
                if line.endswith("\n"):
                    kind, *fields = json.loads(line)
                    yield _KINDS[kind](*fields)


def digest(plaintext: str | bytes) -> str:
    """Return the digest of a plaintext, which is bytes or Base64."""
    return hashlib.sha256(decode_base64(plaintext) if isinstance(plaintext, str) else plaintext).hexdigest()
