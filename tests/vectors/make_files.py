"""Writes files.json with the second implementation only: `PYTHONPATH=tests python tests/vectors/make_files.py`.

Format 1 is frozen: cases may be added, and none may ever change. Every run gives the same bytes. Keys and nonces are SHAKE-256
of their purposes, so that none of them can have been chosen.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeAlias

from reference import file_decoder

Case: TypeAlias = dict[str, Any]

PATH = Path(__file__).with_name("files.json")
SHOWN = 1_024
HEADER = {
    "format": "files that begin with keyferry-file/1",
    "specification": "docs/files.md",
    "origin": "Keyferry; keys, nonces and plaintexts are SHAKE-256 of a label",
    "generator": "tests/vectors/make_files.py, with tests/reference/file_decoder.py: no code of the client",
    "verifier": "tests/test_files.py: the client writes every file so from its file key and nonce, and reads it",
    "notes": {
        "record": "the header's JSON, as text",
        "plaintext": "the first `length` bytes of SHAKE-256 of `plaintext_label`",
        "file": "the file itself, in hex; of a longer one its first bytes, and the SHA-256 of all of it",
    },
}
RECORD = {
    "Name": "reports",
    "KeyId": "6f1b8a52-3c0e-4d7a-9f25-b1d4c07e8a11",
    "KeyVersionId": "c2d90e17-58a4-4b63-8e0f-27a5d1936b44",
    "CiphertextBlob": "QmxvYg==",
    "EncryptionContext": {"tenant": "acme", "名称": "größe"},
}
CHUNK = file_decoder.CHUNK
LENGTHS = (0, 1, 1_000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 17)


def drawn(label: str, length: int) -> bytes:
    """Bytes that are not chosen."""
    return hashlib.shake_256(label.encode()).digest(length)


def case(number: int, length: int, key_size: int, record: Case) -> Case:
    """One file."""
    label = f"keyferry file vector {number}: "
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    data_key, file_key = drawn(f"{label}data key", key_size), drawn(f"{label}file key", 32)
    nonce, plaintext = drawn(f"{label}nonce", 12), drawn(f"{label}plaintext", length)
    file = file_decoder.write(data_key, text.encode(), file_key, nonce, plaintext)
    return {
        "data_key": data_key.hex(),
        "file_key": file_key.hex(),
        "nonce": nonce.hex(),
        "record": text,
        "plaintext_label": f"{label}plaintext",
        "length": length,
        "file": file[:SHOWN].hex(),
        "file_length": len(file),
        "file_sha256": hashlib.sha256(file).hexdigest(),
    }


def document() -> Case:
    """All of it."""
    bare = {**RECORD, "Name": "", "EncryptionContext": {}}
    cases = [case(number, length, 32, RECORD) for number, length in enumerate(LENGTHS)]
    cases += [case(len(cases) + number, 5, size, bare) for number, size in enumerate((16, 24))]
    return {**HEADER, "files": cases}


if __name__ == "__main__":
    PATH.write_text(json.dumps(document(), indent=1, ensure_ascii=False) + "\n")
