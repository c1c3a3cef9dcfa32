"""Load generators that are cheap enough not to be the limit: requests are bytes made beforehand, answers are only counted.

All requests of one kind have answers of one size (message IDs are chosen so that each takes five bytes), so that counting bytes
counts answers, and an error, whose size is another, does not pass unnoticed.
"""

import random
import select
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Self

from keyferry.protocol import wire

__all__ = [
    "Connection",
    "closed_loop_latencies",
    "closed_loop_rate",
    "concurrent_rate",
    "latencies_beside_greedy",
    "open_loop",
    "pipelined",
]

_RECEIVE: Final = 1 << 18
_TURNS: Final = 4
"""How often each of many connections is answered, at least: an agent may work on all of them before it answers the first."""
_TRIED: Final = 2
"""Requests whose answers are read, before others' are counted."""


class Connection:
    """A socket to the agent, and the requests that go over it again and again. `answer` is the first one's."""

    def __init__(self, path: str, requests: Sequence[bytes]) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.requests = requests
        self._turn = 0
        try:
            self.socket.connect(path)
            answers = [self._try(request) for request in requests[:_TRIED]]
            self.answer = answers[0]
            self.size = len(self.answer)
            if any(len(answer) != self.size for answer in answers):
                raise ValueError("these requests have answers of different sizes")
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def _try(self, request: bytes) -> bytes:
        """Give the bytes of an answer, which has to be good."""
        self.socket.sendall(request)
        decoder, answer = wire.Decoder(), b""
        while received := self.socket.recv(_RECEIVE):
            answer += received
            decoder.feed(received)
            for message in decoder.messages():
                if not isinstance(message, wire.Response) or message.error is not None:
                    raise ValueError(f"not the answer that was expected: {message}")
                return answer
        raise ConnectionError("the agent hung up")

    def next(self, count: int = 1) -> bytes:
        """Return the next requests of an endless cycle: the last sent request is the last to repeat."""
        made = []
        for _ in range(count):
            made.append(self.requests[self._turn])
            self._turn = (self._turn + 1) % len(self.requests)
        return b"".join(made)

    def receive(self) -> int:
        """Receive the available answers; return the number of bytes."""
        received = len(self.socket.recv(_RECEIVE))
        if not received:
            raise ConnectionError("the agent hung up")
        return received

    def finish(self, left: int) -> None:
        """Receive the remaining bytes of answers, and check that there are no more."""
        while left > 0:
            left -= self.receive()
        if left:
            raise ValueError("the answers are not as long as they should be: some are errors")


def closed_loop_latencies(connection: Connection, seconds: float) -> list[float]:
    """Ask, wait for the answer, ask again. Gives the seconds that each took."""
    took: list[float] = []
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        connection.socket.sendall(connection.next())
        connection.finish(connection.size)
        took.append(time.perf_counter() - began)
    return took


def closed_loop_rate(connection: Connection, seconds: float) -> float:
    """The same, as answers each second."""
    took = closed_loop_latencies(connection, seconds)
    return len(took) / sum(took)


def pipelined(connection: Connection, depth: int, seconds: float, *, fewest: int = 0) -> float:
    """Keep `depth` requests in flight on one connection; return the answers per second."""
    return concurrent_rate([connection], depth, seconds, fewest=fewest)


def concurrent_rate(connections: Sequence[Connection], depth: int, seconds: float, *, fewest: int = 0) -> float:
    """Keep `depth` requests in flight on each of many connections; return the answers per second.

    Requests are sent in two halves, each again when all its answers have come, so that the agent always has the other. The
    run takes longer than `seconds` until there are `fewest` answers, and until each connection was answered a few times.
    """
    half = max(1, depth // 2)
    by_number = {each.socket.fileno(): each for each in connections}
    left = {number: each.size * half for number, each in by_number.items()}  # bytes until the next half is answered
    fewest = max(fewest, _TURNS * half * len(connections))
    answers, elapsed, began = 0, 0.0, time.perf_counter()
    with select.epoll() as poll:
        for number, each in by_number.items():
            poll.register(number, select.EPOLLIN)
            for _ in range(min(2, depth)):
                each.socket.sendall(each.next(half))
        while elapsed < seconds or answers < fewest:
            for number, _ in poll.poll():
                connection = by_number[number]
                left[number] -= connection.receive()
                while left[number] <= 0:
                    left[number] += connection.size * half
                    answers += half
                    connection.socket.sendall(connection.next(half))
            elapsed = time.perf_counter() - began
    for number, each in by_number.items():
        each.finish(left[number] + each.size * half * (min(2, depth) - 1))
    return answers / elapsed


def open_loop(connection: Connection, rate: float, seconds: float) -> list[float]:
    """Send at a rate that does not wait for answers; return each request's seconds since it was *due*.

    Arrivals are independent of each other (exponential gaps). A request that a slow agent delays counts from the time at which
    it was due, so the delay is part of the figures (no "coordinated omission").
    """
    clock, due = 0.0, []
    chance = random.Random(rate)
    while (clock := clock + chance.expovariate(rate)) < seconds:
        due.append(clock)
    took: list[float] = []
    size, sock = connection.size, connection.socket
    sent, received, unsent = 0, 0, b""
    sock.setblocking(False)
    began = time.perf_counter()
    try:
        while len(took) < len(due):
            now = time.perf_counter() - began
            while sent < len(due) and due[sent] <= now:
                unsent += connection.next()
                sent += 1
            if unsent:
                with suppress(BlockingIOError):
                    unsent = unsent[sock.send(unsent) :]
            if len(took) < sent:
                with suppress(BlockingIOError):
                    received += connection.receive()
                    now = time.perf_counter() - began
                    took += [now - due[place] for place in range(len(took), received // size)]
    finally:
        sock.setblocking(True)
    return took


def latencies_beside_greedy(honest: Connection, greedy: Connection, seconds: float) -> list[float]:
    """Return the seconds of single requests on one connection, while another is flooded, which is unusable afterwards.

    One thread does both, and serves the single requests first, so that the scheduler has no influence.
    """
    took: list[float] = []
    flood = memoryview(b"".join(greedy.requests))
    rest, until = flood, time.perf_counter() + seconds
    greedy.socket.setblocking(False)
    with select.epoll() as poll:
        poll.register(honest.socket, select.EPOLLIN)
        poll.register(greedy.socket, select.EPOLLIN | select.EPOLLOUT)
        while (began := time.perf_counter()) < until:
            honest.socket.sendall(honest.next())
            while honest.socket.fileno() not in (ready := dict(poll.poll())):
                events = ready[greedy.socket.fileno()]
                if events & select.EPOLLIN:
                    greedy.receive()
                if events & select.EPOLLOUT:
                    with suppress(BlockingIOError):
                        rest = rest[greedy.socket.send(rest) :] or flood
            honest.finish(honest.size)
            took.append(time.perf_counter() - began)
    return took
