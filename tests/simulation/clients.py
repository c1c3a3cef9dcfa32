"""Simulated clients: each a process with a user, a connection, requests, and ways of its own, good and bad."""

import itertools
import random
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack
import trio

from keyferry.protocol import wire

from . import fixtures
from .requests import GeneratedRequest, random_request
from .world import World

if TYPE_CHECKING:
    from .connection_trace import AgentConnection

__all__ = ["Client", "Sent"]

_PATIENCE: Final = 900.0
"""Seconds after which a client that waits for an answer gives up: far more than anything may take."""
_GARBAGE: Final = (b"\xc1", b"\x94\x01\x01\xc0\x80", b"\xca\x00\x00\x00\x00", b"\xdc\xff\xff", b"GET / HTTP/1.1\r\n")
_TOO_SLOW: Final = 12.0


class Sent(NamedTuple):
    """A request, and up to which byte of a connection it goes."""

    ask: GeneratedRequest
    end: int


class Client:
    """One client, planned to the last byte before it begins."""

    def __init__(self, world: World, rng: random.Random, number: int, *, well_behaved: bool = False) -> None:
        self._world = world
        self.name = f"client{number}"
        self.uid = rng.choice((fixtures.ADMIN,) * 6 + fixtures.USERS)
        self.pid = 2**30 + number  # larger than any there is
        self.listener = rng.choice(("first", "second"))
        self.asks: dict[int, Sent] = {}
        self.garbage_at: int | None = None
        self.notifies = False
        self.process_ended = False
        self.line: AgentConnection | None = None
        self.received = bytearray()
        self.fault = ""
        """The client's own fault, which may cost it answers."""
        self.sent = 0
        """Bytes that it could send."""
        self.connected: float | None = None
        self.done = False
        self._way = "good" if well_behaved else rng.choices(*zip(*_WAYS.items(), strict=True))[0]
        self._starts = 0.0 if well_behaved else rng.choice((0, 0, 0.01, 0.5, 2))
        self._pipelines = rng.random() < 0.6
        self._pauses = (0,) if well_behaved else rng.choice(((0,), (0, 0, 0.001), (0, 0.2)))
        self._chunk = rng.choice((65_536, 65_536, 900, 120))
        self._half_closes = rng.random() < 0.3
        self._after = rng.randrange(1, 6)
        self._rng = rng
        self._pieces: list[bytes] = []
        self._plan(rng, rng.choice((1, 2, 2, 3, 5, 12, 40) if self._way != "never reads" else (60,)))
        self._answered = 0
        self._changed = trio.Event()
        self._ended = False

    def _plan(self, rng: random.Random, count: int) -> None:
        slow = rng.random() < 0.2
        total, msgid = 0, rng.choice((0, 1, 2**32 - 100))
        for _ in range(count):
            kind = rng.random()
            if kind < 0.03:
                self._pieces.append(wire.encode_notification("Encrypt", {}))
                self.notifies = True
                total += len(self._pieces[-1])
                continue
            if kind < 0.06:
                ask = GeneratedRequest("", {}, always="InvalidParameter")
                data = msgpack.packb([0, msgid, "DescribeKey", [], 1])
            else:
                ask = random_request(rng, slow=slow and rng.random() < 0.6)
                data = wire.encode_request(msgid, ask.method, dict(ask.params))
            total += len(data)
            self.asks[msgid] = Sent(ask, total)
            self._pieces.append(data)
            msgid += 1
        if self._way == "garbage":
            place = rng.randrange(len(self._pieces) + 1)
            before = sum(map(len, self._pieces[:place]))
            self._pieces.insert(place, rng.choice(_GARBAGE))
            self.garbage_at = before
            more = len(self._pieces[place])
            self.asks = {n: s if s.end <= before else s._replace(end=s.end + more) for n, s in self.asks.items()}

    @property
    def expected(self) -> int:
        """How many answers there are to be, if all goes well."""
        at = self.garbage_at
        return len(self.asks) if at is None else sum(sent.end <= at for sent in self.asks.values()) + 1

    @property
    def boundaries(self) -> set[int]:
        """How many bytes it may have sent when it is in the middle of nothing."""
        return {0, *itertools.accumulate(map(len, self._pieces))}

    def spoiled(self, why: str) -> None:
        """From now on it may miss answers, and it is its own fault."""
        self.fault = self.fault or why

    async def run(self) -> None:
        """Do all of it."""
        world = self._world
        await trio.sleep(self._starts)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            name = b"\0keyferry simulation %d %d %s" % (world.token, world.seed, self.name.encode())
            world.clients[name] = self
            sock.bind(name)
            try:
                sock.connect(str(world.directory / self.listener))
            except OSError as error:
                world.add_event("cannot connect", self.name, type(error).__name__)
                if not world.stops and world.ended is None:
                    world.report_violation(f"{self.name} cannot connect: {error}")
                self.done = True
                return
            self.connected = world.now
            world.add_event("connected", self.name, self.uid, self.listener, self._way)
            with trio.move_on_after(_PATIENCE) as patience:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read, sock, nursery.cancel_scope)
                    await self._write(sock)
                    if self._way == "vanishes":
                        self.spoiled("vanished")
                    if self._way == "vanishes" or not self.expected:
                        nursery.cancel_scope.cancel()
            if patience.cancelled_caught:
                self.fault = self.fault or "waited in vain"
                if self.fault == "waited in vain":
                    world.report_violation(f"{self.name} waits in vain for an answer, or for the end of its connection")
            world.add_event("leaves", self.name, len(self.received))
        self.done = True

    async def _write(self, sock: socket.socket) -> None:
        for number, piece in enumerate(self._pieces):
            if number == self._after:
                if self._way == "vanishes":
                    self.spoiled("vanished")
                    return
                if self._way == "dies" and self.line is not None:
                    self.spoiled("died")
                    self.line.end_process()
            if not self._pipelines and self._way != "never reads":
                await self._until_answered(number)
            for start in range(0, len(piece), self._chunk):
                if start and self._way == "too slow" and number >= self._after and not self.fault:
                    self.spoiled("too slow")
                    await self._be_too_slow()
                if not await self._send(sock, piece[start : start + self._chunk]):
                    return
                await trio.sleep(self._rng.choice(self._pauses))
        if self._half_closes:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)

    async def _be_too_slow(self) -> None:
        await trio.sleep(2)
        line, stalled = self.line, self._world.stalled
        waits = line is not None and line.quiet and line.received == self.sent
        await trio.sleep(_TOO_SLOW)
        if waits and line is not None and line.closed is None and self._world.stalled - stalled < 1:
            self._world.report_violation(f"{self.name} is waited for in the middle of a request")

    async def _until_answered(self, count: int) -> None:
        while self._answered < count and not self._ended:
            if self._answered >= self.expected or count > len(self.asks):
                return
            with trio.move_on_after(2):  # notifications have no answer
                await self._changed.wait()
                continue
            return

    async def _send(self, sock: socket.socket, data: bytes) -> bool:
        while data:
            try:
                sent = sock.send(data)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)
            except OSError:
                return False
            else:
                self.sent += sent
                data = data[sent:]
        return True

    async def _read(self, sock: socket.socket, scope: trio.CancelScope) -> None:
        unpacker: Any = msgpack.Unpacker(raw=False)
        slow = self._way == "reads slowly"
        if self._way == "never reads":
            self.spoiled("does not read")
            await trio.sleep(_TOO_SLOW)
        while True:
            if slow:
                await trio.sleep(0.05)  # in time, but only just: the agent has to wait
            await trio.lowlevel.wait_readable(sock)
            try:
                received = sock.recv(500 if slow else 65_536)
            except OSError as error:
                self._world.add_event("reset", self.name, type(error).__name__)
                received = b""
            self.received += received
            unpacker.feed(received)
            with suppress(ValueError):  # no answer: said where it was sent
                self._answered += len(list(unpacker))
            self._ended = not received
            self._changed.set()
            self._changed = trio.Event()
            done = self._ended or (self._answered >= self.expected and self.garbage_at is None)
            if done and (self._ended or self._way != "stays"):
                scope.cancel()
                return
            if done and not self._world.early:
                scope.deadline = min(scope.deadline, trio.current_time() + 1)


_WAYS: Final = {
    "good": 60,
    "garbage": 8,
    "vanishes": 8,
    "dies": 7,
    "too slow": 8,
    "reads slowly": 12,
    "never reads": 8,
    "stays": 10,
}
