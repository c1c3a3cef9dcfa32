"""The associated data of a CiphertextBlob: an injective encoding of the key version, the key and the EncryptionContext.

Every part is preceded by its length, and pairs are sorted by the UTF-8 bytes of their keys: two different inputs never give
the same bytes, whatever characters they hold. (The cloud's own `k=v&k=v` form makes {"a": "1&b=2"} and
{"a": "1", "b": "2"} alike.) The bytes are specified in docs/ciphertext.md.
"""

from collections.abc import Mapping

__all__ = ["associated_data"]


def associated_data(header: bytes, key_id: str, context: Mapping[str, str]) -> bytes:
    """Encode `header ‖ key_id ‖ number of pairs ‖ pairs`, each string as a 4-byte big-endian length and its UTF-8."""
    parts = [header, _string(key_id.encode()), len(context).to_bytes(4, "big")]
    for key, value in sorted((key.encode(), value.encode()) for key, value in context.items()):
        parts += (_string(key), _string(value))
    return b"".join(parts)


def _string(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text
