"""Rounds: the order of service, the entries of a batch, and the work of a connection's own task."""

import dataclasses
import gc
import os
import socket
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from keyferry.protocol import wire
from keyferry_agent import handlers
from keyferry_agent.audit import Appended
from keyferry_agent.audit.entry import AuditEntry
from keyferry_agent.authz.grants import Grant
from keyferry_agent.config.settings import Limits, Settings
from keyferry_agent.keyring.keyring import development_keyring
from keyferry_agent.peer import Peer
from keyferry_agent.server import rounds
from keyferry_agent.server.dispatch import MAX_OFFLOADED
from keyferry_agent.server.identity import Identity
from keyferry_agent.server.server import Server
from keyferry_agent.state import MAX_BATCH, ServerState

STATUS = "GetAgentStatus"


class Batches:
    """An audit log in memory, which keeps its batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def record(self, requests: Sequence[tuple[Peer, AuditEntry, str]]) -> Appended:
        """Note the operations."""
        self.batches.append([audited.operation for _, audited, _ in requests])
        return Appended(len(requests))


@pytest.fixture
def agent() -> ServerState:
    """An agent's state, in this process, that grants everything to this user."""
    everything = Grant("all", {"uid": os.geteuid()}, ("kms:*",), ("*",))
    settings = Settings(memory="prefer", grants=(everything,), limits=Limits(request_timeout=0.2))
    return ServerState(settings, development_keyring(backing="auto", require=False))


@asynccontextmanager
async def served(agent: ServerState, path: Path, audit: Any) -> AsyncIterator[Server]:
    """A server of this agent, on a real socket, for the time of a block."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    server = Server(agent, audit)
    async with trio.open_nursery() as nursery:
        listeners = [("default", trio.SocketListener(trio.socket.from_stdlib_socket(listening)))]
        await nursery.start(server.serve, listeners)
        yield server
        server.drain(grace=5)


@asynccontextmanager
async def connected(path: Path, count: int) -> AsyncIterator[list[socket.socket]]:
    """So many connections that the server serves."""
    made = []
    try:
        for _ in range(count):
            made.append(socket.socket(socket.AF_UNIX))
            made[-1].connect(str(path))
            made[-1].setblocking(False)
        await trio.testing.wait_all_tasks_blocked()
        yield made
    finally:
        for each in made:
            each.close()


async def answers(sock: socket.socket, count: int) -> list[int | None]:
    """The message IDs of the next answers."""
    decoder = wire.Decoder()
    msgids: list[int | None] = []
    with trio.fail_after(30):
        while len(msgids) < count:
            await trio.lowlevel.wait_readable(sock)
            received = sock.recv(65_536)
            assert received
            decoder.feed(received)
            msgids += [message.msgid for message in decoder.messages() if isinstance(message, wire.Response)]
    return msgids


def asked(method: str, count: int = 1) -> bytes:
    """Return the bytes of some requests."""
    return b"".join(wire.encode_request(number, method, {"KeyId": "alias/dev"}) for number in range(count))


async def test_round_is_recorded_as_one_batch(agent: ServerState, socket_path: Path) -> None:
    """Simultaneous requests of ten connections are one batch of the audit log."""
    audit = Batches()
    async with served(agent, socket_path, audit), connected(socket_path, 10) as clients:
        for client in clients:
            client.send(asked(STATUS))
        for client in clients:
            assert await answers(client, 1) == [0]
    assert audit.batches == [[STATUS] * 10]


async def test_a_single_request_waits_for_one_batch_of_another_client(agent: ServerState, socket_path: Path) -> None:
    """A client that has sent hundreds of requests before has a few of them in each round."""
    audit = Batches()
    async with served(agent, socket_path, audit), connected(socket_path, 2) as (greedy, honest):
        greedy.send(asked(STATUS, 400))
        honest.send(asked("ListKeys"))
        assert await answers(honest, 1) == [0]
        assert await answers(greedy, 400) == [*range(400)]
    operations = [operation for batch in audit.batches for operation in batch]
    assert operations.index("ListKeys") < MAX_BATCH
    assert all(len(batch) <= MAX_BATCH for batch in audit.batches)


async def test_a_lone_client_has_large_batches(agent: ServerState, socket_path: Path) -> None:
    """Batches grow once no other client has sent a request for a few rounds."""
    audit = Batches()
    async with served(agent, socket_path, audit), connected(socket_path, 2) as (greedy, honest):
        honest.send(asked(STATUS))
        await answers(honest, 1)
        greedy.send(asked(STATUS, 400))
        await answers(greedy, 400)
    assert len(audit.batches[1]) < MAX_BATCH
    assert len(audit.batches[-2]) == MAX_BATCH


async def test_an_inherited_socket_is_not_served_after_its_connection(agent: ServerState, socket_path: Path) -> None:
    """A child that holds the agent's end open leaves nothing in the epoll."""
    async with served(agent, socket_path, Batches()) as server:
        async with connected(socket_path, 1) as (client,):
            (number,) = server._rounds._lines
            inherited = os.dup(number)
            client.send(asked(STATUS))
            await answers(client, 1)
            client.send(asked(STATUS)[:-1])
        try:
            await trio.testing.wait_all_tasks_blocked()
            assert len(server._rounds) == 0
            assert server._rounds._poll.poll(0) == []
            async with connected(socket_path, 1) as (another,):
                another.send(asked(STATUS))
                assert await answers(another, 1) == [0]
        finally:
            os.close(inherited)


async def test_offloaded_jobs_per_connection_are_limited(
    agent: ServerState, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit, the agent neither decides nor reads further requests before an answer; then it serves all."""
    go_on, decided = threading.Event(), list[None]()

    def slow(_request: Any) -> handlers.Job:
        decided.append(None)
        return handlers.Job(lambda: go_on.wait(30) and None, offload=True)

    monkeypatch.setitem(handlers.HANDLERS, "DescribeKey", slow)
    async with served(agent, socket_path, Batches()) as server, connected(socket_path, 2) as (client, other):
        client.send(asked("DescribeKey", 40))
        other.send(asked(STATUS))
        assert await answers(other, 1) == [0]
        await trio.testing.wait_all_tasks_blocked()
        assert len(decided) == MAX_OFFLOADED
        full = [line for line in server._rounds._lines.values() if line.full]
        assert [line.listening for line in full] == [False]
        go_on.set()
        assert sorted(msgid or 0 for msgid in await answers(client, 40)) == [*range(40)]


async def test_caller_with_an_inspected_program_is_served_completely(
    agent: ServerState, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection's own task confirms each batch, and half a request has its deadline there."""
    confirmed = 0

    async def confirm(_identity: Identity) -> bool:
        nonlocal confirmed
        confirmed += 1
        await trio.lowlevel.checkpoint()
        return True

    monkeypatch.setattr(Identity, "confirm_at_once", lambda _identity: None)
    monkeypatch.setattr(Identity, "confirm", confirm)
    async with served(agent, socket_path, Batches()), connected(socket_path, 1) as (client,):
        client.send(asked(STATUS, 200) + asked(STATUS)[:-1])
        assert await answers(client, 200) == [*range(200)]
        assert confirmed >= 200 // MAX_BATCH
        with trio.fail_after(30):
            await trio.lowlevel.wait_readable(client)
        assert client.recv(1) == b""


async def test_an_error_of_one_connection_harms_no_other_of_its_round(
    agent: ServerState, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule holds for errors that the dispatcher does not expect, too."""
    async with served(agent, socket_path, Batches()) as server, connected(socket_path, 2) as (bad, good):
        dispatcher = server._rounds._dispatcher
        first = next(iter(server._rounds._lines.values())).exchange
        real = dispatcher._begin

        def begin(exchange: Any, message: Any) -> None:
            if exchange is first:
                raise RuntimeError("unexpected")
            real(exchange, message)

        monkeypatch.setattr(dispatcher, "_begin", begin)
        bad.send(asked(STATUS))
        good.send(asked(STATUS))
        assert await answers(good, 1) == [0]
        await trio.lowlevel.wait_readable(bad)
        assert bad.recv(1) == b""


async def test_bytes_out_of_band_do_not_keep_the_task_busy(agent: ServerState, socket_path: Path) -> None:
    """The socket is readable without bytes to read, so the agent closes the connection."""
    async with served(agent, socket_path, Batches()) as server, connected(socket_path, 1) as (client,):
        client.send(b"!", socket.MSG_OOB)
        await trio.testing.wait_all_tasks_blocked()
        assert len(server._rounds) == 0


async def test_drain_serves_requests_sent_before_it(agent: ServerState, socket_path: Path) -> None:
    """The agent answers each request that a socket holds, and then closes each connection."""
    agent.settings = dataclasses.replace(agent.settings, limits=Limits(request_timeout=60))
    async with served(agent, socket_path, Batches()) as server, connected(socket_path, 20) as clients:
        for client in clients:
            client.send(asked(STATUS, 5))
        server.drain()
        for client in clients:
            assert await answers(client, 5) == [*range(5)]
            await trio.lowlevel.wait_readable(client)
            assert client.recv(1) == b""


class HeldJobs:
    """A thread pool that runs no job before `finish` is called, without threads."""

    busy = 0

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], Any], Callable[[Any, Exception | None], None]]] = []

    def submit(self, _user: Any, job: Callable[[], Any], on_done: Callable[[Any, Exception | None], None]) -> None:
        """Keep a job."""
        self.jobs.append((job, on_done))

    def finish(self) -> None:
        """Run all jobs."""
        jobs, self.jobs = self.jobs, []
        for job, on_done in jobs:
            on_done(job(), None)


@pytest.fixture
def held(agent: ServerState, monkeypatch: pytest.MonkeyPatch) -> HeldJobs:
    """Offload each DescribeKey, to jobs that the test finishes; half a request has ten seconds."""
    jobs = HeldJobs()
    agent.settings = dataclasses.replace(agent.settings, limits=Limits(request_timeout=10))
    status = handlers.HANDLERS[STATUS]
    monkeypatch.setitem(
        handlers.HANDLERS, "DescribeKey", lambda request: status(request)._replace(offload=True, repeatable=False)
    )
    monkeypatch.setattr("keyferry_agent.server.server.FairThreadPool", lambda _threads: jobs)
    return jobs


async def closed_after(client: socket.socket) -> float:
    """Wait until the agent closes a connection, and return the time on trio's clock."""
    with trio.fail_after(600):
        await trio.lowlevel.wait_readable(client)
    assert client.recv(1) == b""
    return trio.current_time()


async def test_half_requests_time_out_in_the_order_they_began(
    agent: ServerState, socket_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A connection that begins its next request does not keep another one, which began earlier, past its time."""
    agent.settings = dataclasses.replace(agent.settings, limits=Limits(request_timeout=10))
    request = asked(STATUS)
    async with served(agent, socket_path, Batches()), connected(socket_path, 2) as (first, second):
        start = trio.current_time()
        first.send(request[:-1])
        await trio.sleep(1)
        second.send(request[:-1])
        await trio.sleep(1)
        first.send(request[-1:] + request[:-1])
        assert await answers(first, 1) == [0]
        assert await closed_after(second) - start == pytest.approx(11)
        assert await closed_after(first) - start == pytest.approx(12)


async def test_half_a_request_has_time_while_jobs_are_awaited(
    agent: ServerState, socket_path: Path, held: HeldJobs, autojump_clock: trio.testing.MockClock
) -> None:
    """The agent reads nothing of a connection that has all the offloaded jobs it may have, so that time does not count."""
    async with served(agent, socket_path, Batches()), connected(socket_path, 1) as (client,):
        client.send(asked("DescribeKey", MAX_OFFLOADED) + asked(STATUS)[:-1])
        await trio.sleep(35)
        held.finish()
        assert len(await answers(client, MAX_OFFLOADED)) == MAX_OFFLOADED
        client.send(asked(STATUS)[-1:])
        assert await answers(client, 1) == [0]


async def test_half_a_request_has_new_time_after_unread_answers(
    agent: ServerState, socket_path: Path, held: HeldJobs, autojump_clock: trio.testing.MockClock
) -> None:
    """While answers wait for the client, its next request is not read, so that time does not count."""
    async with served(agent, socket_path, Batches()) as server, connected(socket_path, 1) as (client,):
        (number,) = server._rounds._lines
        with socket.socket(fileno=os.dup(number)) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        client.send(asked("DescribeKey", 15) + asked(STATUS)[:-1])
        await trio.sleep(8)
        held.finish()
        await trio.sleep(4)
        assert len(await answers(client, 15)) == 15
        await trio.sleep(4)
        client.send(asked(STATUS)[-1:])
        assert await answers(client, 1) == [0]


async def test_last_error_of_a_connection_comes_after_its_answers(
    agent: ServerState, socket_path: Path, held: HeldJobs
) -> None:
    """A protocol error is answered when all offloaded jobs before it are."""
    async with served(agent, socket_path, Batches()), connected(socket_path, 1) as (client,):
        client.send(asked("DescribeKey", 2) + b"\x00")
        await trio.testing.wait_all_tasks_blocked()
        held.finish()
        assert await answers(client, 3) == [0, 1, None]


@pytest.mark.parametrize("sent", [b"", asked(STATUS), asked(STATUS)[:-1]], ids=["nothing", "request", "half"])
async def test_closed_connection_leaves_nothing_in_rounds(agent: ServerState, socket_path: Path, sent: bytes) -> None:
    """Neither the deadline of half a request nor the memory of who was served last refers to it."""
    agent.settings = dataclasses.replace(agent.settings, limits=Limits(request_timeout=60))
    async with served(agent, socket_path, Batches()) as server:
        async with connected(socket_path, 1) as (client,):
            (serving,) = server._rounds._lines.values()
            line = weakref.ref(serving)
            del serving
            client.send(sent)
            await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert len(server._rounds) == 0
        gc.collect()
        assert line() is None


async def test_sole_client_has_large_batches_at_once(agent: ServerState, socket_path: Path) -> None:
    """Small batches are for clients that compete."""
    audit = Batches()
    async with served(agent, socket_path, audit), connected(socket_path, 1) as (client,):
        client.send(asked(STATUS, 2 * MAX_BATCH))
        await answers(client, 2 * MAX_BATCH)
    assert len(audit.batches[0]) == MAX_BATCH


async def test_client_that_never_pauses_lets_other_tasks_run(
    agent: ServerState, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent looks for the next request without its event loop for milliseconds only, however soon each one comes."""
    monkeypatch.setattr(rounds, "_MOMENT_SECONDS", 5.0)  # on a busy machine, too, each request comes soon enough
    looks = 0
    async with served(agent, socket_path, Batches()), connected(socket_path, 1) as (client,):

        def ask() -> None:
            client.setblocking(True)
            for _ in range(1_000):
                client.send(asked(STATUS))
                client.recv(65_536)

        async with trio.open_nursery() as nursery:

            async def look() -> None:
                nonlocal looks
                while True:
                    looks += 1
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(look)
            await trio.to_thread.run_sync(ask)
            seen = looks
            nursery.cancel_scope.cancel()
    assert seen > 10
