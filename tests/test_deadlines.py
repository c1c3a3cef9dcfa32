"""Deadlines of both clients, and the events that extend them. Time is simulated; sockets are real."""

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import trio
from support.agent import PATIENCE
from support.fake_server import client_of, respond_in_reverse, send_bytes

from keyferry import AgentUnavailable, aio, client
from keyferry.protocol import wire

TIMEOUT = 5.0
CALLS = [(f"Method{number}", dict[str, Any]()) for number in range(10)]
NAMES = [name for name, _ in CALLS]
Pieces: TypeAlias = Callable[[wire.Request], Iterator[tuple[float, bytes]]]
"""A peer's answer to a request: seconds to wait, and then bytes."""


class TickingTime:
    """A module `time` for a client, in which each reading takes a tenth of a second."""

    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Return the time, and let it pass."""
        self.now += 0.1
        return self.now


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the blocking client a clock that ticks, and one byte each time that it receives."""
    monkeypatch.setattr(client, "time", TickingTime())
    monkeypatch.setattr(client, "RECEIVE_BYTES", 1)


def answer(request: wire.Request) -> bytes:
    """Return an answer that has the method's name."""
    return wire.encode_response(request.msgid, None, {"RequestId": request.method})


def test_bytes_do_not_extend_a_deadline(socket_path: Path, ticking: None) -> None:
    """A peer that sends a byte a second does not keep a call for ever. The answer has more bytes than the timeout has ticks."""
    long = wire.encode_response(1, None, {"RequestId": "r" * 100})
    with (
        client_of(socket_path, send_bytes(long)) as kms,
        pytest.raises(AgentUnavailable, match="within 5 s"),
    ):
        kms.call("Method", {})


def test_answers_extend_the_deadline_of_a_pipeline(socket_path: Path, ticking: None) -> None:
    """All of them together take longer than the timeout, each takes half of it."""
    with client_of(socket_path, respond_in_reverse(len(CALLS))) as kms:
        assert [each["RequestId"] for each in kms.pipeline(CALLS)] == NAMES


def test_pipeline_times_out_after_its_last_answer(socket_path: Path) -> None:
    """A pipeline whose last answer does not come ends, although all others came."""

    def all_but_one(connection: socket.socket) -> None:
        respond_in_reverse(len(CALLS) - 1)(connection)
        assert not connection.recv(65_536)  # until the client hangs up

    with client_of(socket_path, all_but_one) as kms:
        kms._timeout = 0.2
        with pytest.raises(AgentUnavailable, match="no answer"):
            kms.pipeline(CALLS)


def test_sending_to_a_peer_that_does_not_read_has_a_deadline(socket_path: Path) -> None:
    """A send into a full socket buffer ends at the call's deadline."""

    def deaf(connection: socket.socket) -> None:
        connection.recv(1)
        assert finished.wait(PATIENCE)

    finished = threading.Event()
    with client_of(socket_path, deaf) as kms:
        kms._timeout = 0.2
        with pytest.raises(AgentUnavailable, match="no answer"):
            kms.pipeline([("Method", {"Value": "x" * 60_000})] * 100)
        finished.set()


# The awaited client, under trio


@asynccontextmanager
async def peer(path: Path, pieces: Pieces) -> AsyncIterator[None]:
    """Serve one connection in simulated time: each request gets its pieces, one request after the other."""
    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(str(path))
    listening.listen()

    async def serve() -> None:
        connection, _ = await listening.accept()
        with connection:
            decoder = wire.Decoder()
            while received := await connection.recv(65_536):
                decoder.feed(received)
                for message in decoder.messages():
                    assert isinstance(message, wire.Request)
                    for seconds, data in pieces(message):
                        await trio.sleep(seconds)
                        await connection.send(data)

    with listening:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield
            nursery.cancel_scope.cancel()


async def test_bytes_do_not_extend_a_deadline_of_the_async_client(socket_path: Path, autojump_clock: object) -> None:
    """A call ends with its timeout, however many bytes of an answer arrive."""

    def byte_by_byte(request: wire.Request) -> Iterator[tuple[float, bytes]]:
        return ((1.0, bytes([byte])) for byte in answer(request))

    async with peer(socket_path, byte_by_byte), aio.Client(socket_path, timeout=TIMEOUT) as kms:
        before = trio.current_time()
        with pytest.raises(AgentUnavailable, match="within 5 s"):
            await kms.call("Method", {})
        assert trio.current_time() - before == pytest.approx(TIMEOUT)


@pytest.mark.parametrize("size", [0, 60_000], ids=["all sent at once", "each sent after an answer"])
async def test_answers_extend_the_deadline_of_an_async_pipeline(
    socket_path: Path, autojump_clock: object, size: int
) -> None:
    """Ten answers, one every four seconds, under a timeout of five."""
    calls = [(name, {"Value": "x" * size}) for name in NAMES]
    async with (
        peer(socket_path, lambda request: iter([(4.0, answer(request))])),
        aio.Client(socket_path, timeout=TIMEOUT) as kms,
    ):
        before = trio.current_time()
        assert [each["RequestId"] for each in await kms.pipeline(calls)] == NAMES
        assert trio.current_time() - before == pytest.approx(4.0 * len(CALLS))


async def test_async_pipeline_times_out_after_its_last_answer(socket_path: Path, autojump_clock: object) -> None:
    """The timeout counts from the last answer, not from the first request."""

    def all_but_one(request: wire.Request) -> Iterator[tuple[float, bytes]]:
        return iter([] if request.method == NAMES[-1] else [(4.0, answer(request))])

    async with peer(socket_path, all_but_one), aio.Client(socket_path, timeout=TIMEOUT) as kms:
        before = trio.current_time()
        with pytest.raises(AgentUnavailable, match="no answer"):
            await kms.pipeline(CALLS)
        assert trio.current_time() - before == pytest.approx(4.0 * (len(CALLS) - 1) + TIMEOUT)
