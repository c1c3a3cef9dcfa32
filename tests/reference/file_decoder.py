"""A second reader and writer of encrypted files, written from docs/files.md alone. It shares no code with the client and no
library with it either: HKDF is spelled out over the standard library's HMAC, GCM is pycryptodomex's. It has all of a file in
memory: for tests, and for making their vectors.
"""

import hashlib
import hmac
import json
import struct
from typing import Any

from Cryptodome.Cipher import AES

MAGIC = b"keyferry-file/1\n"
INFO = b"keyferry file 1 AES-256-GCM STREAM"
CHUNK = 65_536


class NotAuthentic(Exception):
    """The file does not open with this data key."""


def _gcm_seal(key: bytes, nonce: bytes, plaintext: bytes, aad: bytes) -> bytes:
    cipher = AES.new(key, AES.MODE_GCM, nonce=nonce)
    cipher.update(aad)
    ciphertext, tag = cipher.encrypt_and_digest(plaintext)
    return ciphertext + tag


def _gcm_open(key: bytes, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:
    if len(sealed) < 16:
        raise NotAuthentic
    cipher = AES.new(key, AES.MODE_GCM, nonce=nonce)
    cipher.update(aad)
    try:
        return cipher.decrypt_and_verify(sealed[:-16], sealed[-16:])
    except ValueError:
        raise NotAuthentic from None


def _keys(file_key: bytes, bound: bytes) -> tuple[bytes, bytes]:
    """RFC 5869, two blocks of 32 bytes."""
    prk = hmac.digest(hashlib.sha256(bound).digest(), file_key, "sha256")
    first = hmac.digest(prk, INFO + b"\x01", "sha256")
    return first, hmac.digest(prk, first + INFO + b"\x02", "sha256")


def _nonce(number: int, *, last: bool) -> bytes:
    return b"\0" * 3 + struct.pack(">Q", number) + (b"\x01" if last else b"\x00")


def write(data_key: bytes, record: bytes, file_key: bytes, nonce: bytes, plaintext: bytes) -> bytes:
    """A whole file. `record` is the JSON; `nonce` the 12 bytes that the module drew."""
    aad = MAGIC + hashlib.sha256(record).digest()
    bound = MAGIC + struct.pack(">I", len(record)) + record + nonce + _gcm_seal(data_key, nonce, file_key, aad)
    chunk_key, commitment = _keys(file_key, bound)
    pieces = [plaintext[at : at + CHUNK] for at in range(0, len(plaintext), CHUNK)] or [b""]
    last = len(pieces) - 1
    return (
        bound
        + commitment
        + b"".join(
            _gcm_seal(chunk_key, _nonce(number, last=number == last), piece, b"") for number, piece in enumerate(pieces)
        )
    )


def record_of(file: bytes) -> dict[str, Any]:
    """The record in a file's header."""
    if file[:16] != MAGIC:
        raise NotAuthentic
    (size,) = struct.unpack(">I", file[16:20])
    record: dict[str, Any] = json.loads(file[20 : 20 + size])
    return record


def read(data_key: bytes, file: bytes) -> bytes:
    """The plaintext of a whole file. Raises `NotAuthentic`."""
    if file[:16] != MAGIC or len(file) < 20:
        raise NotAuthentic
    (size,) = struct.unpack(">I", file[16:20])
    end = 20 + size + 60
    if size > 65_536 or len(file) < end + 32:
        raise NotAuthentic
    bound, commitment, payload = file[:end], file[end : end + 32], file[end + 32 :]
    nonce, sealed = bound[-60:-48], bound[-48:]
    file_key = _gcm_open(data_key, nonce, sealed, MAGIC + hashlib.sha256(file[20 : 20 + size]).digest())
    chunk_key, expected = _keys(file_key, bound)
    if not hmac.compare_digest(commitment, expected):
        raise NotAuthentic
    pieces = [payload[at : at + CHUNK + 16] for at in range(0, len(payload), CHUNK + 16)]
    if not pieces or (len(pieces) > 1 and len(pieces[-1]) == 16):
        raise NotAuthentic
    last = len(pieces) - 1
    return b"".join(
        _gcm_open(chunk_key, _nonce(number, last=number == last), piece, b"") for number, piece in enumerate(pieces)
    )
