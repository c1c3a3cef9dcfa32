"""GenerateDataKey, Encrypt, Decrypt, ReEncrypt and their relatives, asked of a real agent."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agent import RawConnection, RunningAgent
from support.calls import call_ok, call_refused
from support.keyring import change, two_callers

from keyferry.parameters import decode_base64, encode_base64

KEYS = ("alias/dev", "alias/dev-sm4")


@pytest.fixture(scope="module")
def connection(agent: RunningAgent) -> Iterator[RawConnection]:
    """A connection to the shared agent."""
    with RawConnection(agent.socket) as made:
        yield made


def encrypted(connection: RawConnection, plaintext: bytes, key_id: str = KEYS[0], **more: Any) -> dict[str, Any]:
    """Return the result of Encrypt."""
    return call_ok(connection, "Encrypt", {"KeyId": key_id, "Plaintext": encode_base64(plaintext), **more})


def decrypted(connection: RawConnection, blob: str, context: dict[str, str] | None = None) -> bytes:
    """Return the plaintext of Decrypt."""
    params = {"CiphertextBlob": blob, "EncryptionContext": context}
    return decode_base64(call_ok(connection, "Decrypt", params)["Plaintext"])


@pytest.mark.parametrize("key_id", KEYS)
@pytest.mark.parametrize("size", [1, 16, 190, 191, 214, 215, 1024])
def test_generate_data_key_returns_plaintext_and_blob(connection: RawConnection, key_id: str, size: int) -> None:
    """The blob opens to Plaintext, and no wrapping limits its length."""
    made = call_ok(
        connection, "GenerateDataKey", {"KeyId": key_id, "NumberOfBytes": size, "EncryptionContext": {"a": "b"}}
    )
    assert made.keys() == {"KeyId", "KeyVersionId", "CiphertextBlob", "Plaintext", "RequestId"}
    key = decode_base64(made["Plaintext"])
    assert len(key) == size
    assert decrypted(connection, made["CiphertextBlob"], {"a": "b"}) == key


def test_generate_data_key_without_plaintext_returns_only_a_blob(connection: RawConnection) -> None:
    """KeySpec sets the length, which is 32 bytes by default."""
    for spec, size in (
        ({"KeySpec": "AES_128"}, 16),
        ({"KeySpec": "SM4_128"}, 16),
        ({"KeySpec": "AES_256"}, 32),
        ({}, 32),
    ):
        made = call_ok(connection, "GenerateDataKeyWithoutPlaintext", {"KeyId": KEYS[0], **spec})
        assert made.keys() == {"KeyId", "KeyVersionId", "CiphertextBlob", "RequestId"}
        assert len(decrypted(connection, made["CiphertextBlob"])) == size


@pytest.mark.parametrize("key_id", KEYS)
@pytest.mark.parametrize("size", [1, 6_144])
def test_decrypt_opens_blobs_of_encrypt(connection: RawConnection, key_id: str, size: int) -> None:
    """Plaintexts have 1 to 6,144 bytes."""
    plaintext = bytes(range(256)) * 24
    made = encrypted(connection, plaintext[:size], key_id)
    assert made.keys() == {"KeyId", "KeyVersionId", "CiphertextBlob", "RequestId"}
    assert decrypted(connection, made["CiphertextBlob"]) == plaintext[:size]
    again = encrypted(connection, plaintext[:size], key_id)
    assert again["CiphertextBlob"] != made["CiphertextBlob"]


@pytest.mark.parametrize(
    ("plaintext", "word"),
    [("", "0 bytes"), (encode_base64(bytes(6_145)), "6145"), ("*", "Base64"), (b"raw", "binary"), (5, "integer")],
)
def test_encrypt_takes_base64_of_1_to_6144_bytes(connection: RawConnection, plaintext: Any, word: str) -> None:
    """The message names the fault of any other Plaintext."""
    call_refused(
        connection, "Encrypt", {"KeyId": KEYS[0], "Plaintext": plaintext}, "InvalidParameter", "Plaintext", word
    )


def test_re_encrypt_moves_a_secret_to_another_key_and_context(connection: RawConnection) -> None:
    """The answer names the source key and the destination key, and the old blob still opens."""
    made = encrypted(connection, b"secret", KEYS[0], EncryptionContext={"a": "1"})
    moved = call_ok(
        connection,
        "ReEncrypt",
        {
            "CiphertextBlob": made["CiphertextBlob"],
            "SourceEncryptionContext": {"a": "1"},
            "DestinationKeyId": KEYS[1],
            "DestinationEncryptionContext": '{"b": "2"}',
        },
    )
    assert (moved["KeyId"], moved["KeyVersionId"]) == (made["KeyId"], made["KeyVersionId"])
    described = call_ok(connection, "DescribeKey", {"KeyId": KEYS[1]})["KeyMetadata"]
    assert (moved["DestinationKeyId"], moved["DestinationKeyVersionId"]) == (
        described["KeyId"],
        described["PrimaryKeyVersion"],
    )
    assert decrypted(connection, moved["CiphertextBlob"], {"b": "2"}) == b"secret"
    assert decrypted(connection, made["CiphertextBlob"], {"a": "1"}) == b"secret"


def test_re_encrypt_checks_parameters_like_decrypt_and_encrypt(connection: RawConnection) -> None:
    """Each parameter is refused by its own name."""
    blob = encrypted(connection, b"x", EncryptionContext={"a": "1"})["CiphertextBlob"]
    good = {"CiphertextBlob": blob, "DestinationKeyId": KEYS[0], "SourceEncryptionContext": {"a": "1"}}
    call_ok(connection, "ReEncrypt", good)
    for changed, code, word in (
        ({"SourceEncryptionContext": {"a": "2"}}, "InvalidParameter", "CiphertextBlob"),
        ({"SourceEncryptionContext": None}, "InvalidParameter", "CiphertextBlob"),
        ({"SourceEncryptionContext": [1]}, "InvalidParameter", "SourceEncryptionContext"),
        ({"DestinationEncryptionContext": {"a": 1}}, "InvalidParameter", "DestinationEncryptionContext"),
        ({"DestinationKeyId": "alias/none"}, "Forbidden.AliasNotFound", ""),
        ({"DestinationKeyId": "acs:kms:other:0:key/x"}, "InvalidParameter", "DestinationKeyId"),
        ({"DestinationKeyId": None}, "MissingParameter", "DestinationKeyId"),
        ({"EncryptionContext": {}}, "InvalidParameter", "EncryptionContext"),
        ({"CiphertextBlob": blob[:-8]}, "InvalidParameter", "CiphertextBlob"),
        ({"DryRun": True}, "DryRunOperationError", ""),
        ({"DryRun": "TRUE", "SourceEncryptionContext": {"a": "2"}}, "ValidationError", "CiphertextBlob"),
    ):
        call_refused(connection, "ReEncrypt", {**good, **changed}, code, word)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("GenerateDataKey", {"KeyId": KEYS[0]}),
        ("GenerateDataKeyWithoutPlaintext", {"KeyId": KEYS[0]}),
        ("Encrypt", {"KeyId": KEYS[0], "Plaintext": "AAAA"}),
    ],
)
def test_dry_run_fails_with_the_code_of_the_outcome(
    connection: RawConnection, method: str, params: dict[str, Any]
) -> None:
    """Three codes are a dry run's own; all others are those of the call."""
    call_refused(connection, method, {**params, "DryRun": True}, "DryRunOperationError")
    call_refused(connection, method, {**params, "DryRun": "true", "EncryptionContext": "["}, "ValidationError")
    call_refused(connection, method, {"DryRun": "true"}, "ValidationError")
    call_refused(connection, method, {**params, "KeyId": "alias/none", "DryRun": True}, "Forbidden.AliasNotFound")


CONTEXTS = st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plaintext=st.binary(min_size=1, max_size=200), contexts=st.lists(CONTEXTS, min_size=2, max_size=4), data=st.data()
)
def test_secret_opens_under_its_last_context_only(
    connection: RawConnection, plaintext: bytes, contexts: list[dict[str, str]], data: st.DataObject
) -> None:
    """A secret survives any chain of ReEncrypt calls over keys and contexts."""
    blob = encrypted(connection, plaintext, EncryptionContext=contexts[0])["CiphertextBlob"]
    for old, new in itertools.pairwise(contexts):
        blob = call_ok(
            connection,
            "ReEncrypt",
            {
                "CiphertextBlob": blob,
                "SourceEncryptionContext": old,
                "DestinationKeyId": data.draw(st.sampled_from(KEYS)),
                "DestinationEncryptionContext": new,
            },
        )["CiphertextBlob"]
    assert decrypted(connection, blob, contexts[-1]) == plaintext
    for other in (*contexts[:-1], {}):
        if other != contexts[-1]:
            call_refused(
                connection, "Decrypt", {"CiphertextBlob": blob, "EncryptionContext": other}, "InvalidParameter"
            )


PIN = "sha256:" + "0" * 64
GRANTS = {
    "from": 'actions=["kms:ReEncryptFrom"]\nkeys=["alias/dev"]\n',
    "to": 'actions=["kms:ReEncryptTo"]\nkeys=["alias/dev-sm4"]\n',
    "rewrap": 'actions=["kms:ReEncrypt*"]\nkeys=["alias/dev"]\n',
    "pinned": f'actions=["kms:*"]\nkeys=["alias/dev"]\nrecipients=["{PIN}"]\n',
    "decrypt under another context": (
        'actions=["kms:Decrypt", "kms:ReEncryptTo"]\nkeys=["alias/dev"]\nencryption_context={purpose="cache"}\n'
    ),
    "everything on sm4": 'actions=["kms:*"]\nkeys=["alias/dev-sm4"]\n',
}


def test_re_encrypt_to_another_context_respects_recipients(keyring: Path) -> None:
    """Other grants can apply to another context, even under the same key."""
    change(keyring, "create-alias", "alias/dev", "alias/a")
    granted = [GRANTS["pinned"], GRANTS["decrypt under another context"]]
    with two_callers(keyring, granted) as (admin, app):
        blob = encrypted(admin, b"x", EncryptionContext={"tenant": "acme"})["CiphertextBlob"]
        opening = {
            "CiphertextBlob": blob,
            "SourceEncryptionContext": {"tenant": "acme"},
            "DestinationKeyId": "alias/dev",
        }
        moved = {**opening, "DestinationEncryptionContext": {"purpose": "cache"}}
        call_refused(app, "ReEncrypt", moved, "Forbidden.NoPermission")
        call_ok(app, "ReEncrypt", {**opening, "DestinationEncryptionContext": {"tenant": "acme"}})


@pytest.mark.parametrize(
    ("granted", "destination", "code"),
    [
        (("from", "to"), "alias/dev-sm4", ""),
        (("from",), "alias/dev-sm4", "Forbidden.NoPermission"),
        (("to",), "alias/dev-sm4", "Forbidden.NoPermission"),
        (("from", "to"), "alias/dev", "Forbidden.NoPermission"),
        (("rewrap",), "alias/dev", ""),
        (("pinned",), "alias/dev", ""),
        (("pinned", "everything on sm4"), "alias/dev-sm4", "Forbidden.NoPermission"),
    ],
)
def test_re_encrypt_needs_grants_at_both_ends(
    keyring: Path, granted: tuple[str, ...], destination: str, code: str
) -> None:
    """A grant with recipients lets a secret be re-encrypted under its own key, and moved to no other."""
    change(keyring, "create-alias", "alias/dev", "alias/a")
    change(keyring, "create-key", "--alias", "alias/dev-sm4", "--key-spec", "Aliyun_SM4")
    with two_callers(keyring, [GRANTS[name] for name in granted]) as (admin, app):
        blob = encrypted(admin, b"x")["CiphertextBlob"]
        params = {"CiphertextBlob": blob, "DestinationKeyId": destination}
        if code:
            call_refused(app, "ReEncrypt", params, code)
        else:
            call_ok(app, "ReEncrypt", params)
