"""What an application stores to get a data key back."""

from typing import TypedDict

__all__ = ["DataKeyRecord"]


class DataKeyRecord(TypedDict):
    """A data key under its master key, and what it takes to open it: JSON-able, and not secret, but needed."""

    KeyId: str
    KeyVersionId: str
    CiphertextBlob: str
    EncryptionContext: dict[str, str]
