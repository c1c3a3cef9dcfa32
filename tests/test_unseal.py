"""The unseal secret in the hands of an operator: sealed agents, `keyferry-agent unseal`, reloads without the secret."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.agent import PATIENCE, RawConnection, RunningAgent
from support.calls import call_ok, error
from support.fake_service_manager import Manager
from support.keyring import change, configuration, opened
from support.other_user import OTHER_USER, line_of, running_as
from support.skip_unless import root

from keyferry import KmsError
from keyferry_agent.cli.main import main
from keyferry_agent.keyring.sealing import seal

DESCRIBE = ("DescribeKey", {"KeyId": "alias/a"})


def manual(keyring: Path, more: str = "", actions: str = "kms:*") -> list[str]:
    """Arguments for an agent whose secret an operator has."""
    text = configuration(keyring, actions=actions, more=f'unseal_socket = "{keyring.parent / "unseal"}"\n{more}')
    config = keyring.parent / "agent.toml"
    config.write_text(text.replace(f'"{keyring.parent / "identity"}"', '"manual"'))
    return ["--config", str(config)]


def unseal(keyring: Path, *arguments: object, given: bytes | None = None) -> "subprocess.CompletedProcess[bytes]":
    """Run `keyferry-agent unseal`, with `given` in a pipe as its standard input."""
    command = [sys.executable, "-m", "keyferry_agent", "unseal", "--socket", str(keyring.parent / "unseal")]
    return subprocess.run(
        [*command, *map(str, arguments)],
        input=b"" if given is None else given,
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )


def secret(keyring: Path) -> bytes:
    """The identity that opens the keyring."""
    return (keyring.parent / "identity").read_bytes()


def entries(path: Path, event: str) -> list[dict[str, object]]:
    """The entries of an audit log of one kind."""
    return [each for line in path.read_text().splitlines() if (each := json.loads(line))["event"] == event]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A service manager."""
    made = Manager(tmp_path)
    yield made
    made.close()


def test_a_sealed_agent_refuses_calls_until_it_is_unsealed(keyring: Path, socket_path: Path) -> None:
    """A sealed agent's refusals name the seal, its status is served, and the unsealing operator is recorded."""
    audit = keyring.parent / "audit.jsonl"
    with RunningAgent(manual(keyring, f'[audit]\npath = "{audit}"\n'), socket_path) as agent:
        assert "keyferry-agent unseal" in agent.wait_for("unseal.absent")["what"]
        with agent.client() as kms:
            with pytest.raises(KmsError, match="The agent is sealed") as refused:
                kms.describe_key(key_id="alias/a")
            assert (refused.value.code, refused.value.http_status) == ("ServiceUnavailableTemporary", 503)
            status = kms.get_agent_status()
            assert (status.state, status.ready, status.keyring_source, status.keys) == ("Sealed", False, "None", 0)
            assert [each.name for each in status.conditions] == ["Sealed"]
            ended = unseal(keyring, given=secret(keyring))
            assert (ended.returncode, ended.stderr) == (0, b"")
            assert ended.stdout.startswith(b"unsealed: 1 key, loaded 2")
            assert kms.describe_key(key_id="alias/a").key_metadata.key_state == "Enabled"
            status = kms.get_agent_status()
            assert (status.state, status.ready, status.keyring_source) == ("Serving", True, "File")
        assert "AGE-SECRET-KEY" not in "".join(agent.output)
    (entry,) = entries(audit, "audit.unseal")
    assert (entry["uid"], entry["outcome"]) == (os.getuid(), "OK")
    assert "AGE-SECRET-KEY" not in audit.read_text()
    assert main(["audit", "verify", str(audit)]) == 0


def test_wrong_secret_is_recorded_and_leaves_the_agent_sealed(keyring: Path, socket_path: Path) -> None:
    """The command has the reason, and the next attempt may succeed."""
    audit = keyring.parent / "audit.jsonl"
    with RunningAgent(manual(keyring, f'[audit]\npath = "{audit}"\n'), socket_path) as agent:
        ended = unseal(keyring, given=b"a wrong passphrase\n")
        assert ended.returncode == 1
        assert b"not unsealed" in ended.stderr
        assert b"does not open" in ended.stderr
        assert "wrong passphrase" not in "".join(agent.output)
        with agent.client() as kms:
            assert kms.get_agent_health().state == "Sealed"
        agent.wait_for("unseal.failed")
        assert unseal(keyring, "--secret", keyring.parent / "identity").returncode == 0
        with agent.client() as kms:
            assert kms.get_agent_health().ready
    assert [each["outcome"] for each in entries(audit, "audit.unseal")] == ["Refused", "OK"]


def test_a_passphrase_unseals_a_keyring(keyring: Path, socket_path: Path) -> None:
    """The passphrase is the first line of standard input."""
    document = opened(keyring)
    document.recipients = []
    keyring.write_bytes(seal(document.to_json(), [], "several words for a test"))
    with RunningAgent(manual(keyring), socket_path) as agent, agent.client() as kms:
        assert unseal(keyring, given=b"several words for a test\n").returncode == 0
        assert kms.describe_key(key_id="alias/a").key_metadata.key_state == "Enabled"


@pytest.mark.parametrize(
    ("given", "why"), [(b"", "empty"), (b"x" * 70_000, "longer than 65536 bytes")], ids=["empty", "long"]
)
def test_invalid_secret_is_not_sent(keyring: Path, socket_path: Path, given: bytes, why: str) -> None:
    with RunningAgent(manual(keyring), socket_path) as agent:
        ended = unseal(keyring, given=given)
        assert ended.returncode == 1
        assert why in ended.stderr.decode()
        assert not [line for line in agent.log if line["event"] == "unseal.failed"]


def test_an_open_secret_file_is_not_sent(keyring: Path, socket_path: Path) -> None:
    """Other users can read such a file."""
    with RunningAgent(manual(keyring), socket_path):
        (keyring.parent / "identity").chmod(0o644)
        ended = unseal(keyring, "--secret", keyring.parent / "identity")
        assert ended.returncode == 1
        assert b"chmod 600" in ended.stderr


def test_unseal_without_an_agent_names_the_socket(keyring: Path) -> None:
    """The message has the setting that the agent needs."""
    ended = unseal(keyring, given=b"x")
    assert ended.returncode == 1
    assert b'unseal = "manual"' in ended.stderr


@root("to count the descriptors of a hardened process")
@pytest.mark.parametrize("descriptors", ["none", "file", "two"])
def test_a_message_without_one_pipe_is_refused(keyring: Path, socket_path: Path, descriptors: str) -> None:
    """The agent goes on, and keeps no descriptor of the message."""
    with RunningAgent(manual(keyring), socket_path) as agent:
        before = len(os.listdir(f"/proc/{agent.process.pid}/fd"))
        reader, writer = os.pipe()
        with open(keyring, "rb") as file, socket.socket(socket.AF_UNIX) as operator:
            operator.settimeout(PATIENCE)
            operator.connect(str(keyring.parent / "unseal"))
            numbers = {"none": [], "file": [file.fileno()], "two": [reader, reader]}[descriptors]
            socket.send_fds(operator, [b"\0"], numbers)
            assert "one pipe" in json.loads(operator.recv(4096))["Error"]
            assert operator.recv(1) == b""
        os.close(reader)
        os.close(writer)
        assert unseal(keyring, given=secret(keyring)).returncode == 0
        assert len(os.listdir(f"/proc/{agent.process.pid}/fd")) <= before + 1


@root()
def test_another_user_cannot_unseal_even_an_open_socket(keyring: Path, socket_path: Path) -> None:
    """The mode keeps others out; after a change of the mode, the kernel's evidence does."""
    with RunningAgent(manual(keyring), socket_path) as agent:
        path = keyring.parent / "unseal"
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o666)
        path.parent.chmod(0o711)
        code = "s = socket.socket(socket.AF_UNIX); s.connect('unseal'); print(s.recv(4096).decode(), flush=True)"
        with running_as(code, before=f"os.chdir({str(path.parent)!r})") as other:
            assert "only root" in line_of(other)
        assert agent.wait_for("unseal.refused")["uid"] == OTHER_USER


def test_kept_keys_serve_after_a_restart_without_a_secret(keyring: Path, socket_path: Path, manager: Manager) -> None:
    """The manager has each state; a stop discards the keys, and the next agent is sealed."""
    what = manual(keyring, "keep_keys = true")
    with manager.start(what, path=socket_path) as agent, agent.client() as kms:
        assert any(line.startswith("STATUS=Sealed: no keyring is open; calls are refused") for line in manager.heard)
        assert unseal(keyring, given=secret(keyring)).returncode == 0
        manager.wait_for_status("Serving: 1 key in ")
        assert agent.stop() == 0
    for end in (signal.SIGKILL, signal.SIGTERM):
        with manager.start(what, path=socket_path) as agent, agent.client() as kms:
            assert any("kept over a restart" in line for line in manager.heard)
            assert kms.describe_key(key_id="alias/a").key_metadata.key_state == "Enabled"
            status = kms.get_agent_status()
            assert (status.keyring_source, status.conditions) == ("Kept", ())
            agent.signal(end)
            agent.wait()
        assert not [line for line in agent.log if line["event"] in ("reload.failed", "unseal.absent")]


def test_changed_keyring_waits_for_the_operator(keyring: Path, socket_path: Path) -> None:
    """The old keyring serves, log and status report it, and the secret loads the new one."""
    with RunningAgent(manual(keyring), socket_path) as agent, agent.client() as kms:
        assert unseal(keyring, given=secret(keyring)).returncode == 0
        change(keyring, "create-key", "--alias", "alias/b")
        assert "was replaced and has not been opened" in agent.wait_for("unseal.absent", count=2)["what"]
        health = kms.get_agent_health()
        assert (health.ready, [each.name for each in health.conditions]) == (True, ["KeyringStale"])
        assert kms.list_keys().total_count == 1
        assert unseal(keyring, given=secret(keyring)).returncode == 0
        assert kms.list_keys().total_count == 2
        assert kms.get_agent_health().conditions == ()
        assert not [line for line in agent.log if line["event"] == "reload.failed"]


def test_a_grant_is_revoked_while_the_secret_is_absent(keyring: Path, socket_path: Path) -> None:
    """Remembered decisions end too; the absence is logged once, and is not a failure."""
    config = keyring.parent / "agent.toml"
    config.write_text(configuration(keyring))
    with RunningAgent(["--config", str(config)], socket_path) as agent, RawConnection(agent.socket) as connection:
        request = ("GenerateDataKeyWithoutPlaintext", {"KeyId": "alias/a"})
        for _ in range(3):
            call_ok(connection, *request)
        (keyring.parent / "identity").unlink()
        agent.wait_for("unseal.absent")
        names = [each["Name"] for each in call_ok(connection, "GetAgentStatus", {})["Conditions"]]
        assert names == ["UnsealAbsent"]
        call_ok(connection, *request)
        done = sum(line["event"] == "reload.done" for line in agent.log)
        config.write_text(configuration(keyring, actions="kms:DescribeKey"))
        agent.wait_for("reload.done", count=done + 1)
        assert error(connection.call(*request))["Code"] == "Forbidden.NoPermission"
        call_ok(connection, *DESCRIBE)
        events = [line["event"] for line in agent.log]
        assert (events.count("unseal.absent"), events.count("reload.failed")) == (1, 0)


def test_a_grant_is_revoked_while_a_changed_keyring_is_broken(keyring: Path, socket_path: Path) -> None:
    """The old keyring serves under the new grants; the failure is logged as an error, and in the status."""
    config = keyring.parent / "agent.toml"
    config.write_text(configuration(keyring))
    with RunningAgent(["--config", str(config)], socket_path) as agent, RawConnection(agent.socket) as connection:
        whole = keyring.read_bytes()
        keyring.write_bytes(whole[:-1])
        config.write_text(configuration(keyring, actions="kms:Decrypt"))
        failed = agent.wait_for("reload.failed")
        assert failed["configuration"] == "adopted"
        error = connection.call(*DESCRIBE).error
        assert error is not None
        assert error["Code"] == "Forbidden.NoPermission"
        names = [each["Name"] for each in call_ok(connection, "GetAgentStatus", {})["Conditions"]]
        assert names == ["ReloadFailed", "KeyringStale"]
        keyring.write_bytes(whole)
        config.write_text(configuration(keyring))
        agent.wait_for("reload.done")
        call_ok(connection, *DESCRIBE)
        assert call_ok(connection, "GetAgentStatus", {})["Conditions"] == []


def test_check_accepts_a_manual_secret(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` inspects the socket's folder; an unseal_socket without the setting is an error."""
    (_, config) = manual(keyring)
    assert main(["check", config]) == 0
    assert "unseal" not in capsys.readouterr().err
    manual(keyring)
    text = Path(config).read_text()
    Path(config).write_text(text.replace(str(keyring.parent / "unseal"), "/nowhere/unseal"))
    assert main(["check", config]) == 0
    assert "unseal_socket: /nowhere" in capsys.readouterr().err
    Path(config).write_text(text.replace('"manual"', f'"{keyring.parent / "identity"}"'))
    assert main(["check", config]) == 1
    assert 'unseal_socket: has no effect without unseal = "manual"' in capsys.readouterr().err
