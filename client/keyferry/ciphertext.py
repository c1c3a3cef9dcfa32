"""Properties of a CiphertextBlob that need no key: its hash, for audit entries and stored records, and its data key's size."""

import hashlib
from typing import Final

from .parameters import decode_base64

__all__ = ["ciphertext_hash", "data_key_size"]

_OVERHEAD_BYTES: Final = 117
"""Bytes that a CiphertextBlob of format 1 adds to its plaintext (docs/ciphertext.md)."""
_FORMAT_OFFSET: Final = 36
_FORMAT: Final = 1


def ciphertext_hash(blob: bytes | str) -> str:
    """Return `sha256:` and the SHA-256 of a CiphertextBlob in hexadecimal.

    The hash is of the bytes, not of their Base64: `base64 -d | sha256sum` prints the same. Raises ValueError for text that is
    not canonical Base64.
    """
    return f"sha256:{hashlib.sha256(decode_base64(blob) if isinstance(blob, str) else blob).hexdigest()}"


def data_key_size(blob: str) -> int:
    """Return how many bytes a CiphertextBlob of format 1 encrypts. Raises ValueError for anything else."""
    data = decode_base64(blob)
    if len(data) <= _OVERHEAD_BYTES or data[_FORMAT_OFFSET] != _FORMAT:
        raise ValueError("not a CiphertextBlob of format 1")
    return len(data) - _OVERHEAD_BYTES
