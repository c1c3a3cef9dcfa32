"""Faults of a running agent's surroundings: descriptors, disks, files, clocks. It reports, refuses, and recovers."""

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
import trio.testing
from support.agent import RawConnection, RunningAgent, dev_agent
from support.audit_log import AT_START
from support.calls import call_ok, call_refused, error, result
from support.keyring import change, opened, serving
from support.skip_unless import library, root
from support.waiting import wait_until

from keyferry.protocol import wire
from keyferry_agent.audit import AuditLog
from keyferry_agent.chained_log import chain
from keyferry_agent.config.options import Options
from keyferry_agent.config.settings import Audit, Settings
from keyferry_agent.daemon import file_watcher
from keyferry_agent.daemon.file_watcher import FileWatcher
from keyferry_agent.daemon.reload import Reloader
from keyferry_agent.daemon.systemd import ServiceManager
from keyferry_agent.keyring.keyring import development_keyring
from keyferry_agent.peer import Process, evidence
from keyferry_agent.state import ServerState

DESCRIBE = ("DescribeKey", {"KeyId": "alias/a"})


def few(descriptors: int) -> Callable[[], None]:
    """A limit, to be set in a process that is about to be the agent."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))


@contextmanager
def room_for(descriptors: int) -> Iterator[None]:
    """Leave this process some descriptors to open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, before[1]))
        while True:
            try:
                opened.append(os.dup(0))
            except OSError:
                break
        for _ in range(descriptors):
            os.close(opened.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for each in opened:
            os.close(each)


# --- descriptors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("descriptors", [40, 41])
def test_exhausted_descriptors_do_not_change_an_identity(keyring: Path, socket_path: Path, descriptors: int) -> None:
    """A connection whose process has no pidfd is refused, and not served as a caller without grants."""
    this = f'uid={os.getuid()}, exe="{os.path.realpath(sys.executable)}"'
    with serving(keyring, socket_path, to=this, preexec=few(descriptors)) as agent, ExitStack() as stack:
        codes: list[str] = []
        while not codes or codes[-1] == "OK":
            connection = stack.enter_context(RawConnection(agent.socket))
            error = connection.call(*DESCRIBE).error
            codes.append(error["Code"] if error else "OK")
        assert len(codes) > 5
        assert error is not None
        assert "descriptor" in error["Message"], codes


@pytest.mark.parametrize("left", [0, 1])
def test_evidence_without_descriptors_is_an_error_without_a_leak(left: int) -> None:
    """A missing pidfd and an unreadable control group raise an error and leave no descriptor open."""
    here, there = socket.socketpair()
    with here, there:
        before = len(os.listdir("/proc/self/fd"))
        with room_for(left), pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            evidence(here, "default")
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("number", "raised"),
    [(errno.EINVAL, ProcessLookupError), (errno.ESRCH, ProcessLookupError), (errno.EMFILE, OSError)],
)
def test_process_number_is_used_only_without_kernel_handles(number: int, raised: type[OSError]) -> None:
    """If the kernel has handles and returns none, the number may already belong to another process."""
    with pytest.raises(raised) as error:
        Process.of(_Answering(number), os.getpid())
    assert type(error.value) is raised
    held = Process.of(_Answering(errno.ENOPROTOOPT), os.getpid())
    assert held is not None
    held.close()


class _Answering:
    """A socket on a kernel that answers everything with an error."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        """Return no process."""
        return -1

    def getsockopt(self, _level: int, _name: int, _length: int, /) -> bytes:
        """Answer."""
        raise OSError(self._number, os.strerror(self._number))


def test_reload_without_descriptors_keeps_the_old_state(keyring: Path, socket_path: Path) -> None:
    """The log has the reason, and the agent reloads when descriptors are available again."""
    with serving(keyring, socket_path, preexec=few(40)) as agent, RawConnection(agent.socket) as first:
        with ExitStack() as stack:
            error = None
            while error is None:
                error = stack.enter_context(RawConnection(agent.socket)).call(*DESCRIBE).error
            agent.signal(signal.SIGHUP)
            assert os.strerror(errno.EMFILE) in agent.wait_for("reload.failed")["why"]
            call_ok(first, *DESCRIBE)
        wait_until("the agent has descriptors again", lambda: not agent_is_short_of_descriptors(agent))
        call_ok(first, *DESCRIBE)
        agent.signal(signal.SIGHUP)
        agent.wait_for("reload.done")
        call_ok(first, *DESCRIBE)


def agent_is_short_of_descriptors(agent: RunningAgent) -> bool:
    """Whether it refuses connections."""
    with RawConnection(agent.socket) as connection:
        return connection.call(*DESCRIBE).error is not None


# --- the record's disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@root()
def test_full_disk_refuses_unrecordable_requests(keyring: Path, socket_path: Path, small_disk: Path) -> None:
    """Each answer has a whole entry, each refusal a reason, until the disk has room again."""
    record = small_disk / "audit.jsonl"
    more = f'[audit]\npath = "{record}"\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
        answered = 0
        while (error := connection.call(*DESCRIBE).error) is None:
            answered += 1
        for _ in range(3):
            connection.send(wire.encode_request(1, *DESCRIBE) * 50)
            refusals = [connection.response() for _ in range(50)]
            assert {refusal.error["Code"] for refusal in refusals if refusal and refusal.error} == {error["Code"]}
        assert error["Code"] == "ServiceUnavailableTemporary"
        assert "audit record" in error["Message"]
        assert agent.wait_for("audit.failed")["error"] == os.strerror(errno.ENOSPC)
        assert chain.verify([record]).lines == AT_START + answered
        subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
        for _ in range(20):
            call_ok(connection, *DESCRIBE)
        agent.wait_for("audit.resumed")  # an entry of its own
        assert agent.stop() == 0
        assert chain.verify([record]).lines == AT_START + answered + 20 + 1


def test_truncated_audit_log_is_continued(keyring: Path, socket_path: Path, tmp_path: Path) -> None:
    """Some log rotations truncate the file; the chain of the following entries shows the missing ones."""
    record = tmp_path / "audit.jsonl"
    more = f'[audit]\npath = "{record}"\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
        for _ in range(3):
            call_ok(connection, *DESCRIBE)
            copy = record.read_bytes()
            os.truncate(record, 0)
        for _ in range(2):
            call_ok(connection, *DESCRIBE)
    assert chain.verify([record])[::2] == (2, False)
    (tmp_path / "before").write_bytes(copy)
    assert chain.verify([tmp_path / "before", record]).lines == 3


def test_folder_in_place_of_the_audit_log_refuses_requests(keyring: Path, socket_path: Path, tmp_path: Path) -> None:
    """The failure is logged once, and an entry has the number of unrecorded requests once the folder is gone."""
    record = tmp_path / "audit.jsonl"
    more = f'[audit]\npath = "{record}"\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
        call_ok(connection, *DESCRIBE)
        record.rename(tmp_path / "before")
        record.mkdir()
        assert agent.wait_for("audit.failed")["error"] == os.strerror(errno.EISDIR)
        call_refused(connection, *DESCRIBE, "ServiceUnavailableTemporary", "audit record")
        record.rmdir()
        assert agent.wait_for("audit.resumed")["unrecorded"] == 1
        call_ok(connection, *DESCRIBE)
    assert chain.verify([tmp_path / "before", record]).lines == AT_START + 3


# --- files ------------------------------------------------------------------------------------------------------------


def test_unreadable_configuration_leaves_the_old_one_serving(keyring: Path, socket_path: Path) -> None:
    """A missing file, a folder, a link to itself and a binary file change nothing until the file is good again."""
    config = keyring.parent / "agent.toml"
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        good = config.read_bytes()
        ways: tuple[Callable[[], object], ...] = (
            lambda: None,
            config.mkdir,
            lambda: config.symlink_to(config),
            lambda: config.write_bytes(b"\xff"),
        )
        for count, spoil in enumerate(ways, 1):
            config.unlink()
            spoil()
            agent.signal(signal.SIGHUP)
            assert str(config) in agent.wait_for("reload.failed", count)["why"]
            call_ok(connection, *DESCRIBE)
            if config.is_dir():
                config.rmdir()
            else:
                config.unlink(missing_ok=True)
            config.write_bytes(good)
            agent.signal(signal.SIGHUP)
            agent.wait_for("reload.done", count)
            call_ok(connection, *DESCRIBE)


def test_two_agents_at_one_path_leave_each_other_alone(socket_path: Path) -> None:
    """The first logs the loss of its socket, serves its clients, and leaves the second's socket when it exits."""
    with dev_agent(socket_path) as first, RawConnection(socket_path) as old:
        socket_path.unlink()
        first.wait_for("socket.lost")
        with dev_agent(socket_path) as second, RawConnection(socket_path) as new:
            ids = {call_ok(each, "DescribeKey", {"KeyId": "alias/dev"})["KeyMetadata"]["KeyId"] for each in (old, new)}
            assert len(ids) == 2
            assert first.stop() == 0
            with RawConnection(socket_path) as another:
                call_ok(another, "GetAgentStatus", {})
            assert second.stop() == 0
    assert not socket_path.exists()


# --- threads ----------------------------------------------------------------------------------------------------------


async def test_failed_thread_start_delays_a_reload(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """A full host or pod is logged once, and the agent goes on."""
    looked = trio.Event()
    left = 5

    async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left > 0:
            raise RuntimeError("can't start new thread")
        looked.set()
        return function(*arguments)

    monkeypatch.setattr(file_watcher, "in_thread", in_thread)
    options = Options(config=None, socket=None, keyring=None, unseal=None, dev=True)
    settings = Settings(memory="prefer")
    agent = ServerState(settings, development_keyring(backing="auto", require=False))
    audit = AuditLog(Audit(str(tmp_path / "record")))
    reloader = Reloader(options, agent, audit, {}, ServiceManager(), None)
    with structlog.testing.capture_logs() as logged:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(FileWatcher(agent, audit, reloader).run)
            await looked.wait()
            nursery.cancel_scope.cancel()
    assert [line["event"] for line in logged] == ["reload.failed"]


# --- the clock --------------------------------------------------------------------------------------------------------


def test_clock_changes_affect_neither_connections_nor_the_chain(
    keyring: Path, socket_path: Path, tmp_path: Path
) -> None:
    """Deadlines and rates use the monotonic clock; deletion dates use the host's, so a clock ahead of one removes its key."""
    change(keyring, "create-key", "--alias", "alias/b")
    change(keyring, "schedule-deletion", "alias/b", "--days", "7")
    doomed = opened(keyring).find("alias/b").key_id
    record, clock = tmp_path / "audit.jsonl", tmp_path / "clock"
    clock.write_text("+0")
    environment = {
        "LD_PRELOAD": str(library("**/libfaketime.so.1", "libfaketime")),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    more = f'[limits]\nrequests_per_second = 1000\nrequest_timeout = 20\n[audit]\npath = "{record}"\n'
    with (
        serving(keyring, socket_path, more=more, environment=environment) as agent,
        RawConnection(agent.socket) as connection,
        RawConnection(agent.socket) as half,
    ):
        half.send(wire.encode_request(1, *DESCRIBE)[:-1])
        call_ok(connection, *DESCRIBE)
        for ahead, code in (
            ("+0", "Rejected"),
            ("+10y", "Forbidden.KeyNotFound"),
            ("-10y", "Rejected"),
            ("+0", "Rejected"),
        ):
            clock.write_text(ahead)
            call_ok(connection, *DESCRIBE)
            refusal = error(connection.call("GenerateDataKey", {"KeyId": doomed}))
            assert refusal["Code"].startswith(code), ahead
        half.send(wire.encode_request(1, *DESCRIBE)[-1:])
        result(half.response())
        agent.signal(signal.SIGHUP)
        agent.wait_for("reload.done")
    years = [int(json.loads(line)["time"][:4]) for line in record.read_text().splitlines()]
    assert len({*years}) == 3
    assert chain.verify([record]).lines == len(years) == AT_START + 10
