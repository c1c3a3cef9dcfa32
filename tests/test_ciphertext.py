"""CiphertextBlob: the agent's code against frozen vectors and a second implementation, and its refusals."""

import ast
import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from reference import blob_decoder
from vectors import make_ciphertext

from keyferry.secret import SecretMemory
from keyferry_agent.crypto import ciphertext_blob, selftest
from keyferry_agent.crypto.aad import associated_data

Case: TypeAlias = dict[str, Any]

VERSION_ID = "c2d90e17-58a4-4b63-8e0f-27a5d1936b44"
KEY_ID = "6f1b8a52-3c0e-4d7a-9f25-b1d4c07e8a11"
DOCUMENT = json.loads(make_ciphertext.PATH.read_text(encoding="ascii"))
CASES: list[Case] = DOCUMENT["cases"]
VALID = [case for case in CASES if case["result"] == "valid"]
INVALID = [case for case in CASES if case["result"] == "invalid"]

# A loaded machine may take its time.
PATIENT = settings(deadline=None)
SLOW = settings(PATIENT, max_examples=60)

key_specs = st.sampled_from(sorted(ciphertext_blob.KEY_SIZES))
contexts = st.dictionaries(st.text(max_size=12), st.text(max_size=12), max_size=5)


@pytest.fixture(scope="module")
def scratch() -> Iterator[SecretMemory]:
    """Memory for intermediate keys, as the agent has it; locked where the system allows."""
    with contextlib.closing(SecretMemory(4096, require=False)) as memory:
        yield memory


def name_of(case: Case) -> str:
    return f"{case['id']}-{case['key_spec']}-{case['comment']}".replace(" ", "_")


def view(data: bytes) -> memoryview:
    """A writable buffer of its own, as secret memory lends it."""
    return memoryview(bytearray(data))


def seal_with(case: Case, scratch: SecretMemory) -> bytes:
    """Return the agent's blob of a case's values, its salt among them."""
    cmk, plaintext = view(bytes.fromhex(case["cmk"])), view(bytes.fromhex(case["plaintext"]))
    context = case["encryption_context"] or {}
    salt = bytes.fromhex(case["salt"])
    return ciphertext_blob.bind(case["key_spec"], case["key_version_id"], case["key_id"], context).encrypt(
        cmk, plaintext, scratch, salt
    )


def open_blob(
    scratch: SecretMemory, key_spec: str, cmk: bytes, key_id: str, context: dict[str, str] | None, blob: bytes
) -> bytes:
    """Return the plaintext that the agent decrypts from a blob whose KeyVersionId has this master key."""
    ciphertext_blob.key_version_id(blob)
    out = bytearray(ciphertext_blob.plaintext_size(blob))
    ciphertext_blob.decrypt_into(key_spec, view(cmk), blob, key_id, context or {}, memoryview(out), scratch)
    return bytes(out)


def values_to_open(case: Case) -> tuple[str, bytes, str, dict[str, str] | None, bytes]:
    cmk, blob = bytes.fromhex(case["cmk"]), bytes.fromhex(case["blob"])
    return case["key_spec"], cmk, case["key_id"], case["encryption_context"], blob


def sample(key_spec: str, scratch: SecretMemory) -> tuple[bytes, bytes]:
    """A master key, and a blob that the agent sealed under it for {"a": "1"}."""
    cmk = bytes(range(ciphertext_blob.KEY_SIZES[key_spec]))
    return cmk, ciphertext_blob.bind(key_spec, VERSION_ID, KEY_ID, {"a": "1"}).encrypt(
        view(cmk), view(b"0123456789abcdef" * 2), scratch
    )


# The vectors


def test_the_generator_gives_the_committed_file_byte_for_byte() -> None:
    assert make_ciphertext.PATH.read_bytes() == make_ciphertext.document().encode("ascii")


def test_the_file_holds_all_its_cases() -> None:
    assert DOCUMENT["number_of_cases"] == len(CASES) == 138
    assert (len(VALID), len(INVALID)) == (46, 92)


def test_reference_decoder_imports_nothing_of_the_product() -> None:
    tree = ast.parse(Path(blob_decoder.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == {
        "Cryptodome",
        "collections",
        "gmssl",
        "hmac",
        "struct",
        "typing",
    }


@pytest.mark.parametrize("case", VALID, ids=name_of)
def test_encryption_with_a_vectors_salt_returns_its_blob(scratch: SecretMemory, case: Case) -> None:
    assert seal_with(case, scratch).hex() == case["blob"]


@pytest.mark.parametrize("case", VALID, ids=name_of)
def test_a_valid_blob_opens(scratch: SecretMemory, case: Case) -> None:
    assert open_blob(scratch, *values_to_open(case)).hex() == case["plaintext"]
    assert ciphertext_blob.key_version_id(bytes.fromhex(case["blob"])) == case["key_version_id"]


@pytest.mark.parametrize("case", INVALID, ids=name_of)
def test_an_invalid_blob_does_not_open(scratch: SecretMemory, case: Case) -> None:
    with pytest.raises(ciphertext_blob.BlobError):
        open_blob(scratch, *values_to_open(case))
    with pytest.raises(blob_decoder.NotAuthentic):
        blob_decoder.open_blob(*values_to_open(case))


def test_only_empty_contexts_share_a_blob() -> None:
    """With one key, salt and plaintext, only the absent context and {} have the same blob."""
    for key_spec in ciphertext_blob.KEY_SIZES:
        salt = make_ciphertext.value(f"{key_spec} salt", 32).hex()
        blobs: dict[str, list[Any]] = {}
        for case in VALID:
            if case["key_spec"] == key_spec and case["salt"] == salt:
                blobs.setdefault(case["blob"], []).append(case["encryption_context"])
        assert len(blobs) == len(make_ciphertext.CONTEXTS)
        assert [bound for bound in blobs.values() if len(bound) > 1] == [[None, {}]]


def test_the_agents_self_test_holds_the_frozen_blobs() -> None:
    frozen = {case["key_spec"]: case["blob"] for case in VALID if case["comment"] == "the agent's self-test"}
    assert frozen == selftest._SEALED


# The two implementations against each other


@SLOW
@given(key_specs, st.binary(min_size=1, max_size=100), contexts, st.uuids(), st.binary(min_size=32, max_size=32))
@example("Aliyun_AES_256", bytes(6_144), {}, make_ciphertext.KEY_ID, b"k" * 32)
@example("Aliyun_SM4", bytes(6_144), {}, make_ciphertext.KEY_ID, b"k" * 32)
def test_reference_decoder_opens_blobs_of_the_agent(
    scratch: SecretMemory, key_spec: str, plaintext: bytes, context: dict[str, str], key_id: object, key: bytes
) -> None:
    cmk = key[: ciphertext_blob.KEY_SIZES[key_spec]]
    blob = ciphertext_blob.bind(key_spec, VERSION_ID, str(key_id), context).encrypt(view(cmk), view(plaintext), scratch)
    assert len(blob) == len(plaintext) + 117
    assert blob_decoder.open_blob(key_spec, cmk, str(key_id), context, blob) == plaintext


@SLOW
@given(key_specs, st.binary(min_size=1, max_size=100), contexts, st.binary(min_size=64, max_size=64))
def test_agent_opens_blobs_of_the_reference_implementation(
    scratch: SecretMemory, key_spec: str, plaintext: bytes, context: dict[str, str], random: bytes
) -> None:
    cmk, salt = random[: ciphertext_blob.KEY_SIZES[key_spec]], random[32:]
    blob = blob_decoder.seal_blob(key_spec, cmk, VERSION_ID, KEY_ID, context, plaintext, salt)
    assert open_blob(scratch, key_spec, cmk, KEY_ID, context, blob) == plaintext
    same = ciphertext_blob.bind(key_spec, VERSION_ID, KEY_ID, context).encrypt(
        view(cmk), view(plaintext), scratch, salt
    )
    assert same == blob


# Associated data


@PATIENT
@given(contexts, st.text(max_size=40))
def test_the_associated_data_reads_back(context: dict[str, str], key_id: str) -> None:
    header = VERSION_ID.encode() + b"\x01"
    encoded = associated_data(header, key_id, context)
    assert blob_decoder.read_associated_data(encoded) == (header, key_id, context)


# Few characters, among them those of naive encodings: near misses are likely.
near = st.text("a=&,:1\0", max_size=3)
near_contexts = st.dictionaries(near, near, max_size=3)


@settings(PATIENT, max_examples=500)
@given(near, near_contexts, near, near_contexts)
def test_associated_data_is_unique_per_key_id_and_context(
    key_id: str, context: dict[str, str], other_id: str, other: dict[str, str]
) -> None:
    assume((key_id, context) != (other_id, other))
    header = VERSION_ID.encode() + b"\x01"
    assert associated_data(header, key_id, context) != associated_data(header, other_id, other)


@PATIENT
@given(contexts)
def test_the_order_of_a_context_does_not_matter(context: dict[str, str]) -> None:
    turned = dict(reversed(context.items()))
    assert associated_data(b"", KEY_ID, turned) == associated_data(b"", KEY_ID, context)


# Refusals


@pytest.mark.parametrize("key_spec", sorted(ciphertext_blob.KEY_SIZES))
def test_a_blob_with_any_one_bit_flipped_does_not_open(scratch: SecretMemory, key_spec: str) -> None:
    cmk, blob = sample(key_spec, scratch)
    assert len(blob) == 149
    for position, bit in itertools.product(range(len(blob)), range(8)):
        flipped = bytearray(blob)
        flipped[position] ^= 1 << bit
        with pytest.raises(ciphertext_blob.BlobError):
            open_blob(scratch, key_spec, cmk, KEY_ID, {"a": "1"}, bytes(flipped))


@pytest.mark.parametrize("key_spec", sorted(ciphertext_blob.KEY_SIZES))
def test_a_blob_cut_off_anywhere_does_not_open(scratch: SecretMemory, key_spec: str) -> None:
    cmk, blob = sample(key_spec, scratch)
    for size in range(len(blob)):
        with pytest.raises(ciphertext_blob.BlobError):
            open_blob(scratch, key_spec, cmk, KEY_ID, {"a": "1"}, blob[:size])


def test_all_refusals_have_the_same_exception(scratch: SecretMemory) -> None:
    """A sender of blobs learns nothing from the exception's text or cause."""
    seen = set()
    for case in INVALID:
        with pytest.raises(ciphertext_blob.BlobError) as caught:
            open_blob(scratch, *values_to_open(case))
        seen.add((str(caught.value), repr(caught.value), caught.value.__cause__))
    assert seen == {("", "BlobError()", None)}


BLOB = bytes.fromhex(VALID[0]["blob"])


@pytest.mark.parametrize("blob", [b"", BLOB[:117], BLOB[:36] + b"\x02" + BLOB[37:], b"\xb0" + BLOB[1:]])
def test_a_blob_of_another_form_names_no_version(blob: bytes) -> None:
    """Too short for any plaintext, another format, no ASCII: refused before a master key is looked for."""
    with pytest.raises(ciphertext_blob.BlobError):
        ciphertext_blob.key_version_id(blob)


@pytest.mark.parametrize("key_spec", sorted(ciphertext_blob.KEY_SIZES))
def test_another_master_key_is_refused_before_decryption(scratch: SecretMemory, key_spec: str) -> None:
    cmk, blob = sample(key_spec, scratch)
    out = bytearray(32)
    with pytest.raises(ciphertext_blob.BlobError):
        ciphertext_blob.decrypt_into(key_spec, view(cmk[::-1]), blob, KEY_ID, {"a": "1"}, memoryview(out), scratch)
    assert out == bytes(32)


@pytest.mark.parametrize("version_id", ["", VERSION_ID[:-1], VERSION_ID + "0"])
def test_a_version_id_of_another_length_is_not_sealed(scratch: SecretMemory, version_id: str) -> None:
    with pytest.raises(ValueError, match="36 characters"):
        ciphertext_blob.bind("Aliyun_SM4", version_id, KEY_ID, {}).encrypt(view(bytes(16)), view(b"data"), scratch)


def test_a_version_id_beyond_ascii_is_not_sealed(scratch: SecretMemory) -> None:
    with pytest.raises(UnicodeEncodeError):
        ciphertext_blob.bind("Aliyun_SM4", VERSION_ID[:-1] + "é", KEY_ID, {}).encrypt(
            view(bytes(16)), view(b"data"), scratch
        )


# One call


@pytest.mark.parametrize("key_spec", sorted(ciphertext_blob.KEY_SIZES))
def test_equal_plaintexts_have_blobs_that_share_only_the_header(scratch: SecretMemory, key_spec: str) -> None:
    (_, one), (_, two) = sample(key_spec, scratch), sample(key_spec, scratch)
    assert one[:37] == two[:37]
    for field in (slice(37, 69), slice(69, 101), slice(101, -16), slice(-16, None)):
        assert one[field] != two[field]


@pytest.mark.parametrize("key_spec", sorted(ciphertext_blob.KEY_SIZES))
def test_callers_buffers_are_not_changed(scratch: SecretMemory, key_spec: str) -> None:
    cmk, plaintext = bytes(range(ciphertext_blob.KEY_SIZES[key_spec])), b"the caller wipes this"
    lent, data = view(cmk), view(plaintext)
    blob = ciphertext_blob.bind(key_spec, VERSION_ID, KEY_ID, {}).encrypt(lent, data, scratch)
    out = view(bytes(len(plaintext)))
    ciphertext_blob.decrypt_into(key_spec, lent, blob, KEY_ID, {}, out, scratch)
    assert (bytes(lent), bytes(data), bytes(out)) == (cmk, plaintext, plaintext)


@pytest.mark.parametrize("damage", [0, 1])
@pytest.mark.parametrize("key_spec", sorted(ciphertext_blob.KEY_SIZES))
def test_one_time_keys_are_wiped_whether_a_blob_opens_or_not(key_spec: str, damage: int) -> None:
    """A secret memory for this test alone was used, and holds only zeros afterwards."""
    with contextlib.closing(SecretMemory(4096, require=False)) as scratch:
        cmk, blob = sample(key_spec, scratch)
        offered = blob[:-1] + bytes([blob[-1] ^ damage])
        with pytest.raises(ciphertext_blob.BlobError) if damage else contextlib.nullcontext():
            ciphertext_blob.decrypt_into(key_spec, view(cmk), offered, KEY_ID, {"a": "1"}, view(bytes(32)), scratch)
        assert scratch._used > 0
        assert not any(scratch._view(0, scratch.size))
