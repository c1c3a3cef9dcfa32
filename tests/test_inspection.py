"""Callers' programs, inspected where their file systems cannot stop the agent."""

import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.agent import PATIENCE, RawConnection, RunningAgent
from support.hanging_files import hanging_program
from support.keyring import configuration
from support.other_user import OTHER_USER, line_of
from support.skip_unless import fuse, root

from keyferry.protocol import wire
from keyferry_agent.peer import Process, inspection
from keyferry_agent.peer.inspection import Inspector

DESCRIBE = ("DescribeKey", {"KeyId": "alias/a"})
PYTHON = os.path.realpath(sys.executable)


CALLING = """
import os, socket, sys
os.setgroups([])
os.setresgid(*[int(sys.argv[2])] * 3)
os.setresuid(*[int(sys.argv[2])] * 3)
print("ready", flush=True)
input()
connections = [socket.socket(socket.AF_UNIX) for _ in range(int(sys.argv[3]))]
for connection in connections:
    connection.connect(sys.argv[1])
    connection.sendall(bytes.fromhex(sys.argv[4]))
print("asked", flush=True)
for connection in connections:
    print(connection.recv(65536), flush=True)
"""


@contextmanager
def calling(program: Path | str, path: Path, count: int) -> Iterator["subprocess.Popen[str]"]:
    """Run a copy of this Python as another user, which waits for a line, and then calls over some connections."""
    request = wire.encode_request(1, *DESCRIBE).hex()
    arguments = [program, "-S", "-c", CALLING, str(path), str(OTHER_USER), str(count), request]
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix}
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        try:
            assert line_of(process) == "ready"
            yield process
        finally:
            process.kill()


def goes_on(process: "subprocess.Popen[str]") -> None:
    """Let it ask."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert line_of(process) == "asked"


@pytest.fixture
def by_program(keyring: Path, shared_socket: Path, shared_folder: Path) -> Iterator[RunningAgent]:
    """An agent of root, which sees all programs: everything is granted to root, and to one program of each other user."""
    digest = hashlib.sha256(Path(PYTHON).read_bytes()).hexdigest()
    grant = (
        f'[[grant]]\nname="program"\nto={{listener="default", exe="{shared_folder / "trusted"}", sha256="sha256:{digest}"}}\n'
        'actions=["kms:*"]\nkeys=["*"]\n'
    )
    (keyring.parent / "agent.toml").write_text(configuration(keyring, more='mode = "0666"') + grant)
    with RunningAgent(["--config", str(keyring.parent / "agent.toml")], shared_socket) as agent:
        yield agent


@root()
@fuse()
def test_hanging_file_system_costs_only_its_users_evidence(
    by_program: RunningAgent, tmp_path: Path, shared_folder: Path
) -> None:
    """The stat(2) of the caller's program never returns; other users and the agent are not affected."""
    flag = tmp_path / "hangs"
    with (
        hanging_program(shared_folder / "mounted", PYTHON, flag) as program,
        RawConnection(by_program.socket) as honest,
        calling(program, by_program.socket, 40) as hanging,
    ):
        flag.touch()
        goes_on(hanging)
        for _ in range(100):
            assert honest.call(*DESCRIBE).error is None
        by_program.wait_for("inspection.late")
        with RawConnection(by_program.socket) as another:
            assert another.call(*DESCRIBE).error is None
        assert "Forbidden.NoPermission" in line_of(hanging)  # without its evidence
        assert by_program.stop() == 0


@root()
@fuse()
def test_user_has_evidence_again_after_a_hang(by_program: RunningAgent, tmp_path: Path, shared_folder: Path) -> None:
    """Connections do not wait for the hung thread, and the next one after its return is inspected."""
    flag = tmp_path / "hangs"
    with (
        hanging_program(shared_folder / "mounted", PYTHON, flag) as program,
        calling(program, by_program.socket, 1) as hanging,
    ):
        flag.touch()
        goes_on(hanging)
        by_program.wait_for("inspection.late")
    trusted = shared_folder / "trusted"  # the mount is gone, and the thread is back
    shutil.copy(PYTHON, trusted)
    for _ in range(100):  # the thread may need a moment to be back
        with calling(trusted, by_program.socket, 1) as back:
            goes_on(back)
            if "KeyMetadata" in line_of(back):
                return
    pytest.fail("the user has no evidence any more")


@pytest.fixture
def process() -> Iterator[Process]:
    """This process."""
    made = Process(os.getpid(), os.pidfd_open(os.getpid()))
    yield made
    made.close()


@asynccontextmanager
async def inspecting() -> AsyncIterator[Inspector]:
    """An inspector at work."""
    inspector = Inspector()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(inspector.run)
        yield inspector
        nursery.cancel_scope.cancel()


class Standing:
    """A process that accepts requests and answers them on demand."""

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket = trio.socket.from_stdlib_socket(ours)
        self.asked: list[list[Any]] = []

    def take(self) -> int:
        """Take all requests that have come; how many those are in all."""
        self._theirs.setblocking(False)
        with suppress(BlockingIOError):
            while packet := self._theirs.recv(4_096):
                self.asked.append(json.loads(packet))
        return len(self.asked)

    def answer_all(self) -> None:
        """Answer all of them."""
        self.take()
        for number, *_ in self.asked:
            self._theirs.send(json.dumps([number, ["/bin/true", [1], None]]).encode())
        self.asked = []

    def close(self) -> None:
        """End."""
        self._theirs.close()


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standing]:
    """Let all inspections hang, and be late soon."""
    made = Standing()
    monkeypatch.setattr(inspection, "_start", lambda: (made.socket, os.getpid()))
    yield made
    made.close()


async def test_late_inspection_is_waited_for_only_once(
    standing: Standing, process: Process, autojump_clock: trio.testing.MockClock
) -> None:
    """Until the late answer arrives, the user's connections have no evidence immediately."""
    async with inspecting() as inspector:
        assert await inspector.inspect(process, 1, (), with_hash=False) is None
        assert trio.current_time() == pytest.approx(inspection.INSPECTION_SECONDS)
        for _ in range(100):
            assert await inspector.inspect(process, 1, (), with_hash=True) is None
        assert trio.current_time() == pytest.approx(inspection.INSPECTION_SECONDS)
        assert standing.take() == 1
        standing.answer_all()
        await trio.sleep(0.1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(inspector.inspect, process, 1, (), with_hash=False))
            await trio.sleep(0.1)
            assert standing.take() == 1
            standing.answer_all()


async def test_late_inspections_of_strangers_spare_granted_users(
    standing: Standing, process: Process, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One person can have 65,536 users, so late inspections have a limit, which users with a grant are exempt from."""
    async with inspecting() as inspector:
        async with trio.open_nursery() as nursery:
            monkeypatch.setattr(inspection, "_MAX_LATE", 64)
            for user in range(100, 100 + inspection._MAX_LATE):
                nursery.start_soon(functools.partial(inspector.inspect, process, user, (), with_hash=False))
        asked = standing.take()
        assert asked == inspection._MAX_LATE
        assert await inspector.inspect(process, 2, {3}, with_hash=False) is None
        assert standing.take() == asked
        assert await inspector.inspect(process, 2, {2}, with_hash=False) is None
        assert standing.take() == asked + 1


async def test_users_with_an_earlier_answer_are_still_inspected(
    standing: Standing, process: Process, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand users of one person, on a file system that hangs, take nobody else's evidence."""
    monkeypatch.setattr(inspection, "_MAX_LATE", 3)
    async with inspecting() as inspector:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(inspector.inspect, process, 1, (), with_hash=False))
            await trio.sleep(0.1)
            standing.answer_all()
        async with trio.open_nursery() as nursery:
            for user in range(100, 103):
                nursery.start_soon(functools.partial(inspector.inspect, process, user, (), with_hash=False))
        standing.take()
        standing.asked = []
        assert await inspector.inspect(process, 2, (), with_hash=False) is None
        assert standing.take() == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(inspector.inspect, process, 1, (), with_hash=False))
            await trio.sleep(0.1)
            assert standing.take() == 1
            standing.answer_all()


async def test_connections_closed_during_inspection_do_not_pile_up(standing: Standing, process: Process) -> None:
    """A user has one inspection in flight, however many of its processes connect and exit."""
    async with inspecting() as inspector:
        for _ in range(50):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(functools.partial(inspector.inspect, process, 1, (), with_hash=False))
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert standing.take() == 1
        assert len(inspector._requests) == 1


async def test_failed_start_of_the_inspector_is_retried(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting callers are refused immediately, and do not count as late."""
    real, failures = inspection._start, [OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))]

    def start() -> tuple[trio.socket.SocketType, int]:
        if failures:
            raise failures.pop()
        return real()

    monkeypatch.setattr(inspection, "_start", start)
    monkeypatch.setattr(inspection, "_RESTART_SECONDS", 0.01)
    async with inspecting() as inspector:
        with trio.fail_after(inspection.INSPECTION_SECONDS / 2):
            assert await inspector.inspect(process, 1, (), with_hash=True) is None
        assert not inspector._late
        with trio.fail_after(PATIENCE):
            assert await inspector.inspect(process, 1, (), with_hash=True) is not None


async def test_exited_inspector_is_restarted(process: Process) -> None:
    """Waiting callers have no evidence, and the next caller has."""
    async with inspecting() as inspector:
        before = await inspector.inspect(process, 1, (), with_hash=True)
        assert before is not None
        assert before.path == PYTHON
        (child,) = children(os.getpid(), "keyferry_agent.peer.inspector")
        os.kill(child, signal.SIGKILL)
        with trio.fail_after(PATIENCE):
            while (after := await inspector.inspect(process, 1, (), with_hash=True)) is None:  # noqa: ASYNC110 - a process starts
                await trio.sleep(0.01)
        assert after == before


async def test_an_inspector_ends_with_its_agent_and_not_by_signals(process: Process) -> None:
    """A terminal sends its signals to all processes of a group."""
    async with inspecting() as inspector:
        assert await inspector.inspect(process, 1, (), with_hash=False) is not None
        (child,) = children(os.getpid(), "keyferry_agent.peer.inspector")
        os.kill(child, signal.SIGINT)
        os.kill(child, signal.SIGTERM)
        assert await inspector.inspect(process, 1, (), with_hash=False) is not None
    assert await trio.to_thread.run_sync(os.waitpid, child, 0) == (child, 0)


async def test_without_an_inspector_callers_have_no_evidence(
    process: Process, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """The agent serves every caller whose grants need no evidence of a program."""

    def start() -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(inspection, "_start", start)
    async with inspecting() as inspector:
        assert await inspector.inspect(process, 1, (), with_hash=True) is None


def children(pid: int, module: str) -> list[int]:
    """The processes below one that run a module."""
    below = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [each for each in below if module in Path(f"/proc/{each}/cmdline").read_text().split("\0")]
