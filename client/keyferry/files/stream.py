"""The chunks: the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár, CRYPTO 2015) over AES-256-GCM.

Each chunk is encrypted under the file's own key with the nonce `uint88 counter ‖ final`, as in age's payload: a chunk opens in
its place of its file only, and the last one only as the last.
"""

from collections.abc import Callable, Iterator
from typing import BinaryIO, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..module.interface import CryptographicModule, DataKey
from ..record import DataKeyRecord
from .header import NOT_AUTHENTIC, FileError, Header, new_header, payload_key, read_exactly

__all__ = ["CHUNK", "decrypt", "encrypt"]

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
    header, chunk_key = new_header(module, key, record, name)
    target.write(header.to_bytes())
    gcm = AESGCM(chunk_key)
    for counter, (chunk, final) in enumerate(_chunks(source, CHUNK)):
        target.write(gcm.encrypt(_nonce(counter, final=final), chunk, None))
        advanced(len(chunk))


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
    gcm = AESGCM(payload_key(module, key, header))
    for counter, (chunk, final) in enumerate(_chunks(source, CHUNK + _TAG)):
        if len(chunk) < _TAG or (len(chunk) == _TAG and counter):  # an empty chunk is all there is, or is not there
            raise FileError(NOT_AUTHENTIC)
        try:
            target.write(gcm.decrypt(_nonce(counter, final=final), chunk, None))
        except InvalidTag:
            raise FileError(NOT_AUTHENTIC) from None
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
