"""The chunks: the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár, CRYPTO 2015) over AES-256-GCM.

Each chunk is encrypted under the file's own key with the nonce `uint88 counter ‖ final`, as in age's payload: a chunk opens in
its place of its file only, and the last one only as the last.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..module.interface import CryptographicModule, DataKey
from ..record import DataKeyRecord
from .header import NOT_AUTHENTIC, FileError, Header, new_header, payload_key, read_exactly, read_header

__all__ = ["CHUNK", "decrypt", "encrypt", "plaintext_hash", "reencrypt"]

CHUNK: Final = 65_536
"""Bytes of plaintext in every chunk but the last."""
_TAG: Final = 16
_MOST_CHUNKS: Final = 2**32
"""Chunks under one key, which is 256 TiB: there GCM still hides one file from 2^-41 chances (docs/files.md)."""


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
    """Encrypt all of `source` with a data key of the module's; the header holds the record that brings the key back.

    `advanced` is told of each chunk how many bytes it took. Raises OSError, `ModuleError`, or `FileError` for a file that is
    too long.
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
    """Decrypt what follows the header. Each chunk that is written to `target` is authentic, but that the file is whole is known
    only when this returns: nobody else may see the target before (`replacing` sees to it).

    Raises `FileError` for anything that `encrypt` did not write so, OSError.
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
    """Decrypt what follows the header with one data key and encrypt it with another, chunk by chunk, in memory.

    `record` and `name` are of the new key. Returns the SHA-256 of the plaintext in hexadecimal, for `plaintext_hash` of the
    target. Raises as `encrypt` and `decrypt` do; the target is of no use then.
    """
    digest = hashlib.sha256()

    def pieces() -> Iterator[tuple[bytes, bool]]:
        for piece, final in _opened(source, module, key, header, advanced):
            digest.update(piece)
            yield piece, final

    _write(pieces(), target, module, new_key, record, name, lambda _bytes: None)
    return digest.hexdigest()


def plaintext_hash(source: BinaryIO, module: CryptographicModule, key: DataKey) -> str:
    """Decrypt an encrypted file in memory, and return the SHA-256 of its plaintext in hexadecimal. Raises as `decrypt` does."""
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
    for counter, (piece, final) in enumerate(pieces):
        target.write(gcm.encrypt(_nonce(counter, final=final), piece, None))
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
    for counter, (chunk, final) in enumerate(_chunks(source, CHUNK + _TAG)):
        if len(chunk) < _TAG or (len(chunk) == _TAG and counter):  # an empty chunk is all there is, or is not there
            raise FileError(NOT_AUTHENTIC)
        try:
            piece = gcm.decrypt(_nonce(counter, final=final), chunk, None)
        except InvalidTag:
            raise FileError(NOT_AUTHENTIC) from None
        yield piece, final
        advanced(len(chunk))


def _chunks(source: BinaryIO, size: int) -> Iterator[tuple[bytes, bool]]:
    """All of a source in pieces, and of each whether it is the last. There is one at least."""
    chunk = read_exactly(source, size)
    while len(chunk) == size and (following := read_exactly(source, size)):
        yield chunk, False
        chunk = following
    yield chunk, True


def _nonce(counter: int, *, final: bool) -> bytes:
    if counter >= _MOST_CHUNKS:
        raise FileError(f"a file has at most {_MOST_CHUNKS} chunks of {CHUNK} bytes")
    return counter.to_bytes(11, "big") + bytes([final])
