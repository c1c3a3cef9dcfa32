"""The chunks: the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár, CRYPTO 2015) over AES-256-GCM.

Each chunk is encrypted under the file's own key with the nonce `uint88 counter ‖ final`, as in age's payload. A chunk opens
only at its position in its file, and the last chunk only as the last.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..module.interface import CryptographicModule, DataKey, DataKeyRecord
from .header import NOT_AUTHENTIC, FileError, Header, new_header, payload_key, read_exactly, read_header

__all__ = ["CHUNK", "decrypt", "encrypt", "plaintext_hash", "reencrypt"]

CHUNK: Final = 65_536
"""Bytes of plaintext in every chunk except the last."""
_TAG: Final = 16
_MAX_CHUNKS: Final = 2**32
"""Most chunks under one key, which is 256 TiB: an attacker's advantage against GCM is at most 2^-41 there (docs/files.md)."""


def encrypt(
    source: BinaryIO,
    target: BinaryIO,
    module: CryptographicModule,
    key: DataKey,
    record: DataKeyRecord,
    *,
    name: str = "",
    advanced: Callable[[int], None] = lambda _bytes: None,
) -> None:
    """Encrypt all of `source` with a data key in the module. The header holds the `record`, from which the key is recovered.

    `advanced` is called for each chunk with the number of bytes read. Raises OSError, `ModuleError`, or `FileError` for a file
    that is too long.
    """
    _write(_chunks(source, CHUNK), target, module, key, record, name, advanced)


def decrypt(
    source: BinaryIO,
    target: BinaryIO,
    module: CryptographicModule,
    key: DataKey,
    header: Header,
    *,
    advanced: Callable[[int], None] = lambda _bytes: None,
) -> None:
    """Decrypt the chunks after the header. Every chunk written to `target` is authentic, but the file may still be cut off.

    Only when this function returns is the file known to be complete. No other process may read the target before that;
    `replacing` ensures it. Raises OSError, and `FileError` for bytes that `encrypt` did not write for this header.
    """
    target.writelines(piece for piece, _final in _opened(source, module, key, header, advanced))


def reencrypt(
    source: BinaryIO,
    target: BinaryIO,
    module: CryptographicModule,
    key: DataKey,
    header: Header,
    new_key: DataKey,
    record: DataKeyRecord,
    *,
    name: str = "",
    advanced: Callable[[int], None] = lambda _bytes: None,
) -> str:
    """Decrypt the chunks after the header with one data key and encrypt them with another, chunk by chunk, in memory.

    `record` and `name` belong to the new key. Returns the SHA-256 of the plaintext in hexadecimal, to be compared with
    `plaintext_hash` of the target. Raises the errors of `encrypt` and `decrypt`; the target is unusable then.
    """
    digest = hashlib.sha256()

    def pieces() -> Iterator[tuple[bytes, bool]]:
        for piece, is_last in _opened(source, module, key, header, advanced):
            digest.update(piece)
            yield piece, is_last

    _write(pieces(), target, module, new_key, record, name, lambda _bytes: None)
    return digest.hexdigest()


def plaintext_hash(source: BinaryIO, module: CryptographicModule, key: DataKey) -> str:
    """Decrypt a file in memory, and return the SHA-256 of its plaintext in hexadecimal. Raises the errors of `decrypt`."""
    digest = hashlib.sha256()
    for piece, _final in _opened(source, module, key, read_header(source), lambda _bytes: None):
        digest.update(piece)
    return digest.hexdigest()


def _write(
    pieces: Iterator[tuple[bytes, bool]],
    target: BinaryIO,
    module: CryptographicModule,
    key: DataKey,
    record: DataKeyRecord,
    name: str,
    advanced: Callable[[int], None],
) -> None:
    header, chunk_key = new_header(module, key, record, name)
    target.write(header.to_bytes())
    gcm = AESGCM(chunk_key)
    for counter, (piece, is_last) in enumerate(pieces):
        target.write(gcm.encrypt(_nonce(counter, is_last=is_last), piece, None))
        advanced(len(piece))


def _opened(
    source: BinaryIO,
    module: CryptographicModule,
    key: DataKey,
    header: Header,
    advanced: Callable[[int], None],
) -> Iterator[tuple[bytes, bool]]:
    """Yield the plaintext of each chunk, and whether it is the last. Raises `FileError`, OSError."""
    gcm = AESGCM(payload_key(module, key, header))
    for counter, (chunk, is_last) in enumerate(_chunks(source, CHUNK + _TAG)):
        if len(chunk) < _TAG or (
            len(chunk) == _TAG and counter
        ):  # an empty chunk is valid only as the sole chunk of an empty file
            raise FileError(NOT_AUTHENTIC)
        try:
            piece = gcm.decrypt(_nonce(counter, is_last=is_last), chunk, None)
        except InvalidTag:
            raise FileError(NOT_AUTHENTIC) from None
        yield piece, is_last
        advanced(len(chunk))


def _chunks(source: BinaryIO, size: int) -> Iterator[tuple[bytes, bool]]:
    """Yield a source in pieces of `size` bytes, each with whether it is the last. Yields at least one piece."""
    chunk = read_exactly(source, size)
    while len(chunk) == size and (next_chunk := read_exactly(source, size)):
        yield chunk, False
        chunk = next_chunk
    yield chunk, True


def _nonce(counter: int, *, is_last: bool) -> bytes:
    if counter >= _MAX_CHUNKS:
        raise FileError(f"too large; a file has at most {_MAX_CHUNKS} chunks of {CHUNK} bytes")
    return counter.to_bytes(11, "big") + bytes([is_last])
