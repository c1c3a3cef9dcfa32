"""What the audit log has of one request: `AuditEntry`."""

from binascii import a2b_base64
from dataclasses import dataclass
from typing import Any

from keyferry.ciphertext import ciphertext_hash

__all__ = ["AuditEntry"]


@dataclass(slots=True)
class AuditEntry:
    """What is to be said of one request, gathered on its way down. Only names and fingerprints: nothing secret."""

    request_id: str
    started: float
    operation: str = ""
    grant: str = ""
    by_program: bool = False
    """Whether that grant names the caller's program."""
    key_id: str = ""
    key_version_id: str = ""
    destination_key_id: str = ""
    destination_key_version_id: str = ""
    recipient: str = ""
    context_keys: tuple[str, ...] = ()
    line: str = ""
    """The part of its line that all requests equal to it share, once it was written (`audit`)."""
    ciphertext: str = ""
    """The hash of the CiphertextBlob that was made, or that the request has."""
    destination_ciphertext: str = ""
    """The hash of the CiphertextBlob that ReEncrypt made."""

    def note(self, result: Any) -> None:
        """Note the CiphertextBlob in the result of the request, where there is one."""
        blob = getattr(result, "ciphertext_blob", None)
        if blob is None:
            return
        made = ciphertext_hash(
            a2b_base64(blob)
        )  # what the agent encoded itself needs no strict decoding, which takes longer
        if self.destination_key_id:
            self.destination_ciphertext = made
        else:
            self.ciphertext = made

    def again(self, request_id: str, started: float) -> "AuditEntry":
        """The same, of another request that is equal to this one, before it has made a CiphertextBlob of its own."""
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
            self.line,
        )
