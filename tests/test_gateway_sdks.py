"""The cloud's unmodified SDKs against a real agent with gateways: Python and Node, over http and https.

Java and Go need compilers and minutes: tests/system/test_compiled_sdks.py.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.agent import PATIENCE, RunningAgent
from support.gateway import (
    Credentials,
    Prepared,
    grant_table,
    new_access_key,
    new_certificate,
    prepare,
    serving_gateway,
)
from support.sdk import PYTHON, SCRIPTS, Kind, LossyRelay, Sdk, python_sdks, running
from support.sdk_checks import WrappingKey, check_audit, check_errors, check_operations, check_proxy, refused
from support.skip_unless import ROOT
from support.small_oss import SmallOss, small_oss

PROTOCOLS = {"http": "plain", "https": "tls"}
"""The protocols, and the names of their gateways."""
WITH_OWN_TLS = ("python-v2", "python-v2-async", "python-classic", "node-openapi-core", "node-pop-core")
"""SDKs with a way of their own to TLS. The others share one with these."""


@dataclass(frozen=True)
class Gateways:
    """An agent, and its access keys: one that may do everything, one that may describe alias/a, and one with a token."""

    agent: RunningAgent
    prepared: Prepared
    limited: Credentials
    temporary: Credentials
    other_ca: Path


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    """One agent for all tests here."""
    folder = tmp_path_factory.mktemp("gateways")
    prepared = prepare(folder)
    limited, temporary = new_access_key(prepared.keyring), new_access_key(prepared.keyring, "--token")
    with prepared.config.open("a") as config:
        to = f'access_key = "{limited.access_key_id}"'
        config.write(grant_table("limited", to, '"kms:DescribeKey"', '"alias/a"'))
        config.write(grant_table("temporary", f'access_key = "{temporary.access_key_id}"'))
    other_ca = new_certificate(folder / "other") / "ca.pem"
    with serving_gateway(prepared) as agent:
        yield Gateways(agent, prepared, limited, temporary, other_ca)


@pytest.fixture(scope="module")
def wrapping_key() -> WrappingKey:
    """The key pair of a module."""
    return WrappingKey()


class Programs:
    """One process for each SDK. Tests come in any order, and a start costs most of a test's time."""

    def __init__(self, prepared: Prepared, stack: ExitStack) -> None:
        self._prepared = prepared
        self._stack = stack
        self._by_name: dict[str, Sdk] = {}

    def of(self, kind: Kind) -> Sdk:
        """Return the program of an SDK, which is started at its first use."""
        if kind.name not in self._by_name:
            self._by_name[kind.name] = self._stack.enter_context(running(kind, self._prepared))
        return self._by_name[kind.name]


@pytest.fixture(scope="module")
def programs(gateways: Gateways) -> Iterator[Programs]:
    """The programs that run already."""
    with ExitStack() as stack:
        yield Programs(gateways.prepared, stack)


@pytest.fixture(params=[kind.param() for kind in SCRIPTS])
def sdk(request: pytest.FixtureRequest, programs: Programs) -> Sdk:
    """Each SDK, in one process for all tests."""
    return programs.of(request.param)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sdk_calls_every_operation_it_has(
    gateways: Gateways, sdk: Sdk, protocol: str, wrapping_key: WrappingKey
) -> None:
    """The answers fit together, and the audit log has each call with the access key and the gateway."""
    sdk.client(protocol)
    request_ids = check_operations(sdk, wrapping_key)
    check_audit(gateways.agent, request_ids, sdk, PROTOCOLS[protocol])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sdk_raises_the_error_of_the_agent(gateways: Gateways, sdk: Sdk, protocol: str) -> None:
    """Code, status and RequestId are the agent's, for every kind of refusal."""
    sdk.client(protocol)
    check_errors(sdk, protocol, gateways.limited)


def test_sdk_signs_with_each_of_its_algorithms(sdk: Sdk) -> None:
    """Version 1 with SHA-1, and the second scheme with SHA-256 and SM3."""
    for algorithm in sdk.kind.algorithms:
        sdk.client("http", algorithm=algorithm)
        made = sdk.call("Encrypt", KeyId="alias/a", Plaintext="bW9yZQ==", EncryptionContext={"ü": "* ~"})
        opened = sdk.call("Decrypt", CiphertextBlob=made["CiphertextBlob"], EncryptionContext={"ü": "* ~"})
        assert opened["Plaintext"] == "bW9yZQ=="


def test_sdk_uses_temporary_credentials(gateways: Gateways, sdk: Sdk) -> None:
    """The token belongs to its access key: without it, and with another one, the call is refused."""
    temporary = gateways.temporary
    sdk.client("http", temporary)
    assert sdk.call("ListKeys")["TotalCount"] == 2
    sdk.client("http", Credentials(temporary.access_key_id, temporary.secret))
    assert refused(sdk, "ListKeys").code == "MissingSecurityToken"
    sdk.client("http", Credentials(temporary.access_key_id, temporary.secret, "x" * 64))
    assert refused(sdk, "ListKeys").code == "InvalidSecurityToken.Malformed"


def test_sdk_repeats_a_call_whose_answer_was_lost(gateways: Gateways, sdk: Sdk) -> None:
    """The repeated request has another nonce, so it is served. Without retries, the SDK raises its own error."""
    attempts = 3 if sdk.kind.retries else 0
    relay = LossyRelay(gateways.prepared.http_port, 1)
    try:
        sdk.client("http", port=relay.port, attempts=attempts)
        if attempts:
            assert sdk.call("GenerateDataKey", KeyId="alias/a")["Plaintext"]
        else:
            assert refused(sdk, "GenerateDataKey", KeyId="alias/a").request_id == ""
            assert sdk.call("GenerateDataKey", KeyId="alias/a")["Plaintext"]
        assert relay.lost == 1
    finally:
        relay.close()


@pytest.mark.parametrize("kind", [kind.param() for kind in SCRIPTS if kind.name in WITH_OWN_TLS])
def test_sdk_refuses_a_gateway_of_another_authority(gateways: Gateways, kind: Kind) -> None:
    """The SDK trusts the authority that it was told, and sends no request to other servers."""
    with running(kind, gateways.prepared, gateways.other_ca) as program:
        program.client("https")
        error = refused(program, "ListKeys")
        assert error.request_id == ""
        assert "certificate" in str(error).lower()


@pytest.mark.parametrize("kind", [kind.param() for kind in SCRIPTS if kind.name in WITH_OWN_TLS])
def test_sdk_uses_the_proxy_of_the_environment_or_not(gateways: Gateways, kind: Kind) -> None:
    """The SDKs for Python do, even for this host. docs/how-to/use-the-alibaba-sdk.md warns of it."""
    check_proxy(kind, gateways.prepared)


def test_sdks_go_on_after_a_restart_of_the_agent(programs: Programs, tmp_path: Path) -> None:
    """The agent's end closes the connections that an SDK keeps; its next call opens a new one."""
    kinds = [kind for kind in SCRIPTS if kind.missing is None]
    if not kinds:
        pytest.skip(str(SCRIPTS[0].missing))
    prepared = prepare(tmp_path)
    sdks = [programs.of(kind) for kind in kinds]
    for sdk in sdks:
        sdk.client("http", prepared.credentials, port=prepared.http_port)
    for _ in range(2):
        with serving_gateway(prepared) as agent:
            assert [sdk.call("ListKeys")["TotalCount"] for sdk in sdks] == [2] * len(sdks)
            assert agent.stop() == 0


@pytest.mark.parametrize("passphrase", ["", "of the bucket"])
@python_sdks()
def test_oss2_encrypts_objects_with_data_keys(gateways: Gateways, passphrase: str) -> None:
    """Objects of a CryptoBucket are stored as ciphertexts, and read back whole and in part."""
    with small_oss() as storage:
        outcome = crypto_bucket(gateways, storage, passphrase=passphrase)
    assert outcome == {"read": {"empty": True, "short": True, "long": True}, "part": True}
    metadata, content = storage.stored["/bucket/short"]
    assert "x-oss-meta-client-side-encryption-key" in metadata
    assert len(content) == len("an object\n")
    assert b"object" not in content


@python_sdks()
def test_oss2_raises_the_error_of_the_agent(gateways: Gateways) -> None:
    """An access key without a grant for the key cannot store objects."""
    limited = gateways.limited
    with small_oss() as storage:
        names = {"access_key_id": limited.access_key_id, "access_key_secret": limited.secret}
        outcome = crypto_bucket(gateways, storage, **names)
    assert storage.stored == {}
    assert (outcome["error"]["Code"], outcome["error"]["HttpStatus"]) == ("Forbidden.NoPermission", 403)


def crypto_bucket(gateways: Gateways, storage: SmallOss, **settings: str) -> dict[str, Any]:
    """Return the outcome of the program with oss2, which has no other way to name the authority than the environment."""
    prepared = gateways.prepared
    credentials = prepared.credentials
    asked = {
        "host": f"127.0.0.1:{prepared.https_port}",
        "oss": storage.endpoint,
        "key": "alias/a",
        "access_key_id": credentials.access_key_id,
        "access_key_secret": credentials.secret,
        **settings,
    }
    done = subprocess.run(
        [str(PYTHON), "-W", "ignore", "-m", "foreign.sdk.crypto_bucket"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "ALIBABA_CLOUD_CA_BUNDLE": str(prepared.ca)},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))
