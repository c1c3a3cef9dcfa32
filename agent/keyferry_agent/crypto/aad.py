"""The associated data of a CiphertextBlob: an injective encoding of the key version, the key and the EncryptionContext.

Every part is preceded by its length, and pairs are sorted by the UTF-8 bytes of their keys. So two different inputs never have
the same encoding, with any characters in them. (In the cloud's own `k=v&k=v` form, {"a": "1&b=2"} and {"a": "1", "b": "2"}
have the same encoding.) The bytes are specified in docs/ciphertext.md.
"""

import struct
from collections.abc import Mapping
from typing import Final

__all__ = ["associated_data"]


def associated_data(header: bytes, key_id: str, context: Mapping[str, str]) -> bytes:
    """Return `header ‖ key_id ‖ number of pairs ‖ pairs`, each string encoded as a 4-byte big-endian length and its UTF-8."""
    data = header + _with_length(key_id.encode()) + _length(len(context))
    for key, value in sorted([(key.encode(), value.encode()) for key, value in context.items()]):
        data += _with_length(key) + _with_length(value)
    return data


_length: Final = struct.Struct(">I").pack


def _with_length(text: bytes) -> bytes:
    return _length(len(text)) + text
