"""One connection, from its first byte to its last: what is received, decided, recorded, answered, and when it ends.

It reads what there is, answers what can be answered at once in one write, and starts slow jobs beside itself; it reads again
only when its answers were taken. So a client that does not read costs a bounded number of answers, and a client that sends a
full pipeline gives way to the others after each handful.
"""

import math
import os
import time
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol
from weakref import WeakValueDictionary

import structlog
import trio

from keyferry import wire
from keyferry.declaration import result_to_wire
from keyferry.errors import KmsError, ProtocolError, kms_error

from . import handlers
from .agent import Agent, Audited, Caller
from .audit import Appended
from .limits import Rate
from .metrics import Metrics
from .peer import Peer, Process

__all__ = ["LINGER", "Connection", "Shared", "refuse"]

LINGER: Final = 1.0
"""Seconds in which a client that was refused may finish its write and read why."""
_LONGEST_NAME: Final = 64
"""Characters of an operation's name to record: what a client calls an operation may be anything."""
_RECEIVE: Final = 65_536
_TURN: Final = 16
"""Requests answered in one go: each turn costs a hand-over to the record, a write, and a look at all connections."""
_SHORT_TURN: Final = 0.0004
"""Seconds that a turn takes where there are other connections: so long they wait for each that has a full pipeline."""
_IGNORED: Final = 256
"""Notifications that a turn takes: they get no answer, but take time all the same."""
_SLOW_PER_CONNECTION: Final = 8
"""Slow jobs that one connection may have under way; then it is not read from. Twice the threads keeps them busy."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class Record(Protocol):
    """What requests are recorded in before they are answered."""

    def record(self, peer: Peer, requests: Sequence[tuple[Audited, str]]) -> Appended: ...


@dataclass
class Shared:
    """What all connections of an agent have in common."""

    agent: Agent
    audit: Record
    rate: Rate
    slow: trio.CapacityLimiter
    metrics: Metrics | None = None
    hashing: MutableMapping[int | None, trio.CapacityLimiter] = field(default_factory=WeakValueDictionary)
    """One program of each user's is hashed at a time: nobody's waits for another's."""
    slow_of: MutableMapping[int | None, trio.CapacityLimiter] = field(default_factory=WeakValueDictionary)
    """No more of a user's slow jobs wait for `slow` than may run: nobody's wait for all of another's."""
    idle: set[trio.CancelScope] = field(default_factory=set)
    """Connections that wait for their next request: a drain wakes them."""
    last_look: float = math.inf
    """When a draining agent stops taking requests from connections that have nothing half-received."""


class _Decided(NamedTuple):
    """A request whose outcome is known: a result, or the error that it ended in."""

    msgid: int
    audited: Audited
    outcome: Any


class Connection:
    """The state of one connection while it is served."""

    def __init__(self, shared: Shared, stream: trio.SocketStream, peer: Peer, process: Process | None) -> None:
        self._shared = shared
        self._agent = shared.agent
        self._stream = stream
        self._caller = Caller(peer)
        self._process = process
        self._decoder = wire.Decoder()
        self._started = trio.current_time()  # when the request that is being received began
        self._ignored = 0
        self._sending = trio.Lock()
        self._slots = trio.Semaphore(_SLOW_PER_CONNECTION)
        self._slow_of_user = shared.slow_of.setdefault(peer.uid, trio.CapacityLimiter(shared.slow.total_tokens))

    async def run(self) -> None:
        """Serve until the peer closes, breaks the protocol or a deadline, ends, or the agent drains."""
        async with trio.open_nursery() as watching:
            if self._process is not None:
                watching.start_soon(self._until_process_ends, self._process, watching.cancel_scope)
            await self._serve()
            watching.cancel_scope.cancel()

    async def _until_process_ends(self, process: Process, everything: trio.CancelScope) -> None:
        # Who has the other end now, a child that it was handed to say, is nobody that was asked who it is.
        await trio.lowlevel.wait_readable(process.fd)
        log.info("connection.process_ended", **self._who())
        everything.cancel()

    async def _serve(self) -> None:
        async with trio.open_nursery() as slow:
            while True:
                received = await self._receive()
                if not received or not await self._identified():
                    return  # what slow jobs are under way is still answered: the nursery waits for them
                self._decoder.feed(received)
                del received  # what a request holds is kept no longer than the request
                began = trio.current_time()
                if not await self._answer_all(slow):
                    slow.cancel_scope.cancel()
                    return
                # The time that answering took is not the client's; all other time is, however many pieces a request comes in.
                now = trio.current_time()
                self._started = min(self._started + now - began, now)

    async def _identified(self) -> bool:
        """Whether who connected is still there and is what it was, with all evidence that grants are about."""
        process, agent = self._process, self._agent
        if process is None:
            return True
        if agent.policy.hashes_programs and self._caller.peer.sha256 is None and process.seen is not None:
            limiter = self._shared.hashing.setdefault(self._caller.peer.uid, trio.CapacityLimiter(1))
            hashed = await trio.to_thread.run_sync(process.hash_program, limiter=limiter, abandon_on_cancel=True)
            if not process.changed():
                self._caller.know(self._caller.peer._replace(sha256=hashed))
        self._caller.refresh(agent.policy)
        if self._caller.granted.on_program and process.changed():
            log.info("connection.program_changed", **self._who())
            return False
        return process.alive()  # after everything that was read

    async def _receive(self) -> bytes | bytearray:
        """Wait for bytes: as long as it takes between requests, for a bounded time within one."""
        timeout = self._agent.settings.limits.request_timeout
        if self._decoder.incomplete:
            with trio.move_on_at(self._started + timeout):
                return await self._receive_some()
            log.info("connection.slow_request", **self._who())
            return b""
        if not self._agent.draining:
            with trio.CancelScope() as idle:
                self._shared.idle.add(idle)
                try:
                    received = await self._receive_some()
                    self._started = trio.current_time()
                    return received
                finally:
                    self._shared.idle.discard(idle)
        # Draining, and nothing half-received: take what had been sent by then, and otherwise hang up.
        with trio.move_on_at(self._shared.last_look):
            self._started = trio.current_time()
            return await self._receive_some()
        return b""

    async def _receive_some(self) -> bytes:
        # trio's stream would try first, and wait then: but whoever asks one thing at a time has nothing there yet.
        await trio.lowlevel.wait_readable(self._stream.socket)
        try:
            return os.read(self._number(), _RECEIVE)
        except OSError as error:
            raise trio.BrokenResourceError from error

    def _number(self) -> int:
        # Asked for each time: once the stream is closed the number is another connection's, and this is -1.
        return self._stream.socket.fileno()

    async def _answer_all(self, slow: trio.Nursery) -> bool:
        """Answer every whole message received so far; False when the stream cannot go on."""
        decided: list[_Decided] = []
        try:
            for message in self._decoder.messages():
                self._started = trio.current_time()  # the rest of the buffer belongs to the next request
                if isinstance(message, wire.Notification):
                    await self._ignore()
                    continue
                outcome = self._decide(message)
                if isinstance(outcome, _Decided):
                    decided.append(outcome)
                if decided and (len(decided) == _TURN or self._slots.value == 0 or self._others_wait(decided[0])):
                    if not await self._finish(decided):
                        return False
                    decided.clear()
                    await trio.lowlevel.checkpoint()
                if not isinstance(outcome, _Decided):
                    await self._slots.acquire()
                    slow.start_soon(self._run_slow, *outcome)
        except ProtocolError as error:
            self._agent.counters.requests_refused += 1
            log.info("connection.protocol_error", why=str(error), **self._who())
            for _ in range(_SLOW_PER_CONNECTION):  # what was asked before it is answered before it
                await self._slots.acquire()
            last = wire.encode_response(None, _error("ProtocolError", f"{error}.", new_request_id(), 400), None)
            if await self._finish(decided, last):
                await _linger(self._stream)
            return False
        return await self._finish(decided)

    async def _ignore(self) -> None:
        self._ignored += 1
        if self._ignored % _IGNORED == 0:
            await trio.lowlevel.checkpoint()

    def _others_wait(self, first: _Decided) -> bool:
        alone = self._agent.counters.connections == 1
        return not alone and time.monotonic() - first.audited.started > _SHORT_TURN

    def _decide(self, message: wire.Message) -> "_Decided | tuple[handlers.Job, int, Audited]":
        """The outcome of one request, or a slow job that will give it."""
        if isinstance(message, wire.Response | wire.Notification):
            raise ProtocolError("a response, where a request is expected")
        audited = Audited(new_request_id(), time.monotonic(), ascii(message.method[:_LONGEST_NAME])[1:-1])
        if not self._shared.rate.allows(self._caller.peer.uid, audited.started):
            return _Decided(message.msgid, audited, kms_error("Rejected.Throttling"))
        if isinstance(message, wire.Unservable):
            return _Decided(message.msgid, audited, kms_error("InvalidParameter", f"{message.why}."))
        msgid, method, params = message
        try:
            self._caller.refresh(self._agent.policy)
            job = handlers.prepare(self._agent, self._caller, method, params, audited)
            if job.slow:
                return job, msgid, audited
            return _Decided(msgid, audited, job.run())
        except Exception as error:
            return _Decided(msgid, audited, _refusal(error, audited))

    async def _run_slow(self, job: handlers.Job, msgid: int, audited: Audited) -> None:
        try:
            outcome: Any
            try:
                async with self._slow_of_user:
                    outcome = await trio.to_thread.run_sync(job.run, limiter=self._shared.slow)
            except Exception as error:
                outcome = _refusal(error, audited)
            if not await self._finish([_Decided(msgid, audited, outcome)]):
                await self._stream.aclose()  # wakes the reader, which then ends the connection
        finally:
            self._slots.release()

    async def _finish(self, decided: Sequence[_Decided], last: bytes = b"") -> bool:
        """Record requests, and only then send their answers, with `last` behind them; False when nobody takes them."""
        return await self._send(self._answers(decided) + last)

    def _answers(self, decided: Sequence[_Decided]) -> bytes:
        """Write the record of requests, and only then make their answers."""
        if not decided:
            return b""
        outcomes = [(a, outcome.code if isinstance(outcome, KmsError) else "OK") for _, a, outcome in decided]
        recorded, failure = self._shared.audit.record(self._caller.peer, outcomes)
        if self._shared.metrics is not None:
            now = time.monotonic()
            for audited, outcome in outcomes:
                self._shared.metrics.observe(audited.operation, outcome, now - audited.started)
        if failure is not None:
            ids = [audited.request_id for _, audited, _ in decided[recorded:]]
            log.error("audit.failed", error=failure.strerror, request_ids=ids)
        must = self._agent.settings.audit.on_failure == "refuse"
        answers = bytearray()
        for place, (msgid, audited, outcome) in enumerate(decided):
            if place >= recorded and must:
                unrecorded = kms_error("ServiceUnavailableTemporary", "The audit record could not be written.")
                answers += self._answer(msgid, audited, unrecorded)
            else:
                answers += self._answer(msgid, audited, outcome)
        return bytes(answers)

    def _answer(self, msgid: int, audited: Audited, outcome: Any) -> bytes:
        counters = self._agent.counters
        counters.requests_total += 1
        error = outcome if isinstance(outcome, KmsError) else None
        if error is None:
            try:
                return wire.encode_response(msgid, None, {**result_to_wire(outcome), "RequestId": audited.request_id})
            except Exception as failure:  # nothing that a handler gives should be unsendable
                error = _refusal(RuntimeError(f"the answer cannot be sent: {type(failure).__name__}"), audited)
        counters.requests_refused += 1
        return wire.encode_response(
            msgid, _error(error.code, error.message, audited.request_id, error.http_status), None
        )

    async def _send(self, answers: bytes) -> bool:
        """Send answers whole, in the time that a client has to take them. False: it did not, or it is gone."""
        if not answers:
            return True
        if not self._sending.locked():  # most answers fit the socket's buffer: then nobody has to wait for anything
            try:
                sent = os.write(self._number(), answers)
            except BlockingIOError:
                sent = 0
            except OSError:
                return False
            if sent == len(answers):
                return True
            answers = answers[sent:]
        with trio.move_on_after(self._agent.settings.limits.request_timeout) as scope:
            async with self._sending:
                try:
                    await self._stream.send_all(answers)
                except trio.BrokenResourceError:
                    return False
        if scope.cancelled_caught:
            log.info("connection.answers_not_taken", **self._who())
        return not scope.cancelled_caught

    def _who(self) -> dict[str, Any]:
        return {"uid": self._caller.peer.uid, "pid": self._caller.peer.pid}


def new_request_id() -> str:
    """A fresh RequestId: a random UUID (RFC 9562, version 4) in the cloud's upper-case form."""
    digits = os.urandom(16).hex().upper()
    # uuid4() and its text take four times as long, which counts where every request has one.
    return (
        f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{'89AB'[int(digits[16], 16) & 3]}{digits[17:20]}-{digits[20:]}"
    )


async def refuse(stream: trio.SocketStream, why: str) -> None:
    """Refuse a whole connection, and close it."""
    refusal = kms_error("Rejected.Throttling", f"{why}.")
    error = _error(refusal.code, refusal.message, new_request_id(), refusal.http_status)
    async with stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(wire.encode_response(None, error, None))
            await _linger(stream)


async def _linger(stream: trio.SocketStream) -> None:
    """Read what a client still sends, for a moment, before its connection is closed.

    Closing with bytes unread makes the kernel throw away the last answer, or fail the client's write before it has read why.
    """
    with trio.move_on_after(LINGER), suppress(trio.BrokenResourceError):
        await stream.send_eof()
        while await stream.receive_some(_RECEIVE):
            pass


def _refusal(error: Exception, audited: Audited) -> KmsError:
    """What to answer instead of a result.

    A fresh exception: the one that was raised holds on to every frame it came through, and with them to a plaintext, or to a
    keyring that was replaced. Kept in one of these frames itself, it would do so until the next garbage collection.
    """
    if isinstance(error, KmsError):
        return kms_error(error.code, message=error.message, http_status=error.http_status)
    log.error("request.failed", request_id=audited.request_id, operation=audited.operation, exc_info=error)
    return kms_error("InternalFailure")


def _error(code: str, message: str, request_id: str, http_status: int) -> dict[str, Any]:
    return {"Code": code, "Message": message, "RequestId": request_id, "HttpStatus": http_status}
