"""The cloud's unmodified SDKs for Java and Go against a real agent with gateways, over http and https.

Their first start compiles for up to a minute. The SDKs for Python and Node: tests/test_gateway_sdks.py.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import sdk_page
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
from support.keyring import change
from support.sdk import JAVA, JAVA_SDK, Kind, LossyRelay, Sdk, build_go, built_go, running
from support.sdk_checks import WrappingKey, check_audit, check_errors, check_operations, check_proxy, refused

PROTOCOLS = {"http": "plain", "https": "tls"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A keyring, a certificate and a configuration."""
    return prepare(tmp_path_factory.mktemp("gateways"))


@pytest.fixture(scope="module")
def limited(prepared: Prepared) -> Credentials:
    """An access key that may only describe alias/a."""
    credentials = new_access_key(prepared.keyring)
    with prepared.config.open("a") as config:
        config.write(
            grant_table("limited", f'access_key = "{credentials.access_key_id}"', '"kms:DescribeKey"', '"alias/a"')
        )
    return credentials


@pytest.fixture(scope="module")
def agent(prepared: Prepared, limited: Credentials) -> Iterator[RunningAgent]:
    """One agent for all tests here."""
    with serving_gateway(prepared) as running_agent:
        yield running_agent


@pytest.fixture(scope="module", params=["java", "go"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    """Each program, compiled."""
    if request.param == "go":
        return built_go(tmp_path_factory.mktemp("go"))
    if JAVA_SDK.missing:
        pytest.skip(JAVA_SDK.missing)
    return JAVA_SDK


@pytest.fixture(scope="module")
def sdk(kind: Kind, prepared: Prepared, agent: RunningAgent) -> Iterator[Sdk]:
    """Each program in one process for all tests."""
    with running(kind, prepared) as program:
        yield program


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sdk_calls_every_operation(sdk: Sdk, agent: RunningAgent, protocol: str) -> None:
    """The answers fit together, and the audit log has each call with the access key and the gateway."""
    sdk.client(protocol)
    check_audit(agent, check_operations(sdk, WrappingKey()), sdk, PROTOCOLS[protocol])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sdk_raises_the_error_of_the_agent(sdk: Sdk, limited: Credentials, protocol: str) -> None:
    """Code, status and RequestId are the agent's, for every kind of refusal."""
    sdk.client(protocol)
    check_errors(sdk, protocol, limited)


def test_sdk_signs_with_each_of_its_algorithms(sdk: Sdk) -> None:
    """Version 1 with SHA-1, and the second scheme with SHA-256 and SM3."""
    for algorithm in sdk.kind.algorithms:
        sdk.client("https", algorithm=algorithm)
        made = sdk.call("Encrypt", KeyId="alias/a", Plaintext="bW9yZQ==", EncryptionContext={"ü": "* ~"})
        opened = sdk.call("Decrypt", CiphertextBlob=made["CiphertextBlob"], EncryptionContext={"ü": "* ~"})
        assert opened["Plaintext"] == "bW9yZQ=="


def test_sdk_repeats_a_call_whose_answer_was_lost(sdk: Sdk, prepared: Prepared) -> None:
    """The repeated request has another nonce, so it is served."""
    relay = LossyRelay(prepared.http_port, 1)
    try:
        sdk.client("http", port=relay.port, attempts=3)
        assert sdk.call("GenerateDataKey", KeyId="alias/a")["Plaintext"]
        assert relay.lost == 1
    finally:
        relay.close()


def test_sdk_refuses_a_gateway_of_another_authority(
    kind: Kind, prepared: Prepared, agent: RunningAgent, tmp_path: Path
) -> None:
    """The SDK trusts the authority that it was told, and sends no request to other servers."""
    with running(kind, prepared, new_certificate(tmp_path) / "ca.pem") as program:
        program.client("https")
        error = refused(program, "ListKeys")
        assert error.request_id == ""
        assert "certif" in str(error).lower() or "PKIX" in str(error)


def test_sdk_uses_the_proxy_of_the_environment_or_not(kind: Kind, prepared: Prepared, agent: RunningAgent) -> None:
    """The SDK for Go does, even for this host. docs/how-to/use-the-alibaba-sdk.md warns of it."""
    check_proxy(kind, prepared)


@pytest.mark.parametrize("language", ["java", "go"])
def test_a_block_of_the_page_is_a_whole_program(language: str, tmp_path: Path) -> None:
    """docs/how-to/use-the-alibaba-sdk.md: it decrypts what it has made, with the SDK as it is installed."""
    prepared = prepare(tmp_path)
    change(prepared.keyring, "create-key", "--alias", "alias/orders")
    (code,) = sdk_page.blocks(language)
    source, program = tmp_path / f"Orders.{language}", tmp_path / "orders"
    source.write_text(sdk_page.on(code, prepared))
    if language == "go":
        build_go(source, program)
        command = [str(program)]
    elif JAVA_SDK.missing:
        pytest.skip(JAVA_SDK.missing)
    else:
        command = ["java", "-cp", f"{JAVA}/*", str(source)]
    environment = {**os.environ, **sdk_page.environment(prepared)}
    with serving_gateway(prepared):
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False)
    assert done.stdout == "true\n", done.stderr
