"""The audit fields of one request: `AuditEntry`."""

from binascii import a2b_base64
from dataclasses import dataclass
from typing import Any

from keyferry.ciphertext import ciphertext_hash

__all__ = ["AuditEntry"]


@dataclass(slots=True)
class AuditEntry:
    """The audit fields of one request, filled in while it is handled. They are names and hashes, never secrets."""

    request_id: str
    started: float
    operation: str = ""
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
    """The hash of the CiphertextBlob in the request or in its result."""
    destination_ciphertext: str = ""
    """The hash of the CiphertextBlob that ReEncrypt made."""

    def note(self, result: Any) -> None:
        """Store the hash of the CiphertextBlob in the result of the request, if it contains one."""
        blob = getattr(result, "ciphertext_blob", None)
        if blob is None:
            return
        # Strict decoding takes longer, and is not needed for a blob that the agent has encoded itself.
        blob_hash = ciphertext_hash(a2b_base64(blob))
        if self.destination_key_id:
            self.destination_ciphertext = blob_hash
        else:
            self.ciphertext = blob_hash

    def again(self, request_id: str, started: float) -> "AuditEntry":
        """Return the fields for an equal request with another ID and start time, without the hashes of CiphertextBlobs."""
        return AuditEntry(
            request_id,
            started,
            self.operation,
            self.grant,
            self.by_program,
            self.key_id,
            self.key_version_id,
            self.destination_key_id,
            self.destination_key_version_id,
            self.recipient,
            self.context_keys,
        )
