"""The header of an encrypted file: the record of its data key, the encrypted file key, and a commitment to both.

    magic (16) ‖ uint32 length of the record ‖ record (JSON) ‖ encrypted file key (60) ‖ commitment (32)

The data key encrypts a fresh random file key for each file, inside the cryptographic module. The key of the chunks is derived
from the file key and all bytes before the commitment. With any bit of the header changed, the derived key is another one, and
the file does not open.
"""

import hashlib
import hmac
import json
import os
from typing import Any, BinaryIO, Final, NamedTuple

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import KeyferryError
from ..module.interface import NONCE_SIZE, TAG, CryptographicModule, DataKey, DataKeyRecord, ModuleError
from ..parameters import unique_pairs

__all__ = ["NOT_AUTHENTIC", "FileError", "Header", "new_header", "payload_key", "read_exactly", "read_header"]

MAGIC: Final = b"keyferry-file/1\n"
MAX_RECORD_BYTES: Final = 65_536
"""Most bytes of a record: as many as a message to the agent can hold."""
_FILE_KEY_BYTES: Final = 32
_ENCRYPTED_KEY_BYTES: Final = NONCE_SIZE + _FILE_KEY_BYTES + TAG
_COMMITMENT_BYTES: Final = 32
_INFO: Final = b"keyferry file 1 AES-256-GCM STREAM"
NOT_AUTHENTIC: Final = "damaged, cut off or extended, or encrypted with another data key"
"""One message for all causes."""


class FileError(KeyferryError):
    """A file is not an encrypted file, does not open, or cannot be written. No plaintext was released, and no file is left."""


class Header(NamedTuple):
    """The part of an encrypted file before the chunks."""

    name: str
    """The record's name in its store; may be empty."""
    record: DataKeyRecord
    bound: bytes
    """All bytes before the commitment, as they are in the file."""
    sealed: bytes
    commitment: bytes

    def to_bytes(self) -> bytes:
        """Return the header as it is in the file."""
        return self.bound + self.commitment


def new_header(module: CryptographicModule, key: DataKey, record: DataKeyRecord, name: str) -> tuple[Header, bytes]:
    """Return the header of a new file, and the key of its chunks. Raises `ModuleError`, and `FileError` for a long record."""
    text = json.dumps({"Name": name, **record}, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > MAX_RECORD_BYTES:
        raise FileError(
            f"the data-key record has {len(text)} bytes as JSON; a file header holds at most {MAX_RECORD_BYTES}"
        )
    file_key = os.urandom(_FILE_KEY_BYTES)
    encrypted_key = module.encrypt(key, file_key, _aad(text))
    bound = MAGIC + len(text).to_bytes(4, "big") + text + encrypted_key
    chunks, commitment = _derive(file_key, bound)
    return Header(name, record, bound, encrypted_key, commitment), chunks


def read_header(source: BinaryIO) -> Header:
    """Read the header, and check its form. The header is not authenticated yet. Raises `FileError`, OSError."""
    magic = read_exactly(source, len(MAGIC))
    if magic != MAGIC:
        is_newer = magic.startswith(MAGIC[:-2])
        raise FileError(
            "encrypted in a newer format; use a newer keyferry" if is_newer else "not a file that keyferry encrypted"
        )
    length = read_exactly(source, 4)
    size = int.from_bytes(length, "big")
    if size > MAX_RECORD_BYTES:
        raise FileError(NOT_AUTHENTIC)
    text, encrypted_key, commitment = (
        read_exactly(source, count) for count in (size, _ENCRYPTED_KEY_BYTES, _COMMITMENT_BYTES)
    )
    if len(commitment) != _COMMITMENT_BYTES:
        raise FileError(NOT_AUTHENTIC)
    name, record = _record(text)
    return Header(name, record, magic + length + text + encrypted_key, encrypted_key, commitment)


def payload_key(module: CryptographicModule, key: DataKey, header: Header) -> bytes:
    """Return the key of a file's chunks. Raises `FileError` when the header does not belong to the data key."""
    text = header.bound[len(MAGIC) + 4 : -_ENCRYPTED_KEY_BYTES]
    try:
        file_key = module.decrypt(key, header.sealed, _aad(text))
    except ModuleError:
        raise FileError(NOT_AUTHENTIC) from None
    chunks, commitment = _derive(file_key, header.bound)
    if not hmac.compare_digest(commitment, header.commitment):
        raise FileError(NOT_AUTHENTIC)
    return chunks


def read_exactly(source: BinaryIO, size: int) -> bytes:
    """Return `size` bytes, or fewer at the end of the source. Reads repeatedly, because a pipe can return fewer at a time."""
    data = source.read(size)
    if len(data) == size or not data:
        return data
    buffer = bytearray(data)
    while len(buffer) < size and (data := source.read(size - len(buffer))):
        buffer += data
    return bytes(buffer)


def _aad(text: bytes) -> bytes:
    """Return the additional data for encrypting the file key. It is short and of fixed length, because tokens limit it."""
    return MAGIC + hashlib.sha256(text).digest()


def _derive(file_key: bytes, bound: bytes) -> tuple[bytes, bytes]:
    salt = hashlib.sha256(bound).digest()
    okm = HKDF(SHA256(), _FILE_KEY_BYTES + _COMMITMENT_BYTES, salt, _INFO).derive(file_key)
    return okm[:_FILE_KEY_BYTES], okm[_FILE_KEY_BYTES:]


def _record(content: bytes) -> tuple[str, DataKeyRecord]:
    """Return the name and the record in a JSON text. Raises `FileError` for any other text, also for further fields."""
    try:
        fields: Any = json.loads(content.decode(), object_pairs_hook=unique_pairs)
        name, context = fields.pop("Name"), fields["EncryptionContext"]
        has_all_fields = fields.keys() == DataKeyRecord.__annotations__.keys() and isinstance(context, dict)
        texts = [name, *(fields[field] for field in fields if field != "EncryptionContext"), *context.values()]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise FileError(NOT_AUTHENTIC) from None
    if not has_all_fields or not all(isinstance(text, str) for text in texts):
        raise FileError(NOT_AUTHENTIC)
    return name, fields
