"""`keyferry-agent run --dev`: keys under the names that an application asks for, and where the agent listens."""

import http.client
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.agent import PATIENCE, RunningAgent, configured
from support.gateway import Credentials, call_acs3, call_v1, free_ports
from support.sdk import PYTHON, python_sdks

from keyferry import Client
from keyferry_agent.cli import main


def test_dev_has_a_key_for_each_alias(socket_path: Path) -> None:
    """`dev` has its two keys, and one for each alias on the command line with its key spec."""
    options = ["alias/orders", "alias/a/b_c=Aliyun_SM4", "alias/dev=Aliyun_SM4"]
    arguments = [word for option in options for word in ("--alias", option)]
    with RunningAgent(["--dev", *arguments], socket_path) as agent, agent.client() as kms:
        listed = [alias.alias_name for alias in kms.list_aliases().aliases.alias]
        specs = {alias: kms.describe_key(key_id=alias).key_metadata.key_spec for alias in listed}
        made = kms.generate_data_key(key_id="alias/a/b_c")
        assert kms.decrypt(ciphertext_blob=made.ciphertext_blob).plaintext == made.plaintext
    aes, sm4 = "Aliyun_AES_256", "Aliyun_SM4"
    assert specs == {"alias/dev": sm4, "alias/dev-sm4": sm4, "alias/orders": aes, "alias/a/b_c": sm4}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--alias", "alias/orders"], "--alias needs --dev; `keyferry-agent keyring create-key --alias`"),
        (["--dev", "--alias", "alias/a", "--alias", "alias/a=Aliyun_SM4"], "--alias: the same alias twice"),
        (["--dev", "--alias", "orders"], "expected alias/NAME"),
        (["--dev", "--alias", "alias/acs/kms"], "the cloud's own"),
        (["--dev", "--alias", "alias/a=AES_256"], "'AES_256' is not a key spec: expected Aliyun_AES_256 or Aliyun_SM4"),
        (["--dev", "--alias", "alias/a="], "'' is not a key spec"),
    ],
)
def test_invalid_alias_is_wrong_usage(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits with 2 before it starts an agent."""
    with pytest.raises(SystemExit) as ended:
        main.main(["run", *arguments])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("table", ["", 'socket = "{}"', '[[listener]]\nname = "a"\npath = "{}"'])
def test_dev_listens_on_the_socket_of_the_environment(table: str, tmp_path: Path) -> None:
    """$KEYFERRY_SOCKET and --socket win over the configuration."""
    path = tmp_path / "environment.sock"
    arguments = configured(tmp_path / "agent", table.format(tmp_path / "configuration.sock"))
    with (
        RunningAgent(arguments, None, environment={"KEYFERRY_SOCKET": str(path)}) as agent,
        Client(path) as kms,
    ):
        assert agent.wait_for("agent.serving")["sockets"] == [str(path)]
        assert kms.get_agent_status().state == "Serving"


@contextmanager
def dev_gateway(socket: Path, port: int, *arguments: str) -> Iterator[tuple[RunningAgent, str]]:
    """Run an agent with a gateway. Yields it, and what it has printed."""
    printed = socket.with_name("printed")
    shell = ["sh", "-c", 'exec "$@" > "$0"', str(printed)]
    options = ["--dev", "--gateway", f"127.0.0.1:{port}", *arguments]
    with RunningAgent(options, socket, prefix=shell) as agent:
        yield agent, printed.read_text()


def test_dev_prints_an_access_key_that_may_do_everything(socket_path: Path) -> None:
    """Both schemes of signatures are served, also after a reload; the secret is in no line of the log."""
    (port,) = free_ports(1)
    with dev_gateway(socket_path, port) as (agent, printed):
        exported = dict(re.findall(r"^export (\w+)=(\w+)$", printed, re.MULTILINE))
        names = "ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET"
        assert exported.keys() == set(names)
        credentials = Credentials(*(exported[name] for name in names))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        assert call_v1(connection, credentials, "ListKeys").content["TotalCount"] == 2
        agent.signal(signal.SIGHUP)
        agent.wait_for("reload.done")
        assert call_acs3(connection, credentials, "Encrypt", KeyId="alias/dev-sm4", Plaintext="QQ==").status == 200
        connection.close()
        assert agent.stop() == 0
    assert exported[names[1]] not in "".join(agent.output)


@python_sdks()
def test_printed_lines_are_a_first_call_with_an_sdk(socket_path: Path) -> None:
    """A shell runs all that the agent has printed."""
    (port,) = free_ports(1)
    environment = {**os.environ, "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"}
    with dev_gateway(socket_path, port) as (_, printed):
        done = subprocess.run(
            ["sh"],
            input=printed,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=environment,
            check=False,
        )
    assert re.fullmatch("CiphertextBlob: [A-Za-z0-9+/=]+\n", done.stdout), done.stderr


def test_dev_gateway_stands_beside_configured_ones(tmp_path: Path) -> None:
    """An agent without its name or address free does not start, and the message names the option."""
    ports = free_ports(2)
    table = f'[[gateway]]\nname = "{{}}"\nlisten = "127.0.0.1:{ports[0]}"\n'
    arguments = configured(tmp_path / "agent", table.format("plain"))[1:]
    with dev_gateway(tmp_path / "a.sock", ports[1], *arguments) as (agent, _):
        assert len(agent.wait_for("agent.serving")["gateways"]) == 2
    for name, port, why in (("dev-gateway", ports[1], "the name dev-gateway"), ("plain", ports[0], "the listen 127")):
        arguments = configured(tmp_path / "agent", table.format(name))
        agent = RunningAgent([*arguments, "--gateway", f"127.0.0.1:{port}"], tmp_path / "b.sock")
        assert agent.wait() == 1
        assert f"--gateway: another listener has {why}" in "".join(agent.output)
        agent.kill()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--gateway", "127.0.0.1:8461"], "--gateway needs --dev; a [[gateway]] table"),
        (["--dev", "--gateway", "0.0.0.0:8461"], "not a loopback address and a port"),
        (["--dev", "--gateway", "/tmp/gateway"], "not a loopback address and a port"),
        (["--dev", "--gateway", "127.0.0.1:0"], "not a loopback address and a port"),
        (["--dev", "--gateway", "localhost:8461"], "not a loopback address and a port"),
    ],
)
def test_invalid_gateway_is_wrong_usage(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits with 2 before it starts an agent. Only this host may reach a gateway for trying out."""
    with pytest.raises(SystemExit) as ended:
        main.main(["run", *arguments])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err
