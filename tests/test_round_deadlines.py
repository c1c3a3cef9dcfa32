"""Rounds: the deadlines of half requests, answers that wait for jobs, and what a closed connection leaves."""

import dataclasses
import gc
import os
import socket
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.server_in_process import STATUS, Batches, answers, asked, connected, granting_all, served

from keyferry_agent import handlers
from keyferry_agent.config.settings import Limits
from keyferry_agent.server.dispatch import MAX_OFFLOADED
from keyferry_agent.state import ServerState


@pytest.fixture
def agent() -> ServerState:
    """An agent's state, in this process, that grants everything to this user."""
    return granting_all()


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
    """Neither the deadline of half a request nor the record of the last served line refers to it."""
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
