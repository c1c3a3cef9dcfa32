"""The operations of a real agent over its socket: results, and every way in which they refuse."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from support.agent import RawConnection, RunningAgent
from support.calls import call_ok, call_refused, error
from support.keys import ALGORITHMS, recipient, spki

from keyferry.parameters import decode_base64, encode_base64

RSA = recipient("RSAES_OAEP_SHA_256")
GENERATE: dict[str, Any] = {"KeyId": "alias/dev", **RSA.params}


@pytest.fixture
def connection(agent: RunningAgent) -> Iterator[RawConnection]:
    """A connection to the shared agent."""
    with RawConnection(agent.socket) as made:
        yield made


@pytest.mark.parametrize("key_id", ["alias/dev", "alias/dev-sm4"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", [1, 16, 32, 190])
def test_generated_key_is_the_same_by_every_operation(
    connection: RawConnection, key_id: str, algorithm: str, size: int
) -> None:
    """The exported key, the decrypted key and the key that is exported again are equal."""
    to = recipient(algorithm)
    context = {"tenant": "acme", "größe": "1"}
    made = call_ok(
        connection,
        "GenerateAndExportDataKey",
        {"KeyId": key_id, "NumberOfBytes": size, "EncryptionContext": context, **to.params},
    )
    key = to.unwrap(made["ExportedDataKey"])
    assert len(key) == size
    blob = {"CiphertextBlob": made["CiphertextBlob"], "EncryptionContext": context}
    opened = call_ok(connection, "Decrypt", blob)
    assert decode_base64(opened["Plaintext"]) == key
    exported = call_ok(connection, "ExportDataKey", {**blob, **to.params})
    assert to.unwrap(exported["ExportedDataKey"]) == key
    assert exported["ExportedDataKey"] != made["ExportedDataKey"]
    ids = {(a["KeyId"], a["KeyVersionId"]) for a in (made, opened, exported)}
    assert len(ids) == 1
    assert decode_base64(made["CiphertextBlob"])[:36].decode() == made["KeyVersionId"]


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ({}, 32),
        ({"KeySpec": "AES_256"}, 32),
        ({"KeySpec": "AES_128"}, 16),
        ({"KeySpec": "SM4_128"}, 16),
        ({"KeySpec": "SM4_128", "NumberOfBytes": 24}, 24),
        ({"KeySpec": "AES_128", "NumberOfBytes": 24}, 24),
    ],
)
def test_the_length_is_number_of_bytes_then_key_spec_then_32(
    connection: RawConnection, spec: dict[str, Any], size: int
) -> None:
    """NumberOfBytes wins over KeySpec, and 32 is the default."""
    made = call_ok(connection, "GenerateAndExportDataKey", {**GENERATE, **spec})
    assert len(RSA.unwrap(made["ExportedDataKey"])) == size


@pytest.mark.parametrize(
    ("algorithm", "most"), [("RSAES_OAEP_SHA_256", 190), ("RSAES_OAEP_SHA_1", 214), ("SM2PKE", 1024)]
)
def test_wrapping_is_limited_to_its_capacity(connection: RawConnection, algorithm: str, most: int) -> None:
    """A longer key is refused before it is generated, with both numbers; SM2PKE wraps all 1024 bytes."""
    to = recipient(algorithm)
    params = {"KeyId": "alias/dev", **to.params}
    made = call_ok(connection, "GenerateAndExportDataKey", {**params, "NumberOfBytes": most})
    assert len(to.unwrap(made["ExportedDataKey"])) == most
    words = [] if most == 1024 else [str(most), str(most + 1)]
    call_refused(
        connection, "GenerateAndExportDataKey", {**params, "NumberOfBytes": most + 1}, "InvalidParameter", *words
    )


def test_export_refuses_keys_over_the_capacity(connection: RawConnection) -> None:
    """A long key for one recipient does not fit every other."""
    to = recipient("SM2PKE")
    made = call_ok(connection, "GenerateAndExportDataKey", {"KeyId": "alias/dev", "NumberOfBytes": 191, **to.params})
    blob = {"CiphertextBlob": made["CiphertextBlob"]}
    call_refused(connection, "ExportDataKey", {**blob, **RSA.params}, "InvalidParameter", "190", "191")
    *rest, last = decode_base64(made["CiphertextBlob"])
    damaged = {"CiphertextBlob": bytes([*rest, last ^ 1])}
    call_refused(connection, "ExportDataKey", {**damaged, **RSA.params}, "InvalidParameter", "damaged")
    call_ok(connection, "ExportDataKey", {**blob, **recipient("RSAES_OAEP_SHA_1").params})


def test_blobs_may_be_binary(connection: RawConnection) -> None:
    """PublicKeyBlob and CiphertextBlob may be MessagePack bin; answers hold strings."""
    made = call_ok(connection, "GenerateAndExportDataKey", {**GENERATE, "PublicKeyBlob": RSA.der})
    assert isinstance(made["CiphertextBlob"], str)
    call_ok(connection, "Decrypt", {"CiphertextBlob": decode_base64(made["CiphertextBlob"])})


def test_every_form_of_a_key_id_names_the_same_key(connection: RawConnection) -> None:
    """The forms are ID, alias and both ARNs; answers have the plain ID."""
    described = call_ok(connection, "DescribeKey", {"KeyId": "alias/dev"})["KeyMetadata"]
    assert described["Arn"] == f"acs:kms:local:0:key/{described['KeyId']}"
    for form in (described["KeyId"], described["Arn"], "acs:kms:local:0:alias/dev"):
        assert call_ok(connection, "DescribeKey", {"KeyId": form})["KeyMetadata"] == described
        assert (
            call_ok(connection, "GenerateAndExportDataKey", {**GENERATE, "KeyId": form})["KeyId"] == described["KeyId"]
        )


def test_describe_key_returns_the_clouds_fields(connection: RawConnection) -> None:
    """All fields are text."""
    described = call_ok(connection, "DescribeKey", {"KeyId": "alias/dev-sm4"})["KeyMetadata"]
    assert all(isinstance(value, str) for value in described.values())
    expected = {
        "KeySpec": "Aliyun_SM4",
        "KeyUsage": "ENCRYPT/DECRYPT",
        "KeyState": "Enabled",
        "Origin": "Aliyun_KMS",
        "ProtectionLevel": "SOFTWARE",
        "Creator": "0",
        "DeleteDate": "",
    }
    assert expected.items() <= described.items()


def test_status_has_the_figures_for_granted_callers(connection: RawConnection) -> None:
    """Figures are the version, the state, the number of keys that the caller may use, and their protection."""
    status = call_ok(connection, "GetAgentStatus", {})
    assert {"ProtocolVersion": 1, "State": "Serving", "Keys": 2}.items() <= status.items()
    assert status["MemoryProtection"] in ("memfd_secret", "mlock", "none")
    assert status["Counters"]["Connections"] >= 1


@pytest.mark.parametrize(
    ("key_id", "code"),
    [
        ("alias/none", "Forbidden.AliasNotFound"),
        ("alias/", "Forbidden.AliasNotFound"),
        ("acs:kms:local:0:alias/none", "Forbidden.AliasNotFound"),
        ("6f0b0d9e-3a55-4c1c-9f64-0c7d52e0a9b1", "Forbidden.KeyNotFound"),
        ("1234abcd-12ab-34cd-56ef-12345678****", "Forbidden.KeyNotFound"),
        ("acs:kms:local:0:key/none", "Forbidden.KeyNotFound"),
        ("acs:kms:local:1:alias/dev", "InvalidParameter"),
        ("acs:kms:elsewhere:0:alias/dev", "InvalidParameter"),
        ("acs:kms:local:0:secret/dev", "InvalidParameter"),
        ("acs:kms:local:0:key/alias/dev", "InvalidParameter"),
        ("acs:kms:local:0:key/", "InvalidParameter"),
        ("acs:", "InvalidParameter"),
        ("", "InvalidParameter"),
        ("x" * 513, "InvalidParameter"),
        ("\udcff", "InvalidParameter"),
        (5, "InvalidParameter"),
        (b"alias/dev", "InvalidParameter"),
        (None, "MissingParameter"),
    ],
)
def test_unknown_key_id_is_refused(connection: RawConnection, key_id: Any, code: str) -> None:
    """Unknown keys and aliases have different codes, and an ARN must be of this agent."""
    if isinstance(key_id, str) and not key_id.isascii():
        connection.send(b"\x94\0\x01\xabDescribeKey\x91\x81\xa5KeyId\xa1\xff")
        assert error(connection.response())["Code"] == code
        return
    call_refused(connection, "DescribeKey", {"KeyId": key_id}, code, "KeyId" if code.endswith("Parameter") else "")


@pytest.mark.parametrize("missing", ["KeyId", "PublicKeyBlob", "WrappingKeySpec", "WrappingAlgorithm"])
def test_a_missing_parameter_is_named(connection: RawConnection, missing: str) -> None:
    """A nil parameter counts as missing."""
    for params in ({k: v for k, v in GENERATE.items() if k != missing}, {**GENERATE, missing: None}):
        message = call_refused(connection, "GenerateAndExportDataKey", params, "MissingParameter")
        assert message == f'The parameter "{missing}" is needed but not provided.'


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"EncryptionContexts": {}}, "EncryptionContexts"),
        ({"dryrun": True}, "dryrun"),
        ({"\x00" * 200: 1}, "\\x00"),
        ({"KeySpec": "AES_512"}, "KeySpec"),
        ({"KeySpec": "AES_512", "NumberOfBytes": 32}, "KeySpec"),
        ({"KeySpec": 32}, "KeySpec"),
        ({"NumberOfBytes": 0}, "NumberOfBytes"),
        ({"NumberOfBytes": -1}, "NumberOfBytes"),
        ({"NumberOfBytes": 1025}, "NumberOfBytes"),
        ({"NumberOfBytes": "32"}, "NumberOfBytes"),
        ({"NumberOfBytes": True}, "NumberOfBytes"),
        ({"DryRun": "yes"}, "DryRun"),
        ({"DryRun": 1}, "DryRun"),
        ({"WrappingKeySpec": "RSA_4096"}, "WrappingAlgorithm"),
        ({"WrappingKeySpec": "EC_SM2"}, "WrappingAlgorithm"),
        ({"WrappingAlgorithm": "SM2PKE"}, "WrappingAlgorithm"),
        ({"WrappingAlgorithm": "RSAES_PKCS1_V1_5"}, "WrappingAlgorithm"),
        ({"WrappingAlgorithm": 5}, "WrappingAlgorithm"),
        ({"WrappingKeySpec": "EC_SM2", "WrappingAlgorithm": "SM2PKE"}, "PublicKeyBlob"),
        ({"PublicKeyBlob": ""}, "PublicKeyBlob"),
        ({"PublicKeyBlob": 7}, "PublicKeyBlob"),
        ({"PublicKeyBlob": "-----BEGIN PUBLIC KEY-----"}, "PEM"),
        ({"PublicKeyBlob": RSA.params["PublicKeyBlob"] + "\n"}, "PublicKeyBlob"),
        ({"PublicKeyBlob": RSA.params["PublicKeyBlob"].rstrip("=")[:-1]}, "PublicKeyBlob"),
        ({"PublicKeyBlob": RSA.der + b"\0"}, "PublicKeyBlob"),
        ({"PublicKeyBlob": RSA.der[:-1]}, "PublicKeyBlob"),
        ({"PublicKeyBlob": spki(ec.generate_private_key(ec.SECP256R1()))}, "RSA"),
        ({"PublicKeyBlob": spki(rsa.generate_private_key(65537, 3072))}, "3072"),
        ({"EncryptionContext": []}, "EncryptionContext"),
        ({"EncryptionContext": 5}, "EncryptionContext"),
        ({"EncryptionContext": {"a": 1}}, "EncryptionContext"),
        ({"EncryptionContext": {"a": None}}, "EncryptionContext"),
        ({"EncryptionContext": {"a": ["b"]}}, "EncryptionContext"),
        ({"EncryptionContext": {"a": "b" * 8192}}, "8192"),
        ({"EncryptionContext": "x" * 8193}, "8192"),
        ({"EncryptionContext": ""}, "EncryptionContext"),
        ({"EncryptionContext": "{'a': 'b'}"}, "JSON"),
        ({"EncryptionContext": '{"a": 1}'}, "EncryptionContext"),
        ({"EncryptionContext": '[{"Key": "Value"}]'}, "EncryptionContext"),
        ({"EncryptionContext": '{"a": "b", "a": "b"}'}, "once"),
        ({"EncryptionContext": '{"a": "\\ud800"}'}, "UTF-8"),
        ({"EncryptionContext": "[" * 8000}, "JSON"),
    ],
)
def test_invalid_parameter_is_named(connection: RawConnection, changed: dict[str, Any], word: str) -> None:
    """InvalidParameter has the parameter's name and the reason."""
    call_refused(connection, "GenerateAndExportDataKey", {**GENERATE, **changed}, "InvalidParameter", word)


def test_contexts_that_look_alike_are_different(connection: RawConnection) -> None:
    """Contexts that are equal in naive encodings do not open each other's ciphertexts; order and form do not matter."""
    pairs = [
        ({"a": "1&b=2"}, {"a": "1", "b": "2"}),
        ({"a": "bc"}, {"ab": "c"}),
        ({"a": ""}, {}),
        ({"": "a"}, {"a": ""}),
    ]
    for one, other in [*pairs, *((b, a) for a, b in pairs)]:
        made = call_ok(connection, "GenerateAndExportDataKey", {**GENERATE, "EncryptionContext": one})
        blob = {"CiphertextBlob": made["CiphertextBlob"]}
        call_refused(connection, "Decrypt", {**blob, "EncryptionContext": other}, "InvalidParameter", "CiphertextBlob")
        call_ok(connection, "Decrypt", {**blob, "EncryptionContext": json.dumps(one)})
    made = call_ok(connection, "GenerateAndExportDataKey", {**GENERATE, "EncryptionContext": {"x": "1", "y": "2"}})
    call_ok(
        connection, "Decrypt", {"CiphertextBlob": made["CiphertextBlob"], "EncryptionContext": '{ "y": "2", "x": "1" }'}
    )


def test_empty_context_equals_a_missing_one(connection: RawConnection) -> None:
    """{} in both forms, nil and absence are the same."""
    forms: list[dict[str, Any]] = [
        {},
        {"EncryptionContext": {}},
        {"EncryptionContext": "{}"},
        {"EncryptionContext": None},
    ]
    for sealed in forms:
        made = call_ok(connection, "GenerateAndExportDataKey", {**GENERATE, **sealed})
        for opened in forms:
            call_ok(connection, "Decrypt", {"CiphertextBlob": made["CiphertextBlob"], **opened})


def test_largest_context_is_accepted(connection: RawConnection) -> None:
    """The limit is 8,192 characters as JSON, also if their UTF-8 is longer."""
    context = {"k": "ü" * (8192 - 8)}
    assert len(json.dumps(context, ensure_ascii=False, separators=(",", ":"))) == 8192
    made = call_ok(connection, "GenerateAndExportDataKey", {**GENERATE, "EncryptionContext": context})
    call_ok(connection, "Decrypt", {"CiphertextBlob": made["CiphertextBlob"], "EncryptionContext": context})


def test_every_damaged_ciphertext_gets_the_same_answer(connection: RawConnection) -> None:
    """Changes, cuts, additions and wrong parameters have one error without a cause."""
    made = call_ok(connection, "GenerateAndExportDataKey", {**GENERATE, "EncryptionContext": {"a": "b"}})
    good = decode_base64(made["CiphertextBlob"])
    damaged: list[Any] = [good[:end] for end in (0, 1, 36, 37, 100, 116, 117, len(good) - 1)] + [good + b"\0"]
    for position in range(36, len(good)):
        changed = bytearray(good)
        changed[position] ^= 0x01
        damaged.append(bytes(changed))
    text = made["CiphertextBlob"]
    damaged += [good[:37] + bytes(size) for size in (6_300, 30_000, 60_000)]
    damaged += [text[:-2] + chr(ord(text[-2]) + 1) + text[-1], text + "\n", " " + text, "*", "é", text.replace("=", "")]
    messages = set()
    for blob in damaged:
        params = {"CiphertextBlob": blob, "EncryptionContext": {"a": "b"}}
        messages.add(call_refused(connection, "Decrypt", params, "InvalidParameter"))
    messages.add(call_refused(connection, "Decrypt", {"CiphertextBlob": good}, "InvalidParameter"))
    messages.add(call_refused(connection, "ExportDataKey", {"CiphertextBlob": good, **RSA.params}, "InvalidParameter"))
    assert len(messages) == 1


def test_unknown_version_has_its_own_error(connection: RawConnection) -> None:
    """A blob has its version in the clear, so the error may name the missing version."""
    made = call_ok(connection, "GenerateAndExportDataKey", GENERATE)
    blob = str(uuid.uuid4()).encode() + decode_base64(made["CiphertextBlob"])[36:]
    call_refused(connection, "Decrypt", {"CiphertextBlob": blob}, "Forbidden.KeyVersionNotFound")
    call_refused(connection, "ExportDataKey", {"CiphertextBlob": blob, **RSA.params}, "Forbidden.KeyVersionNotFound")


def test_a_ciphertext_does_not_open_under_another_key(connection: RawConnection) -> None:
    """The version's ID in a blob is authenticated."""
    blobs = [
        decode_base64(call_ok(connection, "GenerateAndExportDataKey", {**GENERATE, "KeyId": key})["CiphertextBlob"])
        for key in ("alias/dev", "alias/dev-sm4")
    ]
    for one, other in (blobs, reversed(blobs)):
        call_refused(connection, "Decrypt", {"CiphertextBlob": one[:36] + other[36:]}, "InvalidParameter")


@pytest.mark.parametrize("method", ["", "describekey", "DescribeKey ", "CreateKey", "x" * 1000])
def test_an_unknown_operation_is_not_found(connection: RawConnection, method: str) -> None:
    """Names of operations are exact."""
    call_refused(connection, method, {}, "InvalidAction.NotFound")


@pytest.mark.parametrize("dry_run", [True, "true", "True", "TRUE"])
def test_dry_run_fails_with_the_outcome_of_the_call(connection: RawConnection, dry_run: Any) -> None:
    """The status is 412 for success and 400 for bad parameters; a missing key keeps its own code."""
    made = call_ok(connection, "GenerateAndExportDataKey", GENERATE)
    blob = {"CiphertextBlob": made["CiphertextBlob"], "DryRun": dry_run}
    bad_blob = {**blob, "CiphertextBlob": made["CiphertextBlob"][:-8]}
    for method, params, code in (
        ("GenerateAndExportDataKey", {**GENERATE, "DryRun": dry_run}, "DryRunOperationError"),
        ("ExportDataKey", {**blob, **RSA.params}, "DryRunOperationError"),
        ("Decrypt", blob, "DryRunOperationError"),
        ("GenerateAndExportDataKey", {**GENERATE, "DryRun": dry_run, "NumberOfBytes": 191}, "ValidationError"),
        ("GenerateAndExportDataKey", {"KeyId": "alias/dev", "DryRun": dry_run}, "ValidationError"),
        ("GenerateAndExportDataKey", {**GENERATE, "DryRun": dry_run, "Typo": 1}, "ValidationError"),
        ("Decrypt", bad_blob, "ValidationError"),
        ("Decrypt", {**blob, "EncryptionContext": {"a": "b"}}, "ValidationError"),
        ("GenerateAndExportDataKey", {**GENERATE, "DryRun": dry_run, "KeyId": "alias/x"}, "Forbidden.AliasNotFound"),
        (
            "Decrypt",
            {**blob, "CiphertextBlob": str(uuid.uuid4()).encode() + bytes([1]) * 200},
            "Forbidden.KeyVersionNotFound",
        ),
    ):
        call_refused(connection, method, params, code)


@pytest.mark.parametrize("dry_run", [False, "false", "FALSE", None])
def test_false_dry_run_is_a_real_call(connection: RawConnection, dry_run: Any) -> None:
    """DryRun may be false in each form that the API accepts."""
    call_ok(connection, "GenerateAndExportDataKey", {**GENERATE, "DryRun": dry_run})


def test_equal_requests_return_different_bytes(connection: RawConnection) -> None:
    """Data keys, salts and RequestIds are fresh."""
    made = [call_ok(connection, "GenerateAndExportDataKey", GENERATE) for _ in range(20)]
    for field in ("CiphertextBlob", "ExportedDataKey", "RequestId"):
        assert len({answer[field] for answer in made}) == 20
    assert len({RSA.unwrap(answer["ExportedDataKey"]) for answer in made}) == 20
    assert len({encode_base64(decode_base64(answer["CiphertextBlob"])[37:69]) for answer in made}) == 20


def test_keys_of_all_sizes_do_not_use_up_secret_memory(connection: RawConnection) -> None:
    """Sizes from 1 to 1024 bytes are generated in sequence."""
    to = recipient("SM2PKE")
    sizes = [*range(1, 1025, 16), 1024]
    for size in sizes:
        params = {"KeyId": "alias/dev", "NumberOfBytes": size, **(RSA if size <= 190 else to).params}
        blob = call_ok(connection, "GenerateAndExportDataKey", params)["CiphertextBlob"]
        assert len(decode_base64(call_ok(connection, "Decrypt", {"CiphertextBlob": blob})["Plaintext"])) == size
