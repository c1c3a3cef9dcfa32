"""The client's logger: one line for each call, without anything that was sent or answered."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.agent import PATIENCE, RunningAgent
from support.fake_server import client_of, respond_with, scripted_server

from keyferry import AgentUnavailable, Client, InvalidRequest, NotFound, Retry, operations
from keyferry.aio import Client as AsyncClient
from keyferry.parameters import encode_base64

SECRETS = ("a plaintext 4111", "tenant-of-nobody", "context-key")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the client's logger, their levels in front."""
    return [f"{each.levelname} {each.getMessage()}" for each in caplog.records if each.name == "keyferry"]


@pytest.fixture(params=["blocking", "trio", "asyncio"])
def call(request: pytest.FixtureRequest, agent: RunningAgent) -> Callable[[str, dict[str, Any]], Any]:
    """Call an operation of the agent by one of the clients."""

    def blocking(operation: str, params: dict[str, Any]) -> Any:
        with agent.client() as kms:
            return kms.call(operation, params)

    def awaited(operation: str, params: dict[str, Any]) -> Any:
        async def main() -> Any:
            async with AsyncClient(agent.socket) as kms:
                return await kms.call(operation, params)

        return anyio.run(main, backend=request.param)

    return blocking if request.param == "blocking" else awaited


def test_a_line_has_operation_request_id_and_duration(
    call: Callable[[str, dict[str, Any]], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The level is DEBUG for an answer, and INFO with the code for a refusal."""
    caplog.set_level(logging.DEBUG, "keyferry")
    made = call("DescribeKey", {"KeyId": "alias/dev"})
    with pytest.raises(NotFound) as caught:
        call("DescribeKey", {"KeyId": "alias/none"})
    answered, refused = lines(caplog)
    assert answered.startswith(f"DEBUG DescribeKey: answered, RequestId {made['RequestId']}, ")
    request_id = caught.value.request_id
    assert refused.startswith(f"INFO DescribeKey: refused with Forbidden.AliasNotFound, RequestId {request_id}, ")
    assert answered.endswith(" ms")


def test_no_value_of_a_call_is_logged(agent: RunningAgent, caplog: pytest.LogCaptureFixture) -> None:
    """Answers, refusals and pipelines are logged without plaintexts, CiphertextBlobs and contexts."""
    caplog.set_level(logging.DEBUG, "keyferry")
    plaintext, tenant, key = SECRETS
    context = {key: tenant}
    secrets = [*SECRETS, encode_base64(plaintext.encode())]
    with agent.client() as kms:
        made = kms.encrypt(key_id="alias/dev", plaintext=plaintext.encode(), encryption_context=context)
        secrets.append(made.ciphertext_blob)
        kms.decrypt(ciphertext_blob=made.ciphertext_blob, encryption_context=context)
        with pytest.raises(InvalidRequest):
            kms.decrypt(ciphertext_blob=made.ciphertext_blob)
        with pytest.raises(InvalidRequest):
            kms.call("Decrypt", {key: tenant})
        kms.pipeline([operations.Decrypt(ciphertext_blob=made.ciphertext_blob, encryption_context=context)] * 2)
    logged = lines(caplog)
    assert [line.split(":")[0] for line in logged] == [
        "DEBUG Encrypt", "DEBUG Decrypt", "INFO Decrypt", "INFO Decrypt", "DEBUG Decrypt", "DEBUG Decrypt",
    ]  # fmt: skip
    for record in caplog.records:
        assert not any(secret in repr(vars(record)) for secret in secrets)


def test_a_failure_and_a_repeat_are_logged(socket_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The lines have the exception's name and the codes."""
    caplog.set_level(logging.INFO, "keyferry")
    with Client(socket_path) as kms, pytest.raises(AgentUnavailable):
        kms.call("GetAgentStatus", {})
    with (
        scripted_server(socket_path, respond_with("ServiceUnavailableTemporary", "")),
        Client(socket_path, retry=Retry(first=0)) as kms,
    ):
        kms.call("GetAgentStatus", {})
    failed, repeated = lines(caplog)
    assert failed.startswith("INFO GetAgentStatus: AgentUnavailable, ")
    assert repeated == "INFO GetAgentStatus: refused, repeated in 0 ms"


def test_a_line_of_the_log_stays_one_line(socket_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A code or an operation with control characters is escaped and cut off."""
    caplog.set_level(logging.INFO, "keyferry")
    with (
        client_of(socket_path, respond_with("Bad\nINFO forged" + "x" * 100)) as kms,
        pytest.raises(Exception, match="Bad"),
    ):
        kms.call("Get\x1b[2J", {})
    (line,) = lines(caplog)
    assert line.isprintable()
    assert len(line) < 250


@pytest.mark.parametrize("imported", ["", "import logging; "])
def test_a_program_without_a_handler_sees_no_line(imported: str, tmp_path: Path) -> None:
    """The client does not import `logging`, so a program that does not use it has no log."""
    code = (
        f"{imported}import keyferry, sys\n"
        f"try: keyferry.Client({str(tmp_path / 'none')!r}).get_agent_status()\n"
        "except keyferry.AgentUnavailable: print('logging' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert (ended.stdout.strip(), ended.stderr) == (str(bool(imported)), "")
