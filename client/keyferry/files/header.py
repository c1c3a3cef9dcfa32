"""How an encrypted file begins: the record that brings its data key back, the file's own key, and what commits to both.

    magic (16) ‖ uint32 length of the record ‖ record (JSON) ‖ sealed file key (60) ‖ commitment (32)

The data key seals a fresh random file key, once for each file, inside its module. From the file key and all that stands before
the commitment comes the key of the chunks: whoever changes a bit of the header has another key, and opens nothing.
"""

import hashlib
import hmac
import json
import os
from typing import Any, BinaryIO, Final, NamedTuple

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import KeyferryError
from ..module.interface import CryptographicModule, DataKey, ModuleError
from ..parameters import unique_pairs
from ..record import DataKeyRecord

__all__ = ["NOT_AUTHENTIC", "FileError", "Header", "new_header", "payload_key", "read_exactly", "read_header"]

MAGIC: Final = b"keyferry-file/1\n"
MOST_RECORD: Final = 65_536
"""Bytes of a record: what a message to the agent can hold, no more."""
FILE_KEY: Final = 32
_SEALED: Final = 12 + FILE_KEY + 16
_COMMITMENT: Final = 32
_INFO: Final = b"keyferry file 1 AES-256-GCM STREAM"
NOT_AUTHENTIC: Final = "it is damaged, was cut off or extended, or was encrypted with another data key"
"""One text for all causes."""


class FileError(KeyferryError):
    """An encrypted file that is none, or does not open, or cannot be written: nothing was released, nothing is left."""


class Header(NamedTuple):
    """What stands before the chunks."""

    name: str
    """The record's name where it was stored; may be empty."""
    record: DataKeyRecord
    bound: bytes
    """All before the commitment, as it is in the file."""
    sealed: bytes
    commitment: bytes

    def to_bytes(self) -> bytes:
        """As it is in the file."""
        return self.bound + self.commitment


def new_header(module: CryptographicModule, key: DataKey, record: DataKeyRecord, name: str) -> tuple[Header, bytes]:
    """The header of a new file, and the key of its chunks. Raises `ModuleError`, or `FileError` for too long a record."""
    text = json.dumps({"Name": name, **record}, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > MOST_RECORD:
        raise FileError(f"the record has {len(text)} bytes as JSON; a file's header takes at most {MOST_RECORD}")
    file_key = os.urandom(FILE_KEY)
    sealed = module.encrypt(key, file_key, _aad(text))
    bound = MAGIC + len(text).to_bytes(4, "big") + text + sealed
    chunks, commitment = _derive(file_key, bound)
    return Header(name, record, bound, sealed, commitment), chunks


def read_header(source: BinaryIO) -> Header:
    """Read the header, and check its form. Nothing of it is authentic yet. Raises `FileError`, OSError."""
    magic = read_exactly(source, len(MAGIC))
    if magic != MAGIC:
        known = magic.startswith(MAGIC[:-2])
        raise FileError("it is of a newer format" if known else "it is not a file that keyferry encrypted")
    length = read_exactly(source, 4)
    size = int.from_bytes(length, "big")
    if size > MOST_RECORD:
        raise FileError(NOT_AUTHENTIC)
    text, sealed, commitment = (read_exactly(source, count) for count in (size, _SEALED, _COMMITMENT))
    if len(commitment) != _COMMITMENT:
        raise FileError(NOT_AUTHENTIC)
    name, record = _record(text)
    return Header(name, record, magic + length + text + sealed, sealed, commitment)


def payload_key(module: CryptographicModule, key: DataKey, header: Header) -> bytes:
    """The key of a file's chunks. Raises `FileError` when header and data key do not belong together."""
    text = header.bound[len(MAGIC) + 4 : -_SEALED]
    try:
        file_key = module.decrypt(key, header.sealed, _aad(text))
    except ModuleError:
        raise FileError(NOT_AUTHENTIC) from None
    chunks, commitment = _derive(file_key, header.bound)
    if not hmac.compare_digest(commitment, header.commitment):
        raise FileError(NOT_AUTHENTIC)
    return chunks


def read_exactly(source: BinaryIO, size: int) -> bytes:
    """As many bytes, or all that are left: a pipe may give fewer at a time."""
    first = source.read(size)
    if len(first) == size or not first:
        return first
    got = bytearray(first)
    while len(got) < size and (more := source.read(size - len(got))):
        got += more
    return bytes(got)


def _aad(text: bytes) -> bytes:
    """What the sealed file key is bound to; of one length, as tokens limit it."""
    return MAGIC + hashlib.sha256(text).digest()


def _derive(file_key: bytes, bound: bytes) -> tuple[bytes, bytes]:
    salt = hashlib.sha256(bound).digest()
    okm = HKDF(SHA256(), FILE_KEY + _COMMITMENT, salt, _INFO).derive(file_key)
    return okm[:FILE_KEY], okm[FILE_KEY:]


def _record(text: bytes) -> tuple[str, DataKeyRecord]:
    """A record as JSON has it, and its name. Raises `FileError` for anything else, and anything more."""
    try:
        fields: Any = json.loads(text.decode(), object_pairs_hook=unique_pairs)
        name, context = fields.pop("Name"), fields["EncryptionContext"]
        right = fields.keys() == DataKeyRecord.__annotations__.keys() and isinstance(context, dict)
        texts = [name, *(fields[field] for field in fields if field != "EncryptionContext"), *context.values()]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise FileError(NOT_AUTHENTIC) from None
    if not right or not all(isinstance(each, str) for each in texts):
        raise FileError(NOT_AUTHENTIC)
    return name, fields
