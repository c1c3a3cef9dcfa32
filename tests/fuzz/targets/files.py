"""Encrypted files: a header and chunks, read as a second reader reads them."""

import functools
import io
import json
from unittest.mock import patch

from reference import file_decoder
from support.keys import RecipientFor

from keyferry.files import FileError, Header, decrypt, read_header, stream
from keyferry.module import DataKey, SoftwareModule

from ..memory_bound import assert_memory_bounded

DATA_KEY = bytes(range(32))
CHUNK = 32
"""Bytes of a chunk here: so that a short file has several."""


@functools.cache
def _module() -> tuple[SoftwareModule, DataKey]:
    module = SoftwareModule.generate("RSA_2048")
    return module, module.import_data_key(RecipientFor(module).wrap(DATA_KEY))


def encrypted_file(data: bytes) -> None:
    """A file as it is. With FF before it, it is the plaintext of a file, and opens: in pieces, after its length in a byte."""
    if data[:1] == b"\xff":
        return _written(data[1:])
    header = assert_memory_bounded(lambda: _header(data), len(data), times=64)
    if header is not None:
        assert data.startswith(header.to_bytes())
        assert file_decoder.record_of(data) == {"Name": header.name, **header.record}
    assert _opened(data, header) == _second(data, header)
    return None


def _written(plaintext: bytes) -> None:
    record = {"Name": "", "KeyId": "k", "KeyVersionId": "v", "CiphertextBlob": "b", "EncryptionContext": {}}
    with patch.object(file_decoder, "CHUNK", CHUNK):
        file = file_decoder.write(DATA_KEY, json.dumps(record).encode(), bytes(32), bytes(12), plaintext)
    assert _opened(file, _header(file)) == plaintext
    for cut in {0, 1, CHUNK + 15, CHUNK + 16, len(file) // 2, len(file) - 1}:
        assert _opened(file[:cut], _header(file[:cut])) is None
    longer = file + bytes(CHUNK + 16)
    assert _opened(longer, _header(longer)) is None


def _header(file: bytes) -> Header | None:
    try:
        return read_header(io.BytesIO(file))
    except FileError:
        return None


def _opened(file: bytes, header: Header | None) -> bytes | None:
    if header is None:
        return None
    module, key = _module()
    source, target = io.BytesIO(file), io.BytesIO()
    source.seek(len(header.to_bytes()))
    try:
        with patch.object(stream, "CHUNK", CHUNK):
            decrypt(source, target, module, key, header)
    except FileError:
        return None
    return target.getvalue()


def _second(file: bytes, header: Header | None) -> bytes | None:
    """Open the file by the reference decoder, which does not check the record's content."""
    if header is None:
        return None
    try:
        with patch.object(file_decoder, "CHUNK", CHUNK):
            return file_decoder.read(DATA_KEY, file)
    except file_decoder.NotAuthentic:
        return None
