"""Rounds: the order of service, the entries of a batch, and the work of a connection's own task."""

import dataclasses
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.server_in_process import STATUS, Batches, answers, asked, connected, granting_all, served

from keyferry_agent import handlers
from keyferry_agent.config.settings import Limits
from keyferry_agent.server import rounds
from keyferry_agent.server.dispatch import MAX_OFFLOADED
from keyferry_agent.server.identity import Identity
from keyferry_agent.state import MAX_BATCH, ServerState


@pytest.fixture
def agent() -> ServerState:
    """An agent's state, in this process, that grants everything to this user."""
    return granting_all()


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
