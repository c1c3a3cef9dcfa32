"""Reloads of a running agent's keyring and configuration."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support.agent import RawConnection, RunningAgent
from support.calls import error
from support.keyring import WATCHFUL, change, configuration, copied, new_keyring, serving
from support.skip_unless import root
from support.stress import scale

from keyferry import KmsError, operations
from keyferry.parameters import encode_base64
from keyferry_agent.keyring import loader
from keyferry_agent.keyring.document import KeyringError
from keyferry_agent.keyring.sealing import Unsealer, seal

RELOADS = scale(15, 100)
"""Under full load, each takes the time of hundreds of requests."""


def reload(agent: RunningAgent, count: int = 1) -> None:
    """Send SIGHUP, and wait until it was obeyed for the `count`th time."""
    agent.signal(signal.SIGHUP)
    agent.wait_for("reload.done", count=count)


def test_sighup_loads_added_keys(keyring: Path, socket_path: Path) -> None:
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


def test_reload_changes_grants_on_open_connections(keyring: Path, socket_path: Path) -> None:
    """Each reload logs the settings that need a restart."""
    config = keyring.parent / "agent.toml"
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        assert connection.call("DescribeKey", {"KeyId": "alias/a"}).error is None
        config.write_text(configuration(keyring, actions="kms:Decrypt", more="[limits]\nconnections = 1\n"))
        for count in (1, 2):
            reload(agent, count)
            assert "limits" in agent.wait_for("reload.limited", count=count)["what"]
        refused = connection.call("DescribeKey", {"KeyId": "alias/a"})
        assert error(refused)["Code"] == "Forbidden.NoPermission"
        with RawConnection(agent.socket) as second:  # one connection more than the new limit
            assert second.call("GetAgentStatus", {}).error is None


def test_reload_with_swapped_listeners_is_refused(keyring: Path, tmp_path: Path) -> None:
    """Sockets change with a restart only, and a grant to a listener means the socket with its name."""
    config = tmp_path / "agent.toml"
    head = f'keyring = "{keyring}"\nunseal = "{tmp_path / "identity"}"\nmemory = "prefer"\n'
    grant = '[[grant]]\nname="a"\nto={listener="admin"}\nactions=["kms:*"]\nkeys=["*"]\n'

    def listeners(first: str, second: str) -> str:
        return "".join(
            f'[[listener]]\nname="{name}"\npath="{tmp_path / str(number)}"\n'
            for number, name in enumerate((first, second))
        )

    config.write_text(head + listeners("admin", "app"))
    with RunningAgent(["--config", str(config)], None) as agent, RawConnection(tmp_path / "0") as connection:
        config.write_text(head + listeners("app", "admin") + grant)
        agent.signal(signal.SIGHUP)
        assert "restart" in agent.wait_for("reload.failed")["why"]
        assert connection.call("DescribeKey", {"KeyId": "alias/a"}).error is not None
        config.write_text(head + listeners("admin", "app") + grant)
        reload(agent)
        assert connection.call("DescribeKey", {"KeyId": "alias/a"}).error is None


def test_abandoned_loader_exits(keyring: Path) -> None:
    """The agent may have exited, and the file system may hang forever."""
    (keyring.parent / "identity").unlink()
    os.mkfifo(keyring.parent / "identity")
    code = (
        "from keyferry_agent.keyring import loader_process as process; import sys; process.READ_SECONDS = 1; "
        "process.main(*sys.argv[1:])"
    )
    ended = subprocess.run([sys.executable, "-c", code, keyring, keyring.parent / "identity"], check=False, timeout=60)
    assert ended.returncode == -signal.SIGALRM


@root()
def test_replaced_keyring_is_unmapped_with_idle_connections(keyring: Path, socket_path: Path) -> None:
    """Nothing that the agent remembers of a caller keeps old keys in memory."""

    def mappings(agent: RunningAgent) -> int:
        return Path(f"/proc/{agent.process.pid}/maps").read_text().count("secretmem")

    with serving(keyring, socket_path) as agent, ExitStack() as connections:
        before = mappings(agent)
        for count in range(1, 5):
            connection = connections.enter_context(RawConnection(agent.socket))
            assert connection.call("GetAgentStatus", {}).error is None
            assert connection.call("Encrypt", {"KeyId": "alias/a", "Plaintext": "AAAA"}).error is None
            for _ in range(3):  # so that it is recalled
                assert connection.call("GenerateDataKey", {"KeyId": "alias/a"}).error is None
            refused = {"KeyId": "alias/a", "Plaintext": "AAAA", "DryRun": True}
            assert connection.call("Encrypt", refused).error is not None
            reload(agent, count)
        assert mappings(agent) == before


def test_hanging_identity_file_does_not_delay_sigterm(keyring: Path, socket_path: Path) -> None:
    """The loader blocks on a FIFO without a writer; the agent serves, and stops on request."""
    identity = keyring.parent / "identity"
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        identity.unlink()
        os.mkfifo(identity)
        agent.signal(signal.SIGHUP)
        assert connection.call("DescribeKey", {"KeyId": "alias/a"}).error is None
        connection.socket.close()
        assert agent.stop() == 0
    with suppress(OSError):  # lets the loader go, if it is still there
        os.close(os.open(identity, os.O_WRONLY | os.O_NONBLOCK))


def test_a_loader_that_takes_too_long_is_given_up(keyring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reason."""
    monkeypatch.setattr(loader, "READ_SECONDS", 0.1)
    (keyring.parent / "identity").unlink()
    os.mkfifo(keyring.parent / "identity")
    with pytest.raises(KeyringError, match="took longer"):
        loader.load(keyring, keyring.parent / "identity", backing="auto", require=False)


def test_long_error_of_a_loader_arrives_whole(keyring: Path) -> None:
    """A keyring of a later version can cause an error of more than the 64 KiB of a pipe."""
    unsealer = Unsealer.read(keyring.parent / "identity")
    document = json.loads(unsealer.unseal(keyring.read_bytes()))
    document["Version"] = "9" * 300_000
    keyring.write_bytes(seal(json.dumps(document).encode(), document["Recipients"], None))
    with pytest.raises(KeyringError, match="format version"):
        loader.load(keyring, keyring.parent / "identity", backing="auto", require=False)


# --- files that are replaced ------------------------------------------------------------------------------------------


def test_a_keyring_that_is_replaced_is_loaded_without_a_signal(keyring: Path, socket_path: Path) -> None:
    """The keyring is replaced by a rename, or overwritten."""
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        change(keyring, "create-key", "--alias", "alias/b")
        agent.wait_for("reload.done")
        assert connection.call("DescribeKey", {"KeyId": "alias/b"}).error is None
        shutil.copy(keyring, keyring.parent / "copy.age")
        change(keyring.parent / "copy.age", "create-key", "--alias", "alias/c")
        keyring.write_bytes((keyring.parent / "copy.age").read_bytes())
        agent.wait_for("reload.done", count=2)
        assert connection.call("DescribeKey", {"KeyId": "alias/c"}).error is None


def test_a_secret_that_kubernetes_swaps_is_loaded(keyring: Path, tmp_path: Path, socket_path: Path) -> None:
    """Kubernetes replaces the `..data` link that the mounted name leads through, and writes to no watched file."""
    volume = tmp_path / "volume"

    def update(number: int) -> None:
        folder = volume / f"..2026_{number}"
        folder.mkdir(parents=True)
        (folder / "keyring.age").write_bytes(keyring.read_bytes())
        (volume / "..data_tmp").symlink_to(folder.name)
        (volume / "..data_tmp").replace(volume / "..data")

    update(1)
    (volume / "keyring.age").symlink_to("..data/keyring.age")
    arguments = ["--keyring", str(volume / "keyring.age"), "--unseal", str(tmp_path / "identity")]
    config = tmp_path / "grants.toml"
    config.write_text(
        f'memory = "prefer"\n[[grant]]\nname="me"\nto={{uid={os.getuid()}}}\nactions=["kms:*"]\nkeys=["*"]\n'
    )
    with (
        RunningAgent([*arguments, "--config", str(config)], socket_path) as agent,
        RawConnection(agent.socket) as connection,
    ):
        change(keyring, "create-key", "--alias", "alias/b")
        update(2)
        shutil.rmtree(volume / "..2026_1")
        agent.wait_for("reload.done")
        assert connection.call("DescribeKey", {"KeyId": "alias/b"}).error is None


def test_replaced_configuration_is_read_without_a_signal(keyring: Path, socket_path: Path) -> None:
    """Open connections have the new grants."""
    config = keyring.parent / "agent.toml"
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        assert connection.call("DescribeKey", {"KeyId": "alias/a"}).error is None
        copied(config, configuration(keyring, actions="kms:Decrypt").encode())
        agent.wait_for("reload.done")
        assert error(connection.call("DescribeKey", {"KeyId": "alias/a"}))["Code"] == "Forbidden.NoPermission"


def from_the_future(keyring: Path) -> bytes:
    """A keyring of a format that this version does not know."""
    raw = json.loads(Unsealer.read(keyring.parent / "identity").unseal(keyring.read_bytes()))
    return seal(json.dumps({**raw, "Version": 3}).encode(), raw["Recipients"], None)


def of_somebody_else(keyring: Path) -> bytes:
    """A keyring that this host's identity does not open."""
    (keyring.parent / "else").mkdir()
    return new_keyring(keyring.parent / "else").read_bytes()


@pytest.fixture(scope="module")
def watchful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, RunningAgent]]:
    """A keyring that tests replace and put back, and its agent."""
    keyring = new_keyring(tmp_path_factory.mktemp("watchful"))
    with serving(keyring, keyring.parent / "agent.sock", command=WATCHFUL) as agent:
        yield keyring, agent


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda keyring: keyring.read_bytes()[:-1], "does not open"),
        (lambda _: b"", "does not open"),
        (from_the_future, "upgrade"),
        (of_somebody_else, "does not open"),
        (None, "No such file"),
    ],
    ids=["damaged", "empty", "from the future", "of somebody else", "removed"],
)
def test_fault_of_a_replaced_keyring_is_reported_once(
    watchful: tuple[Path, RunningAgent], broken: Callable[[Path], bytes] | None, why: str
) -> None:
    """Until a good one is there, which is loaded as if nothing had been."""
    keyring, agent = watchful
    reports = Counter(line["event"] for line in agent.log)
    failures, reloads = reports["reload.failed"] + 1, reports["reload.done"] + 1
    with RawConnection(agent.socket) as connection:
        good = keyring.read_bytes()
        if broken is None:
            keyring.unlink()
        else:
            copied(keyring, broken(keyring))
        assert why in agent.wait_for("reload.failed", count=failures)["why"]
        assert connection.call("DescribeKey", {"KeyId": "alias/a"}).error is None
        copied(keyring, good)
        agent.wait_for("reload.done", count=reloads)
        assert sum(line["event"] == "reload.failed" for line in agent.log) == failures
        assert connection.call("DescribeKey", {"KeyId": "alias/a"}).error is None


def test_reloads_under_load_lose_no_request(keyring: Path, socket_path: Path) -> None:
    """Pipelines of every operation run while keys rotate and the agent reloads, and each answer is correct."""
    change(keyring, "create-key", "--alias", "alias/sm4", "--key-spec", "Aliyun_SM4")
    done = threading.Event()
    wrong: list[object] = []
    asked = 0

    def load(number: int) -> None:
        nonlocal asked
        with agent.client() as kms:
            while not done.is_set():
                texts = [encode_base64(os.urandom(32)) for _ in range(50)]
                keys = ("alias/a", "alias/sm4")
                sealed = kms.pipeline(
                    operations.Encrypt(key_id=keys[i % 2], plaintext=text, encryption_context={"n": str(number)})
                    for i, text in enumerate(texts)
                )
                wrong.extend(each for each in sealed if isinstance(each, KmsError))
                opened = kms.pipeline(
                    operations.Decrypt(ciphertext_blob=each.ciphertext_blob, encryption_context={"n": str(number)})
                    for each in sealed
                )
                wrong.extend(
                    each
                    for each, text in zip(opened, texts, strict=True)
                    if isinstance(each, KmsError) or each.plaintext != text
                )
                asked += 100

    with serving(keyring, socket_path) as agent, ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load, number) for number in range(2)]
        try:
            for count in range(1, RELOADS + 1):
                if count % 10 == 0:
                    change(keyring, "rotate", "alias/a")
                reload(agent, count)  # or more than that: the agent sees by itself, too, that the file was replaced
        finally:
            done.set()
        for each in loads:
            each.result()
        assert not wrong
        assert asked
        with agent.client() as kms:
            assert kms.list_key_versions(key_id="alias/a").total_count == 1 + RELOADS // 10
