"""Checks that each SDK passes against a gateway: its operations, its errors, and a repeated call."""

import base64
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from .agent import RunningAgent
from .gateway import UNKNOWN_ID, Credentials, Prepared
from .sdk import Kind, LossyRelay, Sdk, SdkError, running

CONTEXT: Final = {"tenant": "7", "purpose": "磁盘 &=+%/ ~*'!", "quote": '"\\'}
LONGEST: Final = 6_144
"""Bytes of the longest plaintext that Encrypt accepts."""


class WrappingKey:
    """A key pair of a cryptographic module."""

    def __init__(self) -> None:
        self._private_key = rsa.generate_private_key(65_537, 2048)
        public_key = self._private_key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.parameters = {
            "PublicKeyBlob": base64.b64encode(public_key).decode(),
            "WrappingKeySpec": "RSA_2048",
            "WrappingAlgorithm": "RSAES_OAEP_SHA_256",
        }

    def unwrap(self, exported: str) -> bytes:
        """Return the data key of an ExportedDataKey."""
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
        return self._private_key.decrypt(base64.b64decode(exported), oaep)


class Recorder:
    """Calls an SDK, and remembers what it called."""

    def __init__(self, sdk: Sdk) -> None:
        self._sdk = sdk
        self.request_ids: dict[str, str] = {}

    def __call__(self, action: str, **parameters: Any) -> dict[str, Any]:
        result = self._sdk.call(action, **parameters)
        self.request_ids[result["RequestId"]] = action
        return result

    def decrypted(self, made: Mapping[str, Any], context: Mapping[str, str] | None = None) -> bytes:
        """Return the plaintext of an answer's CiphertextBlob."""
        more = {"EncryptionContext": context} if context else {}
        return base64.b64decode(self("Decrypt", CiphertextBlob=made["CiphertextBlob"], **more)["Plaintext"])


def check_operations(sdk: Sdk, wrapping_key: WrappingKey) -> dict[str, str]:
    """Call every operation that the SDK has. Return the actions by their RequestIds."""
    call = Recorder(sdk)
    _check_data_keys(call)
    _check_encryption(call)
    _check_lists(call)
    if "GenerateAndExportDataKey" in sdk.kind.operations:
        _check_exports(call, wrapping_key)
    if "ReEncrypt" in sdk.kind.operations:
        _check_re_encryption(call)
    assert set(call.request_ids.values()) == sdk.kind.operations
    return call.request_ids


def _check_data_keys(call: Recorder) -> None:
    made = call("GenerateDataKey", KeyId="alias/a", NumberOfBytes=48, EncryptionContext=CONTEXT)
    data_key = base64.b64decode(made["Plaintext"])
    assert len(data_key) == 48
    assert call.decrypted(made, CONTEXT) == data_key
    made = call("GenerateDataKeyWithoutPlaintext", KeyId="alias/sm4", KeySpec="AES_128")
    assert "Plaintext" not in made
    assert len(call.decrypted(made)) == 16


def _check_encryption(call: Recorder) -> None:
    """The longest plaintext, with as many characters as possible that a query has to escape."""
    plaintext = b"\xff" * LONGEST
    made = call("Encrypt", KeyId="alias/a", Plaintext=base64.b64encode(plaintext).decode(), EncryptionContext=CONTEXT)
    assert call.decrypted(made, CONTEXT) == plaintext
    plaintext = os.urandom(100)
    made = call("Encrypt", KeyId="alias/sm4", Plaintext=base64.b64encode(plaintext).decode())
    assert call.decrypted(made) == plaintext


def _check_lists(call: Recorder) -> None:
    metadata = call("DescribeKey", KeyId="alias/sm4")["KeyMetadata"]
    assert (metadata["KeySpec"], metadata["KeyState"]) == ("Aliyun_SM4", "Enabled")
    keys = [call("ListKeys", PageNumber=page, PageSize=1) for page in (1, 2)]
    assert [page["TotalCount"] for page in keys] == [2, 2]
    assert metadata["KeyId"] in [page["Keys"]["Key"][0]["KeyId"] for page in keys]
    versions = call("ListKeyVersions", KeyId=metadata["KeyId"])
    assert versions["KeyVersions"]["KeyVersion"][0]["KeyVersionId"] == metadata["PrimaryKeyVersion"]
    aliases = call("ListAliases")["Aliases"]["Alias"]
    assert sorted(alias["AliasName"] for alias in aliases) == ["alias/a", "alias/sm4"]


def _check_exports(call: Recorder, wrapping_key: WrappingKey) -> None:
    parameters = {**wrapping_key.parameters, "EncryptionContext": CONTEXT}
    made = call("GenerateAndExportDataKey", KeyId="alias/a", NumberOfBytes=24, **parameters)
    data_key = wrapping_key.unwrap(made["ExportedDataKey"])
    assert len(data_key) == 24
    again = call("ExportDataKey", CiphertextBlob=made["CiphertextBlob"], **parameters)
    assert wrapping_key.unwrap(again["ExportedDataKey"]) == data_key
    assert call.decrypted(made, CONTEXT) == data_key


def _check_re_encryption(call: Recorder) -> None:
    made = call("Encrypt", KeyId="alias/a", Plaintext="bW9yZQ==", EncryptionContext=CONTEXT)
    moved = call(
        "ReEncrypt",
        CiphertextBlob=made["CiphertextBlob"],
        SourceEncryptionContext=CONTEXT,
        DestinationKeyId="alias/sm4",
        DestinationEncryptionContext={"tenant": "8"},
    )
    assert (moved["KeyId"], moved["KeyVersionId"]) == (made["KeyId"], made["KeyVersionId"])
    assert call.decrypted(moved, {"tenant": "8"}) == b"more"


def check_audit(agent: RunningAgent, request_ids: Mapping[str, str], sdk: Sdk, listener: str) -> None:
    """Find each call in the agent's log, with the access key and the gateway."""
    for request_id, action in request_ids.items():
        expected = {"request_id": request_id, "operation": action, "outcome": "OK", "listener": listener}
        access_key = sdk.prepared.credentials.access_key_id
        assert agent.has_logged("audit", **expected, access_key=access_key), (action, request_id)


def refused(sdk: Sdk, action: str, **parameters: Any) -> SdkError:
    """Return the error of a call."""
    with pytest.raises(SdkError) as refusal:
        sdk.call(action, **parameters)
    return refusal.value


def check_errors(sdk: Sdk, protocol: str, other: Credentials) -> None:
    """The SDK raises an error with the agent's code, status and text. `other`: an access key that may only describe alias/a."""
    credentials = sdk.prepared.credentials
    made = sdk.call("Encrypt", KeyId="alias/a", Plaintext="bW9yZQ==", EncryptionContext=CONTEXT)
    expected: list[tuple[str, dict[str, Any], str, int]] = [
        ("DescribeKey", {"KeyId": "alias/none"}, "Forbidden.AliasNotFound", 404),
        ("DescribeKey", {"KeyId": "acs:kms:local:0:key/none"}, "Forbidden.KeyNotFound", 404),
        ("GenerateDataKey", {"KeyId": "alias/a", "NumberOfBytes": 2_000}, "InvalidParameter", 400),
        ("GenerateDataKey", {}, "MissingParameter", 400),
        ("Decrypt", {"CiphertextBlob": made["CiphertextBlob"]}, "InvalidParameter", 400),
        *_dry_runs(sdk),
    ]
    for action, parameters, code, status in expected:
        error = refused(sdk, action, **parameters)
        assert (error.code, error.http_status) == (code, status), (action, parameters, error)
        assert len(error.request_id) == 36
    sdk.client(protocol, other)
    assert sdk.call("DescribeKey", KeyId="alias/a")["KeyMetadata"]["KeyState"] == "Enabled"
    assert refused(sdk, "Encrypt", KeyId="alias/a", Plaintext="bW9yZQ==").code == "Forbidden.NoPermission"
    sdk.client(protocol, Credentials(UNKNOWN_ID, credentials.secret))
    error = refused(sdk, "ListKeys")
    assert (error.code, error.http_status) == ("InvalidAccessKeyId.NotFound", 404)
    sdk.client(protocol, Credentials(credentials.access_key_id, other.secret))
    error = refused(sdk, "ListKeys")
    # The classic SDK compares the string to sign with its own, and so finds out what is wrong.
    assert error.code in ("SignatureDoesNotMatch", "InvalidAccessKeySecret")
    assert error.http_status == 400


def check_proxy(kind: Kind, prepared: Prepared) -> None:
    """Look whether requests go to the proxy of the environment, although NO_PROXY excludes this host."""
    relay = LossyRelay(prepared.http_port, 100)
    url = f"http://127.0.0.1:{relay.port}"
    proxied = {"HTTP_PROXY": url, "HTTPS_PROXY": url, "http_proxy": url, "https_proxy": url}
    excluded = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    try:
        with running(replace(kind, environment={**kind.environment, **proxied, **excluded}), prepared) as sdk:
            for protocol in ("http", "https"):
                before = relay.accepted
                sdk.client(protocol)
                if kind.uses_proxy:
                    assert refused(sdk, "ListKeys").request_id == ""
                    assert relay.accepted > before
                else:
                    assert sdk.call("ListKeys")["TotalCount"] == 2
                    assert relay.accepted == 0
    finally:
        relay.close()


def _dry_runs(sdk: Sdk) -> list[tuple[str, dict[str, Any], str, int]]:
    """A dry run that would succeed, and one that would fail: where the SDK's request has the parameter."""
    if not sdk.kind.has_dry_run:
        return []
    return [
        ("GenerateDataKey", {"KeyId": "alias/a", "DryRun": "true"}, "DryRunOperationError", 412),
        ("GenerateDataKey", {"KeyId": "alias/a", "NumberOfBytes": 0, "DryRun": "true"}, "ValidationError", 400),
    ]
