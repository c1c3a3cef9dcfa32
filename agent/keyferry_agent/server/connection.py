"""One connection, from its first byte to its last: what is received, decided, recorded, answered, and when it ends.

It reads what there is, answers what can be answered at once in one write, and starts slow jobs beside itself; it reads again
only when its answers were taken. So a client that does not read costs a bounded number of answers, and a client that sends a
full pipeline gives way to the others after each handful.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
import trio

from keyferry.protocol import wire

from ..authz.caller import Caller
from ..peer import Process
from ..peer.inspection import Inspector
from ..state import MAX_BATCH
from .dispatch import (
    CompletedRequest,
    Dispatcher,
    Message,
    OffloadedJob,
    ServerContext,
    StartedRequest,
    closing,
    read_batch,
    refusal,
)
from .identity import Identity
from .readiness import ReadinessPoller
from .thread_pool import FairThreadPool

__all__ = ["LINGER", "Connection", "Shared", "refuse"]

LINGER: Final = 1.0
"""Seconds in which a client that was refused may finish its write and read why."""
_RECEIVE_FIRST: Final = 4_096
_RECEIVE: Final = 65_536
"""Bytes to receive at once, where there were more than a few the last time."""
_ALONE: Final = 0.004
"""Seconds after which all tasks are looked at, although no other connection has sent anything: a reload waits so long."""
_SHORT_TURN: Final = 0.0002
"""Seconds after which a turn ends where others wait; its second steps take as long again."""
_IN_A_CROWD: Final = 8
"""Requests to do in one go where others had to wait a moment ago."""
_SLOW_PER_CONNECTION: Final = 16
"""Slow jobs that one connection may have under way; then it is not read from. Four for each thread: it never has to wait."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


@dataclass(kw_only=True)
class Shared(ServerContext):
    """What all connections of an agent have in common."""

    workers: FairThreadPool
    inspector: Inspector
    arrivals: ReadinessPoller | None = None
    idle: set[trio.CancelScope] = field(default_factory=set)
    """Connections that wait for their next request: a drain wakes them."""
    last_look: float = math.inf
    """When a draining agent stops taking requests from connections that have nothing half-received."""


class Connection:
    """The state of one connection while it is served."""

    def __init__(
        self,
        shared: Shared,
        stream: trio.SocketStream,
        caller: Caller,
        process: Process | None,
        more_evidence: Callable[[], None] = lambda: None,
    ) -> None:
        self._shared = shared
        self._agent = shared.agent
        self._stream = stream
        self._caller = caller
        self._answering = Dispatcher(shared, caller)
        self._process = process
        self._identity = Identity(shared.agent, shared.inspector, caller, process, more_evidence)
        self._decoder = wire.Decoder(recall=self._answering.recall)
        self._started = trio.current_time()  # when the request that is being received began
        self._sending = trio.Lock()
        self._torn = False  # part of an answer was sent, and the rest is still to come
        self._slots = trio.Semaphore(_SLOW_PER_CONNECTION)
        self._under_way = 0  # slow jobs that are not answered yet
        self._done: list[tuple[OffloadedJob, Any]] = []
        self._some_done = trio.Event()
        self._looked_around = -math.inf  # when other tasks had their turn
        self._room = _RECEIVE_FIRST

    async def run(self) -> None:
        """Serve until the peer closes, breaks the protocol or a deadline, ends, or the agent drains."""
        arrivals, number = self._shared.arrivals, self._number()
        if arrivals is not None:
            with suppress(OSError):  # no memory for it: then nobody waits for this one
                arrivals.add(number)
        try:
            async with trio.open_nursery() as watching:
                if self._process is not None:
                    watching.start_soon(self._until_process_ends, self._process, watching.cancel_scope)
                await self._serve()
                watching.cancel_scope.cancel()
        finally:
            if arrivals is not None and self._number() == number:
                arrivals.forget(number)

    async def _until_process_ends(self, process: Process, everything: trio.CancelScope) -> None:
        # Who has the other end now, a child that it was handed to say, is nobody that was asked who it is.
        await trio.lowlevel.wait_readable(process.fd)
        log.info("connection.process_ended", **self._who())
        everything.cancel()

    async def _serve(self) -> None:
        async with trio.open_nursery() as slow:
            while True:
                received = await self._receive()
                if not received or not await self._identity.confirm():
                    return  # what slow jobs are under way is still answered: the nursery waits for them
                goes_on = self._decoder.incomplete
                self._decoder.feed(received)
                del received  # what a request holds is kept no longer than the request
                looked_at = await self._answer_all(slow)
                if looked_at is None:
                    slow.cancel_scope.cancel()
                    return
                # The time that answering took is not the client's; all other time is, however many pieces a request comes in.
                if self._decoder.incomplete and (looked_at or not goes_on):
                    self._started = trio.current_time()

    async def _receive(self) -> bytes | bytearray:
        """Wait for bytes: as long as it takes between requests, for a bounded time within one."""
        timeout = self._agent.settings.limits.request_timeout
        if self._decoder.incomplete:
            with trio.move_on_at(self._started + timeout):
                return await self._receive_some()
            log.info("connection.slow_request", **self._who())
            return b""
        if not self._agent.draining:
            if self._asks_on():
                return self._read()
            with trio.CancelScope() as idle:
                self._shared.idle.add(idle)
                try:
                    received = await self._receive_some()
                    self._looked_around = time.monotonic()
                    return received
                finally:
                    self._shared.idle.discard(idle)
        # Draining, and nothing half-received: take what had been sent by then, and otherwise hang up.
        with trio.move_on_at(self._shared.last_look):
            return await self._receive_some()
        return b""

    def _asks_on(self) -> bool:
        """Whether the client, just answered, has sent its next request, or does in a moment. Asks without awaiting anything."""
        arrivals = self._shared.arrivals
        if arrivals is None or self._shared.workers.busy or time.monotonic() - self._looked_around > _ALONE:
            return False
        return arrivals.poll_for_next_request(self._number())

    async def _receive_some(self) -> bytes:
        # trio's stream would try first, and wait then: but whoever asks one thing at a time has nothing there yet.
        await trio.lowlevel.wait_readable(self._stream.socket)
        return self._read()

    def _read(self) -> bytes:
        try:
            received = os.read(self._number(), self._room)
        except OSError as error:
            raise trio.BrokenResourceError from error
        # All of a buffer is written over when it is made: a large one, for a request of 500 bytes, empties the caches.
        self._room = _RECEIVE if len(received) >= _RECEIVE_FIRST else _RECEIVE_FIRST
        return received

    def _number(self) -> int:
        # Asked for each time: once the stream is closed the number is another connection's, and this is -1.
        return self._stream.socket.fileno()

    async def _answer_all(self, slow: trio.Nursery) -> int | None:
        """Answer every whole message received so far; how many those were, or None when the stream cannot go on."""
        messages = self._decoder.messages()
        looked_at = 0
        while True:
            arrivals = self._shared.arrivals
            turn = read_batch(messages, _IN_A_CROWD if arrivals is not None and arrivals.contended() else MAX_BATCH)
            looked_at += turn.looked_at
            if not await self._answer_turn(turn.asked, slow):
                return None
            if turn.notifications and not self._answering.notified(turn.notifications):
                await self._end_with("Rejected.Throttling", "more notifications than this user may send", 429)
                return None
            if turn.error is not None:
                await self._end_with("ProtocolError", str(turn.error), 400)
                return None
            if turn.last:
                return looked_at
            await self._look_around()
            if not await self._identity.confirm():
                return None

    async def _answer_turn(self, asked: list[Message], slow: trio.Nursery) -> bool:
        """Answer some messages, in one write unless that takes too long; False when the stream cannot go on."""
        decided: list[CompletedRequest | StartedRequest] = []
        asked.reverse()
        while asked:
            # Taken out: what a request holds is kept no longer than the request, whoever waits for what.
            outcome = self._answering.decide(asked.pop())
            waits = isinstance(outcome, OffloadedJob) and self._slots.value == 0
            if not isinstance(outcome, OffloadedJob):
                decided.append(outcome)
            # What is begun holds a data key: nothing is awaited before it is ended.
            if decided and (waits or self._others_wait(decided[0])):
                if not await self._finish(decided):
                    return False
                decided.clear()
                await self._give_way()
                if not await self._identity.confirm():
                    return False
            if isinstance(outcome, OffloadedJob):
                if waits:
                    await self._slots.acquire()
                    if not await self._identity.confirm():
                        return False
                else:
                    self._slots.acquire_nowait()
                self._begin(outcome, slow)
        return await self._finish(decided)

    async def _end_with(self, code: str, why: str, http_status: int) -> None:
        """Say why nothing more is read: the last message on this connection."""
        self._agent.counters.requests_refused += 1
        log.info("connection.protocol_error", why=why, **self._who())
        for _ in range(_SLOW_PER_CONNECTION):  # what was asked before it is answered before it
            await self._slots.acquire()
        if await self._send(closing(code, f"{why}.", http_status)):
            await _linger(self._stream)

    async def _look_around(self) -> None:
        """Let all other tasks have their turn; not yet, where none has anything to do that can be seen from here."""
        arrivals = self._shared.arrivals
        alone = arrivals is not None and not arrivals.others_readable(self._number())
        if not alone or self._shared.workers.busy or time.monotonic() - self._looked_around > _ALONE:
            await self._give_way()

    async def _give_way(self) -> None:
        """Let all other tasks have their turn, and whoever has sent something."""
        for _ in range(2):  # the first time may only wake them; and of those that are awake, chance says who goes first
            await trio.lowlevel.checkpoint()
        self._looked_around = time.monotonic()

    def _others_wait(self, first: CompletedRequest | StartedRequest) -> bool:
        if self._agent.counters.connections == 1 or time.monotonic() - first.audited.started <= _SHORT_TURN:
            return False
        arrivals = self._shared.arrivals
        return arrivals is None or arrivals.others_readable(self._number())

    def _begin(self, slow: OffloadedJob, nursery: trio.Nursery) -> None:
        """Have a slow job done, and its answer sent, beside whatever else there is."""
        self._offload(slow)
        self._under_way += 1
        if self._under_way == 1:
            nursery.start_soon(self._answer_slow, nursery.cancel_scope)

    def _offload(self, slow: OffloadedJob) -> None:
        agent, generation = self._agent, slow.generation

        def run() -> Any:
            # Begun after a reload, it would be done for nothing: its decision does not hold any more.
            return slow.job.run() if agent.generation == generation else None

        def done(result: Any, error: Exception | None) -> None:
            self._done.append((slow, result if error is None else refusal(error, slow.audited)))
            self._some_done.set()

        try:
            self._shared.workers.submit(self._caller.peer.uid, run, done)
        except RuntimeError as error:
            done(None, error)

    async def _answer_slow(self, everything: trio.CancelScope) -> None:
        """Answer slow jobs, as many at a time as are done, until none is under way."""
        while self._under_way:
            await self._some_done.wait()
            if not await self._identity.confirm():
                everything.cancel()
                return
            self._some_done = trio.Event()
            done, self._done = self._done, []
            answered = self._still_valid(done)
            taken = await self._finish(answered)
            self._under_way -= len(answered)
            for _ in answered:
                self._slots.release()
            if not taken:
                everything.cancel()  # also a reader that waits for room for another slow job

    def _still_valid(self, done: list[tuple[OffloadedJob, Any]]) -> list[CompletedRequest | StartedRequest]:
        """What can be answered of slow jobs that were done: one whose decision holds no longer is decided anew first."""
        answered: list[CompletedRequest | StartedRequest] = []
        for slow, outcome in done:
            if self._answering.holds(slow):
                answered.append(CompletedRequest(slow.msgid, slow.audited, outcome))
                continue
            again = self._answering.decide_anew(slow)
            if isinstance(again, OffloadedJob):
                self._offload(again)
            else:
                answered.append(again)
        return answered

    async def _finish(self, decided: Sequence[CompletedRequest | StartedRequest]) -> bool:
        """Record requests, and only then send their answers; False when nobody takes them."""
        return await self._send(self._answering.answers(decided))

    async def _send(self, answers: bytes) -> bool:
        """Send answers whole, in the time that a client has to take them. False: it did not, or it is gone."""
        if not answers:
            return True
        sent = 0
        if not self._sending.locked() and not self._torn:  # most answers fit: then nobody has to wait for anything
            try:
                sent = os.write(self._number(), answers)
            except BlockingIOError:
                pass
            except OSError:
                return False
            if sent == len(answers):
                return True
            self._torn = sent > 0
        with trio.move_on_after(self._agent.settings.limits.request_timeout) as scope:
            async with self._sending:
                if self._torn and not sent:
                    return False  # behind half an answer, whose sender gave up, comes no other
                self._torn = True
                try:
                    await self._stream.send_all(answers[sent:])
                except trio.BrokenResourceError:
                    return False
                self._torn = False
        if scope.cancelled_caught:
            log.info("connection.answers_not_taken", **self._who())
        return not scope.cancelled_caught

    def _who(self) -> dict[str, Any]:
        return {"uid": self._caller.peer.uid, "pid": self._caller.peer.pid}


async def refuse(stream: trio.SocketStream, why: str) -> None:
    """Refuse a whole connection, and close it."""
    async with stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(closing("Rejected.Throttling", f"{why}.", 429))
            await _linger(stream)


async def _linger(stream: trio.SocketStream) -> None:
    """Read what a client still sends, for a moment, before its connection is closed.

    Closing with bytes unread makes the kernel throw away the last answer, or fail the client's write before it has read why.
    """
    with trio.move_on_after(LINGER), suppress(trio.BrokenResourceError):
        await stream.send_eof()
        while await stream.receive_some(_RECEIVE):
            pass
