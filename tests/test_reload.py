"""What a running agent does when its keyring or its configuration is read again."""

import json
import os
import signal
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support.agent import RawConnection, RunningAgent
from support.keyring import change, configuration, serving
from support.requires import root

from keyferry_agent.keyring import loader
from keyferry_agent.keyring.document import KeyringError
from keyferry_agent.keyring.sealing import Unsealer, seal


def reload(agent: RunningAgent, count: int = 1) -> None:
    """Send SIGHUP, and wait until it was obeyed for the `count`th time."""
    agent.signal(signal.SIGHUP)
    agent.wait_for("reload.done", count=count)


def test_an_agent_serves_a_keyring_and_loads_what_was_added_on_sighup(keyring: Path, socket_path: Path) -> None:
    """Old ciphertexts open under the reloaded keyring; a file that does not open leaves the old one serving."""
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        assert connection.call("DescribeKey", {"KeyId": "alias/a"}).error is None
        change(keyring, "create-key", "--alias", "alias/b")
        reload(agent)
        assert connection.call("DescribeKey", {"KeyId": "alias/b"}).error is None
        keyring.write_bytes(b"broken")
        agent.signal(signal.SIGHUP)
        assert "does not open" in agent.wait_for("reload.failed")["why"]
        (keyring.parent / "agent.toml").write_text("nonsense")
        agent.signal(signal.SIGHUP)
        assert "not TOML" in agent.wait_for("reload.failed", count=2)["why"]
        assert connection.call("DescribeKey", {"KeyId": "alias/b"}).error is None


def test_a_reload_changes_grants_on_open_connections_and_says_what_it_cannot_change(
    keyring: Path, socket_path: Path
) -> None:
    """What only a restart can change is said at each reload that meets it."""
    config = keyring.parent / "agent.toml"
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        assert connection.call("DescribeKey", {"KeyId": "alias/a"}).error is None
        config.write_text(configuration(keyring, actions="kms:Decrypt", more="[limits]\nconnections = 1\n"))
        for count in (1, 2):
            reload(agent, count)
            assert "limits" in agent.wait_for("reload.limited", count=count)["what"]
        refused = connection.call("DescribeKey", {"KeyId": "alias/a"})
        assert refused.error is not None
        assert refused.error["Code"] == "Forbidden.NoPermission"
        with RawConnection(agent.socket) as second:  # one connection more than the new limit
            assert second.call("GetAgentStatus", {}).error is None


@root()
def test_a_replaced_keyring_is_unmapped_although_idle_connections_once_asked_about_it(
    keyring: Path, socket_path: Path
) -> None:
    """Nothing that the agent remembers of a caller keeps old keys alive."""

    def mappings(agent: RunningAgent) -> int:
        return Path(f"/proc/{agent.process.pid}/maps").read_text().count("secretmem")

    with serving(keyring, socket_path) as agent, ExitStack() as connections:
        before = mappings(agent)
        for count in range(1, 5):
            connection = connections.enter_context(RawConnection(agent.socket))
            assert connection.call("GetAgentStatus", {}).error is None
            reload(agent, count)
        assert mappings(agent) == before


def test_a_keyring_on_a_file_system_that_hangs_holds_up_no_sigterm(keyring: Path, socket_path: Path) -> None:
    """The loader waits for a FIFO that nobody writes; the agent serves, and stops when it is told to."""
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        keyring.unlink()
        os.mkfifo(keyring)
        agent.signal(signal.SIGHUP)
        assert connection.call("DescribeKey", {"KeyId": "alias/a"}).error is None
        connection.socket.close()
        assert agent.stop() == 0
    with suppress(OSError):  # lets the loader go, if it is still there
        os.close(os.open(keyring, os.O_WRONLY | os.O_NONBLOCK))


def test_a_loader_that_takes_too_long_is_given_up(keyring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reason."""
    monkeypatch.setattr(loader, "_TIMEOUT", 0.1)
    keyring.unlink()
    os.mkfifo(keyring)
    with pytest.raises(KeyringError, match="took longer"):
        loader.load(keyring, keyring.parent / "identity", backing="auto", require=False)


def test_however_long_a_loaders_complaint_is_it_arrives(keyring: Path) -> None:
    """A pipe holds 64 KiB; a keyring from the future can say more than that."""
    unsealer = Unsealer.read(keyring.parent / "identity")
    document = json.loads(unsealer.unseal(keyring.read_bytes()))
    document["Version"] = "9" * 300_000
    keyring.write_bytes(seal(json.dumps(document).encode(), document["Recipients"], None))
    with pytest.raises(KeyringError, match="format version"):
        loader.load(keyring, keyring.parent / "identity", backing="auto", require=False)
