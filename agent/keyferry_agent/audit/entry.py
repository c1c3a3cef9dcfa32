"""The audit fields of a request: `AuditEntry` has those of its decision, and `AuditedRequest` adds its own."""

from binascii import a2b_base64
from typing import Any, Final, NamedTuple, Self

from keyferry.ciphertext import ciphertext_hash

from ..peer import Peer

__all__ = ["AuditEntry", "AuditedRequest", "blob_hash"]

_MAX_OPERATION_NAME_LENGTH: Final = 64
"""Characters of an operation's name in an audit entry. A client may send any text as the name."""


class AuditEntry(NamedTuple):
    """The audit fields that a decision determines: names and hashes, never secrets. Equal requests share an entry.

    A NamedTuple, because the constructor of a frozen dataclass takes a microsecond longer for each decision.
    """

    operation: str
    grant: str = ""
    by_program: bool = False
    """Whether the grant names the caller's program."""
    key_id: str = ""
    key_version_id: str = ""
    destination_key_id: str = ""
    destination_key_version_id: str = ""
    recipient: str = ""
    context_keys: tuple[str, ...] = ()
    ciphertext: str = ""
    """The hash of the CiphertextBlob in the request."""

    @classmethod
    def of_method(cls, method: str) -> Self:
        """Return the entry of a request that no handler decides. It contains the operation only."""
        return cls(ascii(method[:_MAX_OPERATION_NAME_LENGTH])[1:-1])


class AuditedRequest(NamedTuple):
    """A request for the audit log: its decision's entry, and the fields that differ between equal requests."""

    peer: Peer
    request_id: str
    started: float
    """The time of `time.monotonic` at which the request was received."""
    entry: AuditEntry
    outcome: str
    """An error's code, or OK."""
    blob_hash: str = ""
    """The hash of the CiphertextBlob in the result."""


def blob_hash(result: Any) -> str:
    """Return the hash of the CiphertextBlob in a result, or an empty text if the result does not contain one."""
    blob = getattr(result, "ciphertext_blob", None)
    # Strict decoding takes longer, and is not needed for a blob that the agent has encoded itself.
    return "" if blob is None else ciphertext_hash(a2b_base64(blob))
