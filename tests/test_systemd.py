"""The service manager: its sockets, notifications, watchdog, and the keys that it keeps over a restart."""

import mmap
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from support.agent import RawConnection
from support.calls import call_ok
from support.fake_service_manager import Manager
from support.keyring import change, configuration

from keyferry import Client
from keyferry.protocol import wire
from keyferry.secret import SecretMemory
from keyferry_agent.daemon.systemd import InheritedDescriptors, ServiceManager, feed_watchdog
from keyferry_agent.keyring.fdstore import KeyringPersister
from keyferry_agent.keyring.keyring import development_keyring


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A service manager."""
    made = Manager(tmp_path)
    yield made
    made.close()


def arguments(keyring: Path, more: str = "") -> list[str]:
    """For an agent of this keyring, with a configuration beside it."""
    config = keyring.parent / "agent.toml"
    config.write_text(configuration(keyring, more=more))
    return ["--config", str(config)]


# --- sockets ----------------------------------------------------------------------------------------------------------


def listeners(folder: Path, *names: str) -> str:
    """The configuration of some listeners."""
    return "".join(f'[[listener]]\nname = "{name}"\npath = "{folder / name}"\n' for name in names)


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ([("a", "elsewhere"), ("b", "b2")], []),
        ([("x", "a"), ("y", "b")], []),
        ([("b", "a"), ("a", "b")], []),
        ([("b", "elsewhere")], ["a"]),
        ([("x", "b"), ("keyferry-agent.socket", "elsewhere")], []),
    ],
    ids=["by name", "by path", "name before path", "the rest are its own", "a sole stranger"],
)
def test_passed_socket_is_matched_by_name_or_path(
    keyring: Path, tmp_path: Path, manager: Manager, given: list[tuple[str, str]], own: list[str]
) -> None:
    """The agent does not remove a passed socket at its end."""
    sockets = [(name, manager.listening(tmp_path / path)) for name, path in given]
    with manager.start(arguments(keyring, listeners(tmp_path, "a", "b")), sockets) as agent:
        for path in [*(path for _, path in given), *own]:
            with RawConnection(tmp_path / path) as connection:
                assert connection.call("GetAgentStatus", {}).error is None
        assert agent.stop() == 0
    assert all((tmp_path / path).exists() for _, path in given)
    assert not any((tmp_path / path).exists() for path in own)
    for _, each in sockets:
        each.close()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("stranger", "named 'x'"),
        ("datagram", "not a Unix stream socket"),
        ("not listening", "not listening"),
        ("internet", "not a Unix stream socket"),
    ],
)
def test_unusable_passed_socket_stops_the_start(
    keyring: Path, tmp_path: Path, manager: Manager, kind: str, why: str
) -> None:
    """Otherwise no process would answer on the socket."""
    family = socket.AF_INET if kind == "internet" else socket.AF_UNIX
    kinds = socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM
    with socket.socket(family, kinds) as given:
        if family == socket.AF_UNIX:
            given.bind(str(tmp_path / "given"))
        if kind == "stranger":
            given.listen()
        names = [("a", given)] if kind != "stranger" else [("x", given), ("x", given)]
        agent = manager.start(arguments(keyring, listeners(tmp_path, "a")), names, ready=False)
        assert agent.wait() == 1
        assert why in "".join(agent.output)
        agent.kill()


def test_descriptors_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that inherited the variables is not the process that they name."""
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert not InheritedDescriptors.from_environment().named
    assert "LISTEN_FDS" not in os.environ


# --- notifications ----------------------------------------------------------------------------------------------------


def test_manager_is_notified_of_every_state(keyring: Path, socket_path: Path, manager: Manager) -> None:
    """Notifications are ready, reloading, the faults of a reload, and stopping."""
    what = arguments(keyring)
    with manager.start(what, path=socket_path) as agent:
        assert any(line.startswith("STATUS=Serving: 1 key in ") for line in manager.heard)
        with agent.client() as kms:
            kms.describe_key(key_id="alias/a")
        agent.signal(signal.SIGHUP)
        assert any(line.startswith("MONOTONIC_USEC=") for line in manager.wait_for("RELOADING=1"))
        assert any("Serving: 1 key" in line for line in manager.wait_for("READY=1"))
        (keyring.parent / "agent.toml").write_text("nonsense = true")
        agent.signal(signal.SIGHUP)
        manager.wait_for("RELOADING=1")
        assert any("Not reloaded, the old state serves: " in line for line in manager.wait_for("READY=1"))
        agent.signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        assert agent.wait() == 0


def test_children_do_not_inherit_the_notify_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the agent itself notifies the manager."""
    monkeypatch.setenv("NOTIFY_SOCKET", "@somewhere")
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert ServiceManager.from_environment().watchdog == 3
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()
    assert ServiceManager({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}).watchdog == 0
    ServiceManager({"NOTIFY_SOCKET": "/nowhere/at/all"}).ready("a manager that is gone harms nobody")


# --- the watchdog -----------------------------------------------------------------------------------------------------


def test_watchdog_is_notified_while_requests_are_answered(keyring: Path, socket_path: Path, manager: Manager) -> None:
    """The agent sends itself requests that no audit log has."""
    what = arguments(keyring, '[audit]\npath = "/dev/full"\n')
    with manager.start(what, path=socket_path, watchdog=0.5) as agent:
        for _ in range(3):
            manager.wait_for("WATCHDOG=1")
        assert not [line for line in agent.log if line["event"] == "audit.failed"]
        agent.signal(signal.SIGSTOP)
        manager._notify.settimeout(1.5)
        with suppress(BlockingIOError):  # notifications from before it was stopped
            manager._notify.setblocking(False)
            while True:
                manager.wait_for("WATCHDOG=1")
        manager._notify.settimeout(1.5)
        with pytest.raises(TimeoutError):
            manager.wait_for("WATCHDOG=1")


async def test_unanswered_own_request_stops_the_watchdog(
    autojump_clock: object,
) -> None:
    """The event loop runs, but the agent does not answer or refuses its own request."""

    class Fed(ServiceManager):
        fed = 0

        def alive(self, _status: str) -> None:
            self.fed += 1

    host = Fed({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "2000000"})
    near, far = (trio.SocketStream(end) for end in trio.socket.socketpair())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed_watchdog, host, near, lambda: "")
        decoder = wire.Decoder()

        async def asked() -> wire.Request:
            while True:
                decoder.feed(await far.receive_some())
                for message in decoder.messages():
                    assert isinstance(message, wire.Request)
                    return message

        await far.send_all(wire.encode_response((await asked()).msgid, None, {}))
        await trio.sleep(1.5)  # of the fake clock
        assert host.fed == 1
        error: dict[str, Any] = {"Code": "InternalFailure"}
        await far.send_all(wire.encode_response((await asked()).msgid, error, None))
        await asked()  # and is not answered
        await trio.sleep(10)
        assert host.fed == 1
        await far.aclose()


# --- keys that are kept -----------------------------------------------------------------------------------------------


def test_kept_keys_restart_an_agent_without_the_secret(keyring: Path, socket_path: Path, manager: Manager) -> None:
    """After a stop or a crash, earlier ciphertexts open."""
    what = arguments(keyring, "keep_keys = true")
    change(keyring, "rotate", "alias/a")
    with manager.start(what, path=socket_path) as agent, agent.client() as kms:
        sealed = kms.encrypt(key_id="alias/a", plaintext="c2VjcmV0")
        loaded = kms.get_agent_status().keyring_loaded_at
        assert agent.stop() == 0
    (keyring.parent / "identity").unlink()
    for end in (signal.SIGKILL, signal.SIGTERM):
        with manager.start(what, path=socket_path) as agent, agent.client() as kms:
            agent.wait_for("keyring.kept")
            assert kms.decrypt(ciphertext_blob=sealed.ciphertext_blob).plaintext == "c2VjcmV0"
            status = kms.get_agent_status()
            assert (status.keyring_loaded_at, status.memory_protection) == (loaded, "memfd_secret")
            assert kms.list_key_versions(key_id="alias/a").total_count == 2
            agent.signal(end)
            agent.wait()
    assert len(manager.kept) == 2


def is_secret_left(descriptor: int) -> bool:
    """Whether there is anything but zeros in secret memory. Closes the descriptor."""
    size = os.fstat(descriptor).st_size
    with mmap.mmap(descriptor, size) as mapped:
        os.close(descriptor)
        return any(mapped[:])


def test_reload_replaces_the_kept_keyring(keyring: Path, socket_path: Path, manager: Manager) -> None:
    """After any number of reloads, the manager holds one generation, and the old one is wiped."""
    what = arguments(keyring, "keep_keys = true")
    with manager.start(what, path=socket_path) as agent:
        old = os.dup(manager.kept["keyring-1-memory"])
        for count in range(3):
            change(keyring, "create-key", "--alias", f"alias/{count}")
            agent.signal(signal.SIGHUP)
            manager.wait_for("READY=1")
        assert sorted(manager.kept) == ["keyring-4-description", "keyring-4-memory"]
        assert not is_secret_left(old)
        assert is_secret_left(os.dup(manager.kept["keyring-4-memory"]))
        agent.kill()
    with manager.start(what, path=socket_path) as agent, agent.client() as kms:
        assert kms.list_keys().total_count == 4
        assert not [line for line in agent.log if line["event"].startswith("reload")]


def test_keyring_replaced_during_a_stop_is_read_at_the_start(
    keyring: Path, socket_path: Path, manager: Manager
) -> None:
    """If it does not open, the kept one serves, and the agent reports it."""
    what = arguments(keyring, "keep_keys = true")
    with manager.start(what, path=socket_path) as agent:
        agent.stop()
    change(keyring, "create-key", "--alias", "alias/b")
    with manager.start(what, path=socket_path) as agent, agent.client() as kms:
        manager.wait_for("READY=1")  # again, after a reload
        kms.describe_key(key_id="alias/b")
        agent.stop()
    change(keyring, "create-key", "--alias", "alias/c")
    (keyring.parent / "identity").unlink()
    with manager.start(what, path=socket_path) as agent, agent.client() as kms:
        assert "was replaced and has not been opened" in agent.wait_for("unseal.absent")["what"]
        kms.describe_key(key_id="alias/b")
        assert {each.name for each in kms.get_agent_status().conditions} == {"KeyringStale", "UnsealAbsent"}


@pytest.mark.parametrize("damage", ["memory", "description", "zero", "format"])
def test_incomplete_kept_keys_are_not_used(damage: str) -> None:
    """After a crash during storing, or with another version's description, the agent opens the file."""
    stored: dict[str, int] = {}

    def store(name: str, descriptor: int) -> bool:
        stored[name] = os.dup(descriptor)
        return True

    keyring = development_keyring(backing="auto", require=False)
    keeper = KeyringPersister(store, lambda _name: None)
    memory = keyring.memory
    keeper.store_memory(memory_like(memory.size))
    assert keeper.commit(keyring, None)
    given = {name: os.dup(descriptor) for name, descriptor in stored.items()}
    if damage == "memory":
        os.close(given.pop("keyring-1-memory"))
    elif damage == "description":
        os.close(given.pop("keyring-1-description"))
    elif damage == "format":
        with open(os.dup(given["keyring-1-description"]), "rb") as file:
            file.seek(0)
            text = file.read().replace(b'"Format": 1', b'"Format": 2')
        os.close(given["keyring-1-description"])
        given["keyring-1-description"] = os.memfd_create("other")
        os.write(given["keyring-1-description"], text)
    assert KeyringPersister(store, lambda _name: None).restore(given.items()) is None
    for descriptor in stored.values():
        os.close(descriptor)


def memory_like(size: int) -> int:
    """Fresh secret memory, all zero."""
    descriptors: list[int] = []
    SecretMemory(size, share=lambda descriptor: descriptors.append(os.dup(descriptor)))
    return descriptors.pop()


def test_restart_under_load_fails_no_request(keyring: Path, socket_path: Path, manager: Manager) -> None:
    """The manager owns the socket, so new clients wait; open clients reconnect after stops and crashes."""
    listening = manager.listening(socket_path)
    what = arguments(keyring, f'socket = "{socket_path}"')
    done = threading.Event()
    failures: list[BaseException] = []
    counts = [0, 0]

    def load(number: int) -> None:
        try:
            kms = Client(socket_path, timeout=60)
            while not done.is_set():
                if number:  # a new connection for every call
                    kms.close()
                    kms = Client(socket_path, timeout=60)
                kms.generate_data_key_without_plaintext(key_id="alias/a")
                counts[number] += 1
            kms.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(2)]
    agent = manager.start(what, [("default", listening)])
    for thread in threads:
        thread.start()
    try:
        for end in (signal.SIGTERM, signal.SIGKILL) * 3:
            agent.signal(end)
            agent.wait()
            before = list(counts)
            agent.kill()
            agent = manager.start(what, [("default", listening)])
            while not failures and any(now <= then for now, then in zip(counts, before, strict=True)):
                with RawConnection(socket_path) as connection:
                    call_ok(connection, "GetAgentStatus", {})
    finally:
        done.set()
        for thread in threads:
            thread.join()
        agent.kill()
        listening.close()
    assert not failures
