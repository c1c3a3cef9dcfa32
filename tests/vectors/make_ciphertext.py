"""Writes ciphertext.json with the second implementation only: `PYTHONPATH=tests python tests/vectors/make_ciphertext.py`.

Format 0x01 is frozen: cases may be added, and none may ever change. Every run gives the same bytes. Keys and salts are
SHAKE-256 of their purposes, so that none of them can have been chosen.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from reference import blob_decoder

Case: TypeAlias = dict[str, Any]

PATH = Path(__file__).with_name("ciphertext.json")
KEY_ID = "6f1b8a52-3c0e-4d7a-9f25-b1d4c07e8a11"
VERSION_ID = "c2d90e17-58a4-4b63-8e0f-27a5d1936b44"
KEY_SIZES = {"Aliyun_AES_256": 32, "Aliyun_SM4": 16}
HEADER = {
    "format": "CiphertextBlob, format byte 0x01, before Base64",
    "specification": "docs/ciphertext.md",
    "origin": "Keyferry; keys, salts and plaintexts are SHAKE-256 of a label, but for the case of the agent's self-test",
    "generator": "tests/vectors/make_ciphertext.py, with tests/reference/blob_decoder.py: no code of the agent",
    "verifier": "tests/test_ciphertext.py: the agent makes every valid blob from its salt, opens it, and opens no invalid one",
    "notes": {
        "encryption_context": "null: the request had none; it binds as {} does",
        "valid": "sealing plaintext with these values and this salt gives exactly blob, and blob opens to plaintext",
        "invalid": "blob does not open with these values; salt and plaintext are those of the valid blob it was made from",
        "hex": "cmk, salt, plaintext, blob",
    },
}
CONTEXTS: dict[str, dict[str, str]] = {
    "an empty context: binds as none does": {},
    "one pair": {"purpose": "backup"},
    "pairs in another order than the encoding's": {
        "tenant": "acme",
        "a10": "x",
        "a2": "y",
        "app": "ledger",
        "B": "upper",
    },
    "a value that looks like a second pair": {"a": "1&b=2"},
    "two pairs that look like that value": {"a": "1", "b": "2"},
    "a key of one character": {"a": "bc"},
    "the same characters, a key of two": {"ab": "c"},
    "an empty key and an empty value": {"": ""},
    "an empty value": {"a": ""},
    "an empty key": {"": "a"},
    "keys that are prefixes of one another": {"aa": "2", "a": "1", "": "0", "aaa": "3"},
    "characters of two and three bytes": {"名称": "数据密钥", "größe": "32 Bytes"},
    "composed": {"caf\u00e9": "\u00e9"},
    "decomposed: no normalisation takes place": {"cafe\u0301": "e\u0301"},
    "UTF-8 orders these keys unlike UTF-16": {"\U0001f511": "after", "\uff5e": "before"},
    "control characters, quotes and NUL": {"a\0b": "c\nd", '"\\': "\x7f"},
    "a value longer than 255 bytes": {"long": "v" * 300},
}


def value(label: str, size: int) -> bytes:
    """Bytes for one purpose, the same in every run."""
    return hashlib.shake_256(b"keyferry ciphertext vectors: " + label.encode()).digest(size)


def valid(
    comment: str, key_spec: str, context: dict[str, str] | None, plaintext: bytes, salt: bytes | None = None
) -> Case:
    """A case that opens."""
    case = {
        "comment": comment,
        "result": "valid",
        "key_spec": key_spec,
        "cmk": value(f"{key_spec} cmk", KEY_SIZES[key_spec]).hex(),
        "key_id": KEY_ID,
        "key_version_id": VERSION_ID,
        "salt": (salt or value(f"{key_spec} salt {comment}", 32)).hex(),
        "encryption_context": context,
        "plaintext": plaintext.hex(),
    }
    return sealed(case)


def sealed(case: Case, format_byte: int = 0x01) -> Case:
    """The case with the blob that its values give."""
    cmk, salt, plaintext = (bytes.fromhex(case[name]) for name in ("cmk", "salt", "plaintext"))
    blob = blob_decoder.seal_blob(
        case["key_spec"],
        cmk,
        case["key_version_id"],
        case["key_id"],
        case["encryption_context"],
        plaintext,
        salt,
        format_byte,
    )
    return {**case, "blob": blob.hex()}


def self_test(key_spec: str) -> Case:
    """The agent's checks at every start: values that are easy to write."""
    case = valid("the agent's self-test", key_spec, None, b"keyferry self-test", bytes(range(0xA0, 0xC0)))
    case["cmk"] = bytes(range(KEY_SIZES[key_spec])).hex()
    case["key_version_id"] = "00000000-0000-4000-8000-000000000001"
    case["key_id"] = "00000000-0000-4000-8000-000000000002"
    return sealed(case)


def invalid(base: Case, comment: str, **changes: object) -> Case:
    """A case made from a valid one, that does not open."""
    return {**base, "comment": comment, "result": "invalid", **changes}


def damaged(base: Case) -> Iterator[Case]:
    """The blob of a valid case, with one thing wrong in it."""
    blob = bytes.fromhex(base["blob"])
    fields = {
        "KeyVersionId, first byte": (0, 0x01),
        "KeyVersionId, last byte": (35, 0x04),
        "KeyVersionId, no longer ASCII": (20, 0x80),
        "format 0x00": (36, 0x01),
        "format 0x03": (36, 0x02),
        "format 0x81": (36, 0x80),
        "salt, first bit": (37, 0x80),
        "salt, last bit": (68, 0x01),
        "commitment, first bit": (69, 0x80),
        "commitment, last bit": (100, 0x01),
        "ciphertext, first bit": (101, 0x80),
        "ciphertext, last bit": (len(blob) - 17, 0x01),
        "tag, first bit": (len(blob) - 16, 0x80),
        "tag, last bit": (len(blob) - 1, 0x01),
    }
    for name, (position, bit) in fields.items():
        flipped = blob[:position] + bytes([blob[position] ^ bit]) + blob[position + 1 :]
        yield invalid(base, f"one bit flipped: {name}", blob=flipped.hex())
    lengths = {
        "nothing": b"",
        "KeyVersionId and format only": blob[:37],
        "no ciphertext and no tag": blob[:101],
        "no ciphertext": blob[:101] + blob[-16:],
        "a ciphertext of one byte that was longer": blob[:102] + blob[-16:],
        "the last byte missing": blob[:-1],
        "the first byte missing": blob[1:],
        "the tag missing": blob[:-16],
        "a zero byte more": blob + b"\0",
        "a byte more before it": b"\0" + blob,
        "its tag twice": blob + blob[-16:],
        "itself twice": blob + blob,
    }
    for name, wrong in lengths.items():
        yield invalid(base, f"length: {name}", blob=wrong.hex())


def misused(base: Case) -> Iterator[Case]:
    """The whole blob of a valid case, opened with other values than it was sealed with."""
    contexts: dict[str, dict[str, str] | None] = {
        "none": None,
        "a pair missing": {"a": "1"},
        "a pair more": {"a": "1", "b": "2", "c": "3"},
        "another value": {"a": "1", "b": "3"},
        "another key": {"a": "1", "c": "2"},
        "values exchanged": {"a": "2", "b": "1"},
        "another case": {"A": "1", "b": "2"},
        "a space more": {"a": "1", "b": "2 "},
        "the one that joins alike": {"a": "1&b=2"},
    }
    for name, context in contexts.items():
        yield invalid(base, f"another context: {name}", encryption_context=context)
    yield invalid(base, "another KeyId", key_id=VERSION_ID)
    yield invalid(base, "KeyId in upper case", key_id=KEY_ID.upper())
    yield invalid(base, "an empty KeyId", key_id="")
    yield invalid(base, "another master key", cmk=value("another cmk", len(base["cmk"]) // 2).hex())
    cmk = bytes.fromhex(base["cmk"])
    yield invalid(base, "a master key that differs in one bit", cmk=(cmk[:-1] + bytes([cmk[-1] ^ 1])).hex())
    other = next(spec for spec in KEY_SIZES if spec != base["key_spec"])
    yield invalid(base, "another key spec", key_spec=other, cmk=(cmk + cmk)[: KEY_SIZES[other]].hex())


def forged(base: Case) -> Iterator[Case]:
    """Blobs of an author who knows the key: their fault is not a wrong tag."""
    empty = sealed({**base, "plaintext": ""})
    yield invalid(empty, "no ciphertext, with the tag that belongs to none")
    yield invalid(sealed(base, 0x02), "format 0x02, with the tag that belongs to it")
    stranger = {**base, "cmk": value("another cmk", len(base["cmk"]) // 2).hex()}
    blob, strange = bytes.fromhex(base["blob"]), bytes.fromhex(sealed(stranger)["blob"])
    yield invalid(base, "the commitment of another master key", blob=(blob[:69] + strange[69:101] + blob[101:]).hex())
    yield invalid(base, "the commitment of this key over another's data", blob=(blob[:101] + strange[101:]).hex())
    renamed = bytes.fromhex(sealed({**base, "key_version_id": KEY_ID})["blob"])
    yield invalid(base, "another version's blob under this version's name", blob=(blob[:37] + renamed[37:]).hex())


def cases() -> Iterator[Case]:
    """All of them, in the file's order."""
    for key_spec in KEY_SIZES:
        yield self_test(key_spec)
        for size in (1, 16, 32, 1024):
            plaintext = value(f"plaintext of {size}", size)
            yield valid(f"{size} byte{'s'[: size > 1]} of plaintext, no context", key_spec, None, plaintext)
        # One plaintext and one salt: the blobs differ only by the bound contexts.
        shared = value("plaintext", 32), value(f"{key_spec} salt", 32)
        yield valid("no context", key_spec, None, *shared)
        for comment, context in CONTEXTS.items():
            yield valid(comment, key_spec, context, *shared)
        base = valid("", key_spec, {"a": "1", "b": "2"}, *shared)
        yield from damaged(base)
        yield from misused(base)
        yield from forged(base)


def document() -> str:
    """The file's text."""
    listed = [{"id": number, **case} for number, case in enumerate(cases(), 1)]
    content = {**HEADER, "number_of_cases": len(listed), "cases": listed}
    return json.dumps(content, indent=2, ensure_ascii=True) + "\n"


if __name__ == "__main__":
    PATH.write_text(document(), encoding="ascii")
