"""The hash that identifies a CiphertextBlob, and with it a data key: in audit entries, and beside the records of a store."""

import hashlib

from .parameters import decode_base64

__all__ = ["ciphertext_hash"]


def ciphertext_hash(blob: bytes | str) -> str:
    """Return `sha256:` and the SHA-256 of a CiphertextBlob in hexadecimal.

    The hash is of the bytes, not of their Base64: `base64 -d | sha256sum` prints the same. Raises ValueError for text that is
    not canonical Base64.
    """
    return f"sha256:{hashlib.sha256(decode_base64(blob) if isinstance(blob, str) else blob).hexdigest()}"
