"""Encrypted files: a second implementation reads them too, and any change is noticed."""

import hashlib
import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from reference import file_decoder
from support.keys import RecipientFor
from vectors import make_files

from keyferry.files import FileError, Header, decrypt, encrypt, header, read_header, stream
from keyferry.module import DataKey, ModuleError, SoftwareModule
from keyferry.module.interface import DataKeyRecord

CHUNK, SEALED = stream.CHUNK, stream.CHUNK + 16
MODULE = SoftwareModule.generate("RSA_2048")
RECORD = DataKeyRecord(
    KeyId="k" * 36, KeyVersionId="v" * 36, CiphertextBlob="QmxvYg==", EncryptionContext={"tenant": "acme"}
)
DATA_KEY = b"k" * 32


def imported(data_key: bytes) -> DataKey:
    """A data key of the test's own choice, in the module."""
    return MODULE.import_data_key(RecipientFor(MODULE).wrap(data_key))


KEY = imported(DATA_KEY)


def encrypted(plaintext: bytes, key: DataKey = KEY, record: DataKeyRecord = RECORD, name: str = "reports") -> bytes:
    """A whole file."""
    target = io.BytesIO()
    encrypt(io.BytesIO(plaintext), target, MODULE, key, record, name=name)
    return target.getvalue()


def decrypted(file: bytes, key: DataKey = KEY) -> bytes:
    """Return the plaintext. Raises `FileError`."""
    source, target = io.BytesIO(file), io.BytesIO()
    decrypt(source, target, MODULE, key, read_header(source))
    return target.getvalue()


def refused(file: bytes, key: DataKey = KEY) -> str:
    """Assert the one error of an invalid file."""
    with pytest.raises(FileError) as caught:
        decrypted(file, key)
    return str(caught.value)


SIZES = [0, 1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 5 * CHUNK + 3]


@pytest.mark.parametrize("size", SIZES)
def test_both_implementations_decrypt_encrypted_files(size: int) -> None:
    """Sizes are around the ends of chunks; every 65,536 bytes add 16, besides the header."""
    plaintext = os.urandom(size)
    file = encrypted(plaintext)
    assert decrypted(file) == plaintext
    assert file_decoder.read(DATA_KEY, file) == plaintext
    bound = len(read_header(io.BytesIO(file)).to_bytes())
    assert len(file) == bound + size + 16 * max(1, -(-size // CHUNK))
    record = json.dumps({"Name": "reports", **RECORD}).encode()
    assert decrypted(file_decoder.write(DATA_KEY, record, os.urandom(32), os.urandom(12), plaintext)) == plaintext


def test_the_header_brings_the_record_back() -> None:
    """A name in any script and a context of the greatest length are read back."""
    context = {"é" * 1_000: "名" * 7_000, '"\\\n': "\0"}
    file = encrypted(b"x", record={**RECORD, "EncryptionContext": context}, name="名")
    read = read_header(io.BytesIO(file))
    assert (read.name, read.record) == ("名", {**RECORD, "EncryptionContext": context})
    assert file_decoder.record_of(file) == {"Name": "名", **read.record}


def test_two_files_have_nothing_in_common() -> None:
    """Each file has a fresh key."""
    first, second = encrypted(b"x" * 1_000), encrypted(b"x" * 1_000)
    start = len(header.MAGIC) + 4 + int.from_bytes(first[16:20], "big")
    assert first[:start] == second[:start]
    pieces = {first[at : at + 16] for at in range(start, len(first) - 16)}
    assert not pieces & {second[at : at + 16] for at in range(start, len(second) - 16)}


# --- changed files ----------------------------------------------------------------------------------------------------


def test_one_bit_anywhere_of_a_file_is_noticed() -> None:
    """A flip of any single bit of the header or of a chunk is noticed."""
    file = encrypted(b"plaintext")
    messages = set()
    for bit in range(8 * len(file)):
        changed = bytearray(file)
        changed[bit // 8] ^= 1 << bit % 8
        messages.add(refused(bytes(changed)))
    assert messages == {
        header.NOT_AUTHENTIC,
        "not a file that keyferry encrypted",
        "encrypted in a newer format; use a newer keyferry",
    }


LARGE = encrypted(os.urandom(3 * CHUNK + 100))


@given(st.integers(0, 8 * len(LARGE) - 1))
def test_one_bit_anywhere_of_a_large_file_is_noticed(bit: int) -> None:
    """A flipped bit is noticed in any chunk."""
    changed = bytearray(LARGE)
    changed[bit // 8] ^= 1 << bit % 8
    refused(bytes(changed))


@given(st.integers(0, len(LARGE) - 1))
def test_truncated_file_is_noticed(length: int) -> None:
    """A file that ends at any other byte raises an error."""
    refused(LARGE[:length])


def parts(file: bytes) -> tuple[bytes, list[bytes]]:
    """Header and chunks."""
    bound = len(read_header(io.BytesIO(file)).to_bytes())
    return file[:bound], [file[at : at + SEALED] for at in range(bound, len(file), SEALED)]


def test_chunks_open_only_in_place_and_in_their_file() -> None:
    """Truncated, extended, reordered, doubled, missing and exchanged chunks do not open."""
    plaintext = os.urandom(CHUNK) * 4  # equal chunks, so that only their places tell them apart
    first, (a, b, c, d) = parts(encrypted(plaintext))
    other, (e, _, _, h) = parts(encrypted(plaintext))
    assert decrypted(first + a + b + c + d) == plaintext
    _, (empty,) = parts(encrypted(b""))
    for chunks in (
        [], [a], [a, b, c], [b, c, d], [a, c, d], [a, b, d],
        [b, a, c, d], [a, b, d, c], [d, a, b, c],
        [a, a, b, c, d], [a, b, c, d, d], [a, b, c, c],
        [a, b, c, d, a], [a, b, c, d, e], [a, b, c, d, b"\0"], [a, b, c, d, empty], [a, b, c, d[:16]],
        [e, b, c, d], [a, b, c, h], [a, b, c, d[:-1]], [a + b"\0", b, c, d], [d],
    ):  # fmt: skip
        assert refused(first + b"".join(chunks)) == header.NOT_AUTHENTIC
    assert refused(other + a + b + c + d) == header.NOT_AUTHENTIC


def test_a_header_with_another_record_opens_nothing() -> None:
    """The header binds the record with its name and context, even if the data key is the same."""
    file = encrypted(b"x")
    for changed in (
        {"Name": "reportz"},
        {"EncryptionContext": {"tenant": "acmf"}},
        {"KeyId": "x" * 36},
        {"CiphertextBlob": "QmxvYw=="},
    ):
        record = json.dumps({"Name": "reports", **RECORD, **changed}, separators=(",", ":")).encode()
        length = int.from_bytes(file[16:20], "big")
        assert (
            refused(file[:16] + len(record).to_bytes(4, "big") + record + file[20 + length :]) == header.NOT_AUTHENTIC
        )


def test_empty_last_chunk_is_allowed_in_empty_files_only() -> None:
    """Each file has exactly one valid form."""
    source = io.BytesIO(encrypted(b"x" * CHUNK))
    key = header.payload_key(MODULE, KEY, read := read_header(source))
    gcm = AESGCM(key)
    chunks = gcm.encrypt(bytes(12), b"x" * CHUNK, None), gcm.encrypt(bytes(10) + b"\x01\x01", b"", None)
    assert refused(read.to_bytes() + b"".join(chunks)) == header.NOT_AUTHENTIC


def test_another_data_key_opens_nothing() -> None:
    """Another data key, of any length, raises an error."""
    for other in (b"x" * 32, b"k" * 16):
        assert refused(encrypted(b"plaintext"), imported(other)) == header.NOT_AUTHENTIC


def test_file_key_is_committed_to_its_header() -> None:
    """The commitment is compared before decryption."""
    file = bytearray(encrypted(b"x"))
    read = read_header(io.BytesIO(bytes(file)))
    with pytest.raises(FileError):
        header.payload_key(MODULE, KEY, read._replace(commitment=bytes(32)))
    with pytest.raises(FileError):
        header.payload_key(MODULE, KEY, read._replace(bound=read.bound[:-1] + bytes([read.bound[-1] ^ 1])))


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_a_file_or_a_file_error(data: bytes, begins_right: bool) -> None:
    """Any bytes open or raise FileError."""
    refused((header.MAGIC + b"\0\0" if begins_right else b"") + data)


JSON = st.none() | st.integers() | st.text(max_size=3) | st.dictionaries(st.text(max_size=3), st.text() | st.none())


@given(
    st.dictionaries(
        st.sampled_from(["Name", "KeyId", "KeyVersionId", "CiphertextBlob", "EncryptionContext", "More"]), JSON
    )
    | JSON
)
def test_any_json_is_a_record_or_a_file_error(record: Any) -> None:
    """A record has strings where they are due, and no other fields."""
    text = json.dumps(record).encode()
    file = header.MAGIC + len(text).to_bytes(4, "big") + text + bytes(92)
    try:
        read = read_header(io.BytesIO(file))
    except FileError:
        return
    context = read.record["EncryptionContext"]
    assert all(isinstance(each, str) for each in (read.name, read.record["KeyId"], *context, *context.values()))
    assert set(read.record) == set(RECORD)


def test_record_with_a_duplicate_key_is_refused() -> None:
    """Two readers could read different values."""
    text = json.dumps({"Name": "a", **RECORD}).replace('"Name"', '"Name": "b", "Name"').encode()
    with pytest.raises(FileError):
        read_header(io.BytesIO(header.MAGIC + len(text).to_bytes(4, "big") + text + bytes(92)))


# --- limits -----------------------------------------------------------------------------------------------------------


class Dripping(io.RawIOBase):
    """A pipe that returns a few bytes at a time, always fewer than requested."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        part = self._data[: max(1, size // 3)]
        self._data = self._data[len(part) :]
        return bytes(part)


def test_short_reads_of_a_pipe_fill_whole_chunks() -> None:
    """Chunks have their usual length, however short the reads of a pipe are."""
    plaintext = os.urandom(2 * CHUNK + 5)
    target = io.BytesIO()
    source: Any = Dripping(plaintext)
    encrypt(source, target, MODULE, KEY, RECORD)
    assert file_decoder.read(DATA_KEY, target.getvalue()) == plaintext
    source = Dripping(target.getvalue())
    opened = io.BytesIO()
    decrypt(source, opened, MODULE, KEY, read_header(source))
    assert opened.getvalue() == plaintext


class Zeros(io.RawIOBase):
    """A large file of zeros that takes no room."""

    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int = -1) -> bytes:
        got = min(size, self._left)
        self._left -= got
        return bytes(got)


class Nowhere(io.RawIOBase):
    """Takes everything."""

    def write(self, data: Any) -> int:
        return len(data)


def test_a_large_file_takes_no_more_memory_than_a_small_one() -> None:
    """Memory holds a few chunks at a time."""
    peaks = []
    for chunks in (8, 512):
        tracemalloc.start()
        source: Any = Zeros(chunks * CHUNK)
        target: Any = Nowhere()
        encrypt(source, target, MODULE, KEY, RECORD)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + CHUNK < 8 * CHUNK


def test_progress_is_reported_in_bytes_read() -> None:
    """Progress is reported once per chunk."""
    told: list[int] = []
    target = io.BytesIO()
    encrypt(io.BytesIO(bytes(CHUNK + 1)), target, MODULE, KEY, RECORD, advanced=told.append)
    assert told == [CHUNK, 1]
    told.clear()
    source = io.BytesIO(target.getvalue())
    decrypt(source, io.BytesIO(), MODULE, KEY, read_header(source), advanced=told.append)
    assert told == [SEALED, 17]


def test_a_file_that_is_too_long_for_its_counter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is 256 TiB; in this test it is two chunks."""
    file = encrypted(bytes(3 * CHUNK))
    monkeypatch.setattr(stream, "_MAX_CHUNKS", 2)
    assert len(encrypted(bytes(2 * CHUNK))) > 2 * CHUNK
    with pytest.raises(FileError, match="at most 2 chunks"):
        encrypted(bytes(2 * CHUNK + 1))
    assert "at most 2 chunks" in refused(file)


def test_a_record_that_is_too_long_is_refused() -> None:
    """The refusal comes before the first byte of OUT."""
    target = io.BytesIO()
    record: DataKeyRecord = {**RECORD, "EncryptionContext": {"a": "x" * 70_000}}
    with pytest.raises(FileError, match="at most 65536"):
        encrypt(io.BytesIO(b"x"), target, MODULE, KEY, record)
    assert not target.getvalue()


def test_missing_data_key_raises_the_modules_error() -> None:
    """Nothing is written to OUT."""
    target = io.BytesIO()
    with pytest.raises(ModuleError):
        encrypt(io.BytesIO(b"x"), target, MODULE, DataKey(), RECORD)
    assert not target.getvalue()


# --- frozen vectors ---------------------------------------------------------------------------------------------------

VECTORS = json.loads(make_files.PATH.read_text())


def test_vectors_match_their_generator() -> None:
    """The vectors were not edited by hand."""
    assert make_files.document() == VECTORS


@pytest.mark.parametrize("case", VECTORS["files"], ids=lambda case: f"{case['length']} bytes")
def test_format_1_is_frozen(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The client writes and reads each vector from its file key and nonce."""
    plaintext = make_files.drawn(case["plaintext_label"], case["length"])
    key = imported(bytes.fromhex(case["data_key"]))
    record = json.loads(case["record"])
    name = record.pop("Name")
    random: Iterator[bytes] = iter([bytes.fromhex(case["file_key"]), bytes.fromhex(case["nonce"])])
    with monkeypatch.context() as patch:
        patch.setattr(os, "urandom", lambda size: _of(size, next(random)))
        file = encrypted(plaintext, key, record, name)
    assert file[: make_files.SHOWN].hex() == case["file"]
    assert (len(file), hashlib.sha256(file).hexdigest()) == (case["file_length"], case["file_sha256"])
    assert decrypted(file, key) == plaintext


def _of(size: int, drawn: bytes) -> bytes:
    assert len(drawn) == size
    return drawn


def test_the_page_has_the_numbers_of_the_code() -> None:
    """The sizes on docs/files.md are those of the code."""
    text = (Path(__file__).parents[1] / "docs" / "files.md").read_text()
    for each in (header.MAGIC[:-1].decode(), header._INFO.decode(), f"{CHUNK:,}", f"{header.MAX_RECORD_BYTES:,}"):
        assert each in text


def test_a_header_is_written_as_it_was_read() -> None:
    """A header that is read and written again has the same bytes."""
    file = encrypted(b"x")
    source: BinaryIO = io.BytesIO(file)
    read = read_header(source)
    assert isinstance(read, Header)
    assert file.startswith(read.to_bytes())
    assert source.tell() == len(read.to_bytes())
