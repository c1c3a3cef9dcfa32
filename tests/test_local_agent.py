"""`keyferry.testing` and pytest's plugin: a real agent for the tests of applications, and faults that are set on it."""

import functools
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from support.agent import PATIENCE
from support.keys import recipient

from keyferry import (
    AgentUnavailable,
    Client,
    DryRun,
    InternalFailure,
    InvalidRequest,
    KeyferryError,
    KeyUnusable,
    KmsError,
    NotFound,
    Retry,
    ServiceUnavailable,
    Throttled,
)
from keyferry.errors import CODES
from keyferry.parameters import decode_base64
from keyferry.testing import LocalAgent

RSA = recipient("RSAES_OAEP_SHA_256")
ORDERS = "alias/orders"
ARCHIVE = "alias/archive"


@pytest.fixture(scope="module")
def shared() -> Iterator[LocalAgent]:
    """One agent for all tests of this file."""
    with LocalAgent(ORDERS, f"{ARCHIVE}=Aliyun_SM4") as agent:
        yield agent


@pytest.fixture
def local(shared: LocalAgent) -> Iterator[LocalAgent]:
    """The agent without faults."""
    yield shared
    shared.reset()


@pytest.fixture
def kms(local: LocalAgent) -> Iterator[Client]:
    """A client of the agent."""
    with local.client() as client:
        yield client


def test_a_local_agent_has_real_keys_under_any_alias(kms: Client) -> None:
    """An exported key equals the decrypted one, and a wrong context is refused."""
    made = kms.generate_and_export_data_key(key_id=ORDERS, encryption_context={"a": "b"}, **RSA.arguments)
    opened = kms.decrypt(ciphertext_blob=made.ciphertext_blob, encryption_context={"a": "b"})
    assert RSA.unwrap(made.exported_data_key) == decode_base64(opened.plaintext)
    with pytest.raises(InvalidRequest):
        kms.decrypt(ciphertext_blob=made.ciphertext_blob)
    assert kms.describe_key(key_id=ARCHIVE).key_metadata.key_spec == "Aliyun_SM4"


@pytest.mark.parametrize("backend", ["trio", "asyncio"])
def test_asynchronous_client_has_the_same_faults(local: LocalAgent, backend: str) -> None:
    """Faults are injected under both kinds of event loop."""

    async def main() -> None:
        async with local.async_client() as client:
            assert (await client.describe_key(key_id=ORDERS)).key_metadata.key_state == "Enabled"
            local.fail("Rejected.Throttling")
            with pytest.raises(Throttled):
                await client.describe_key(key_id=ORDERS)

    anyio.run(main, backend=backend)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("Rejected.Throttling", Throttled),
        ("ServiceUnavailableTemporary", ServiceUnavailable),
        ("InternalFailure", InternalFailure),
        ("Forbidden.KeyNotFound", NotFound),
    ],
)
def test_a_fault_is_the_clients_exception(local: LocalAgent, kms: Client, code: str, error: type[KmsError]) -> None:
    """The exception has a RequestId and the documented text, and is raised for the given operation and count."""
    local.fail(code, operation="DescribeKey", times=2)
    assert kms.get_agent_status().state == "Serving"
    for _ in range(2):
        with pytest.raises(error) as caught:
            kms.describe_key(key_id=ORDERS)
        assert caught.value.message == CODES[code].message
        assert (caught.value.http_status, len(caught.value.request_id)) == (CODES[code].http_status, 36)
    assert kms.describe_key(key_id=ORDERS).key_metadata.key_state == "Enabled"


def test_faults_are_injected_in_order_until_reset(local: LocalAgent, kms: Client) -> None:
    """A fault without a count stays until the reset."""
    local.fail("Rejected.Throttling")
    local.fail("InternalFailure", times=None)
    for error in (Throttled, InternalFailure, InternalFailure):
        with pytest.raises(error):
            kms.get_agent_status()
    local.reset()
    assert kms.get_agent_status().state == "Serving"


def test_retry_policy_can_be_tested_with_faults(local: LocalAgent) -> None:
    """A pipeline's faults apply to single requests of it."""
    local.fail("ServiceUnavailableTemporary", times=3)
    with local.client(retry=Retry(first=0)) as client:
        outcomes = client.pipeline([("DescribeKey", {"KeyId": ORDERS})] * 5)
    assert [type(outcome) for outcome in outcomes] == [dict] * 5


def test_client_hides_one_lost_connection_and_reports_many(local: LocalAgent, kms: Client) -> None:
    """The client repeats a request on a few new connections."""
    kms.get_agent_status()
    local.lose_connection()
    assert kms.get_agent_status().state == "Serving"
    local.lose_connection(operation="DescribeKey", times=None)
    with pytest.raises(AgentUnavailable, match="closed the connection") as caught:
        kms.describe_key(key_id=ORDERS)
    assert caught.value.retryable
    assert kms.get_agent_status().state == "Serving"


def test_unreachable_agent_returns_with_its_keys(local: LocalAgent, kms: Client) -> None:
    """The local agent has the same keys as before."""
    made = kms.generate_data_key(key_id=ORDERS)
    with local.unreachable():
        with pytest.raises(AgentUnavailable, match="does not exist"):
            kms.get_agent_status()
        with local.client() as other, pytest.raises(AgentUnavailable):
            other.get_agent_status()
    assert kms.decrypt(ciphertext_blob=made.ciphertext_blob).plaintext == made.plaintext


def test_disabled_key_is_refused_as_by_a_real_agent(local: LocalAgent, kms: Client) -> None:
    """The refusal holds for each of its names and ciphertexts; other errors and other keys are unaffected."""
    made = kms.generate_data_key(key_id=ORDERS)
    other = kms.generate_data_key(key_id=ARCHIVE)
    local.disable_key(ORDERS)
    arn = f"acs:kms:local:0:key/{made.key_id}"
    calls: list[Callable[[], object]] = [
        *(functools.partial(kms.generate_data_key, key_id=name) for name in (ORDERS, made.key_id, arn)),
        functools.partial(kms.decrypt, ciphertext_blob=made.ciphertext_blob),
        functools.partial(kms.decrypt, ciphertext_blob=decode_base64(made.ciphertext_blob)),
        functools.partial(kms.re_encrypt, ciphertext_blob=other.ciphertext_blob, destination_key_id=ORDERS),
        functools.partial(kms.generate_data_key, key_id=ORDERS, dry_run=True),
    ]
    for call in calls:
        with pytest.raises(KeyUnusable, match=r"Rejected\.Disabled"):
            call()
    for key_id in (ORDERS, made.key_id):
        assert kms.describe_key(key_id=key_id).key_metadata.key_state == "Disabled"
    assert kms.list_key_versions(key_id=ORDERS).total_count == 1
    with pytest.raises(InvalidRequest):
        kms.generate_data_key(key_id=ORDERS, number_of_bytes=0)
    assert kms.decrypt(ciphertext_blob=other.ciphertext_blob).plaintext == other.plaintext
    with pytest.raises(DryRun, match="DryRunOperationError"):
        kms.generate_data_key(key_id=ARCHIVE, dry_run=True)
    local.enable_key(made.key_id)
    assert kms.decrypt(ciphertext_blob=made.ciphertext_blob).plaintext == made.plaintext
    with pytest.raises(NotFound):
        local.disable_key("alias/none")


def test_unknown_fault_is_refused_with_the_choices(local: LocalAgent) -> None:
    with pytest.raises(ValueError, match=r"'Throttled' is not a code .* Rejected\.Throttling"):
        local.fail("Throttled")
    with pytest.raises(ValueError, match=r"'decrypt' is not an operation; .* Decrypt"):
        local.lose_connection(operation="decrypt")
    with pytest.raises(ValueError, match="at least 1"):
        local.fail("InternalFailure", times=0)


def test_invalid_request_ends_only_its_connection(local: LocalAgent, kms: Client) -> None:
    """Other connections go on."""
    import socket  # noqa: PLC0415

    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(local.socket)
        connection.sendall(b"GET / HTTP/1.1\r\n")
        assert connection.recv(1) == b""
    assert kms.get_agent_status().state == "Serving"


def test_a_local_agent_leaves_nothing_behind() -> None:
    """A closed one refuses commands; closing it again does nothing."""
    with LocalAgent() as agent:
        folder = Path(agent.socket).parent
        assert folder.is_dir()
    assert not folder.exists()
    agent.close()
    with pytest.raises(KeyferryError, match="was closed"):
        agent.reset()


def test_a_local_agent_ends_with_its_process() -> None:
    """Even if that is killed: the relay closes the pipe, and removes the folder, at its own end."""
    code = "from keyferry.testing import LocalAgent; print(LocalAgent().socket, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        path = process.stdout.readline().strip()
        with Client(path) as client:
            assert client.get_agent_status().state == "Serving"
        process.send_signal(signal.SIGKILL)
        assert process.stderr.read() == ""
    assert not Path(path).parent.exists()


def test_an_agent_that_does_not_start_says_why() -> None:
    """In the agent's own words."""
    with pytest.raises(KeyferryError, match=r"(?s)does not start: .*'orders' is not an alias"):
        LocalAgent("orders")


def test_a_missing_agent_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client can be installed without the agent."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(KeyferryError, match=r"keyferry-agent is not installed; install it .*docs/installing\.md"):
        LocalAgent()


def test_a_forked_child_leaves_the_agent_to_its_parent(local: LocalAgent, kms: Client) -> None:
    """The child only closes its inherited descriptors."""
    child = os.fork()
    if child == 0:
        try:
            local.close()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kms.get_agent_status().state == "Serving"
    local.reset()


# --- pytest's plugin ----------------------------------------------------------------------------------------------------


def pytest_of(folder: Path, *arguments: str, **files: str) -> "subprocess.CompletedProcess[str]":
    """A run of pytest over files of an application, where a warning is an error."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "KEYFERRY"))}
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:randomly",
    ]
    return subprocess.run(
        [*command, *arguments, "--rootdir", str(folder), str(folder)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=folder,
        env=environment,
    )


CONFTEST = """
import pytest

@pytest.fixture(scope="session")
def key_agent_aliases():
    return ["alias/orders"]
"""
APPLICATION = """
import os, pytest
from keyferry import Client, Throttled

sockets = []

def test_the_application_finds_the_agent(key_agent):
    with Client() as kms:
        assert kms.describe_key(key_id="alias/orders").key_metadata.key_state == "Enabled"
    key_agent.fail("Rejected.Throttling", times=None)
    with Client() as kms, pytest.raises(Throttled):
        kms.get_agent_status()
    sockets.append(key_agent.socket)

def test_the_next_test_meets_no_fault(key_agent):
    with Client() as kms:
        assert kms.get_agent_status().state == "Serving"
    assert sockets == [key_agent.socket]

def test_a_test_without_the_fixture_has_no_agent():
    assert "KEYFERRY_SOCKET" not in os.environ
"""


def test_the_fixture_is_an_agent_for_the_session(tmp_path: Path) -> None:
    """The fixture has no faults at the start of each test, and the aliases of conftest.py."""
    ended = pytest_of(tmp_path, conftest=CONFTEST, test_application=APPLICATION)
    assert "3 passed" in ended.stdout, ended.stdout + ended.stderr
    assert "warning" not in ended.stdout


def test_the_plugin_imports_nothing_before_it_is_used(tmp_path: Path) -> None:
    """Test suites that do not use the plugin pay nothing for it."""
    text = "import sys\n\ndef test_a():\n    assert not {'keyferry', 'msgpack'} & set(sys.modules)\n"
    ended = pytest_of(tmp_path, test_a=text)
    assert "1 passed" in ended.stdout, ended.stdout + ended.stderr
    assert "key_agent" in pytest_of(tmp_path, "--fixtures").stdout
