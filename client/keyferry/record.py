"""The record that an application stores to recover a data key."""

from typing import TypedDict

__all__ = ["DataKeyRecord"]


class DataKeyRecord(TypedDict):
    """A data key encrypted under its master key, with the KeyId and EncryptionContext that opening it takes.

    A record can be written as JSON. It is not secret, but without it the data key is lost.
    """

    KeyId: str
    KeyVersionId: str
    CiphertextBlob: str
    EncryptionContext: dict[str, str]
