"""Listeners, connections, back-pressure and drain: the only place with nurseries, and with threads for slow jobs.

One connection is one task. It reads what there is, answers what can be answered at once in one write, and starts slow jobs
beside itself; it reads again only when its answers were taken. So a client that does not read costs a bounded number of
answers, and a client that sends a full pipeline gives way to the others after each handful.
"""

import errno
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import structlog
import trio

from keyferry import libcrypto, wire
from keyferry.declaration import result_to_wire
from keyferry.errors import KmsError, ProtocolError, kms_error

from . import handlers
from .agent import SLOW_JOBS, Agent, Audited, Caller
from .audit import AuditLog
from .limits import Rate
from .peer import Peer, Process, evidence

__all__ = ["GRACE", "Server"]

GRACE: Final = 10.0
"""Seconds that a drain may take: as long as a request may, by default."""
_LONGEST_NAME: Final = 64
"""Characters of an operation's name to record: what a client calls an operation may be anything."""
_LAST_LOOK: Final = 0.05
"""Seconds in which a draining agent still takes requests: those that lie in its sockets were sent in good faith."""
_MOST_REFUSALS: Final = 16
"""Connections to explain a refusal to at one time; the others are closed without a word."""
_LINGER: Final = 1.0
"""Seconds in which a client that was refused may finish its write and read why."""
_RECEIVE: Final = 65_536
_TURN: Final = 16
"""Requests answered in one go before other connections get their turn: about a millisecond."""
_SLOW_PER_CONNECTION: Final = 8
"""Slow jobs that one connection may have under way; then it is not read from. Twice the threads keeps them busy."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class Server:
    """Serves an agent on listeners until `drain` is called."""

    def __init__(self, agent: Agent, audit: AuditLog) -> None:
        self.agent = agent
        self._audit = audit
        # Without libcrypto's SM2, a slow job holds the interpreter's lock: one at a time leaves room for everybody else.
        self._slow = trio.CapacityLimiter(SLOW_JOBS if libcrypto.has_sm2() else 1)
        self._rate = Rate(agent.settings.limits.requests_per_second)
        self._per_user: Counter[int | None] = Counter()
        self._reserve: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._accepting = trio.CancelScope()
        self._idle: set[trio.CancelScope] = set()
        self._refusing = 0
        self._next_complaint = -math.inf
        self._all = trio.CancelScope()
        self._last_look = math.inf

    async def serve(
        self,
        listeners: Sequence[tuple[str, trio.SocketListener]],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and answer until `drain`; returns when the last answer is out, or the grace period is over."""
        with self._all:
            async with trio.open_nursery() as connections:
                with self._accepting:
                    async with trio.open_nursery() as accepting:
                        for name, listener in listeners:
                            accepting.start_soon(self._accept, name, listener, connections)
                        task_status.started()
        if self._all.cancelled_caught:
            log.warning("drain.grace_over", connections=self.agent.counters.connections)

    def drain(self, grace: float = GRACE) -> None:
        """Stop accepting, let every connection answer what it has received, and close them; at the latest after `grace`.

        May be called again, to shorten the grace.
        """
        self.agent.draining = True
        self._last_look = trio.current_time() + _LAST_LOOK
        self._all.deadline = min(self._all.deadline, trio.current_time() + grace)
        self._accepting.cancel()
        for scope in self._idle:
            scope.cancel()

    async def _accept(self, name: str, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:  # out of descriptors or memory: wait for some to come back, and say so
                    log.error("accept.failed", listener=name, error=error.strerror)
                    if error.errno in (errno.EMFILE, errno.ENFILE):
                        await self._refuse_with_the_reserve(listener)
                    await trio.sleep(0.1)
                    continue
                try:
                    peer, process = evidence(stream.socket, name)
                except OSError as error:
                    log.error("accept.failed", listener=name, error=error.strerror)
                    stream.socket.close()
                    continue
                connections.start_soon(self._connection, stream, peer, process)

    async def _refuse_with_the_reserve(self, listener: trio.SocketListener) -> None:
        """Take one connection with a descriptor that was kept for it, say why, and close it."""
        if self._reserve is None:
            return
        os.close(self._reserve)
        self._reserve = None
        with trio.move_on_after(_LINGER), suppress(OSError):
            await _say_why(await listener.accept(), "This agent has no file descriptor left for a connection")
        with suppress(OSError):
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    async def _connection(self, stream: trio.SocketStream, peer: Peer, process: Process | None) -> None:
        """One connection from its first byte to its last. Nothing that happens in it reaches another."""
        try:
            await self._admit(stream, peer, process)
        finally:
            if process is not None:
                process.close()

    async def _admit(self, stream: trio.SocketStream, peer: Peer, process: Process | None) -> None:
        counters, limits = self.agent.counters, self.agent.settings.limits
        counters.connections_total += 1
        if counters.connections >= limits.connections:
            await self._refuse(stream, peer, "This agent has all the connections it may have")
            return
        if self._per_user[peer.uid] >= limits.connections_per_user:
            await self._refuse(stream, peer, "This user has all the connections one user may have")
            return
        counters.connections += 1
        self._per_user[peer.uid] += 1
        try:
            async with stream:
                await _Connection(self, stream, peer, process).run()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer went away
        except* Exception as errors:
            log.error("connection.failed", exc_info=errors)
        finally:
            counters.connections -= 1
            self._per_user[peer.uid] -= 1
            if not self._per_user[peer.uid]:
                del self._per_user[peer.uid]

    async def _refuse(self, stream: trio.SocketStream, peer: Peer, why: str) -> None:
        """Refuse a connection and say why, in a way that every client of the protocol can read.

        Only a few at a time get an explanation, and one in a second a line in the log: being refused must not cost more than
        being served.
        """
        now = trio.current_time()
        if now >= self._next_complaint:
            self._next_complaint = now + 1
            log.warning("connection.refused", why=why, uid=peer.uid)
        if self._refusing >= _MOST_REFUSALS:
            stream.socket.close()
            return
        self._refusing += 1
        try:
            await _say_why(stream, why)
        finally:
            self._refusing -= 1


class _Connection:
    """The state of one connection while it is served."""

    def __init__(self, server: Server, stream: trio.SocketStream, peer: Peer, process: Process | None) -> None:
        self._server = server
        self._agent = server.agent
        self._stream = stream
        self._caller = Caller(peer)
        self._process = process
        self._decoder = wire.Decoder()
        self._started = trio.current_time()  # when the request that is being received began
        self._sending = trio.Lock()
        self._slots = trio.Semaphore(_SLOW_PER_CONNECTION)

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
                if not await self._answer_all(slow):
                    slow.cancel_scope.cancel()
                    return
                self._started = trio.current_time()  # the time that answering took is not the client's

    async def _identified(self) -> bool:
        """Whether who connected is still there and is what it was, with all evidence that grants are about."""
        process, agent = self._process, self._agent
        if process is None:
            return True
        if agent.policy.hashes_programs and self._caller.peer.sha256 is None and process.seen is not None:
            hashed = await trio.to_thread.run_sync(process.hash_program)
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
                return await self._stream.receive_some(_RECEIVE)
            log.info("connection.slow_request", **self._who())
            return b""
        if not self._agent.draining:
            with trio.CancelScope() as idle:
                self._server._idle.add(idle)
                try:
                    received = await self._stream.receive_some(_RECEIVE)
                    self._started = trio.current_time()
                    return received
                finally:
                    self._server._idle.discard(idle)
        # Draining, and nothing half-received: take what had been sent by then, and otherwise hang up.
        with trio.move_on_at(self._server._last_look):
            self._started = trio.current_time()
            return await self._stream.receive_some(_RECEIVE)
        return b""

    async def _answer_all(self, slow: trio.Nursery) -> bool:
        """Answer every whole message received so far; False when the stream cannot go on."""
        out = bytearray()
        handled = 0
        try:
            for message in self._decoder.messages():
                self._started = trio.current_time()  # the rest of the buffer belongs to the next request
                answer = await self._answer(message, slow)
                out += answer
                handled += 1
                if handled % _TURN == 0:
                    if not await self._send(out):
                        return False
                    out.clear()
                    await trio.lowlevel.checkpoint()
        except ProtocolError as error:
            self._agent.counters.requests_refused += 1
            log.info("connection.protocol_error", why=str(error), **self._who())
            for _ in range(_SLOW_PER_CONNECTION):  # what was asked before it is answered before it
                await self._slots.acquire()
            out += wire.encode_response(None, _error("ProtocolError", f"{error}.", new_request_id(), 400), None)
            if await self._send(out):
                await _linger(self._stream)
            return False
        return await self._send(out)

    async def _answer(self, message: wire.Message, slow: trio.Nursery) -> bytes:
        """The answer to one message; empty when there is none, or when a slow job will send it."""
        if isinstance(message, wire.Notification):
            return b""
        if isinstance(message, wire.Response):
            raise ProtocolError("a response, where a request is expected")
        audited = Audited(new_request_id(), time.monotonic(), ascii(message.method[:_LONGEST_NAME])[1:-1])
        if not self._server._rate.allows(self._caller.peer.uid, audited.started):
            return self._finish(message.msgid, audited, kms_error("Rejected.Throttling"))
        if isinstance(message, wire.Unservable):
            return self._finish(message.msgid, audited, kms_error("InvalidParameter", f"{message.why}."))
        msgid, method, params = message
        outcome: Any
        try:
            self._caller.refresh(self._agent.policy)
            job = handlers.prepare(self._agent, self._caller, method, params, audited)
            outcome = None if job.slow else job.run()
        except Exception as error:
            outcome = _refusal(error, audited)
        if outcome is not None:
            return self._finish(msgid, audited, outcome)
        await self._slots.acquire()
        slow.start_soon(self._run_slow, job, msgid, audited)
        return b""

    async def _run_slow(self, job: handlers.Job, msgid: int, audited: Audited) -> None:
        try:
            outcome: Any
            try:
                outcome = await trio.to_thread.run_sync(job.run, limiter=self._server._slow)
            except Exception as error:
                outcome = _refusal(error, audited)
            if not await self._send(self._finish(msgid, audited, outcome)):
                await self._stream.aclose()  # wakes the reader, which then ends the connection
        finally:
            self._slots.release()

    def _finish(self, msgid: int, audited: Audited, outcome: Any) -> bytes:
        """Write the record of a request, and only then make its answer: the result, or the error that it ended in."""
        counters = self._agent.counters
        error = outcome if isinstance(outcome, KmsError) else None
        try:
            self._server._audit.record(self._caller.peer, audited, error.code if error else "OK")
        except OSError as failure:
            log.error("audit.failed", error=failure.strerror, request_id=audited.request_id)
            if self._agent.settings.audit.on_failure == "refuse":
                error = kms_error("ServiceUnavailableTemporary", "The audit record could not be written.")
        counters.requests_total += 1
        if error is None:
            try:
                return wire.encode_response(msgid, None, {**result_to_wire(outcome), "RequestId": audited.request_id})
            except Exception as failure:  # nothing that a handler gives should be unsendable
                error = _refusal(RuntimeError(f"the answer cannot be sent: {type(failure).__name__}"), audited)
        counters.requests_refused += 1
        return wire.encode_response(
            msgid, _error(error.code, error.message, audited.request_id, error.http_status), None
        )

    async def _send(self, answers: bytes | bytearray) -> bool:
        """Send answers whole, in the time that a client has to take them. False: it did not, or it is gone."""
        if not answers:
            return True
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
    """A fresh RequestId: a UUID in the cloud's upper-case form."""
    return str(uuid.uuid4()).upper()


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


async def _say_why(stream: trio.SocketStream, why: str) -> None:
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
    with trio.move_on_after(_LINGER), suppress(trio.BrokenResourceError):
        await stream.send_eof()
        while await stream.receive_some(_RECEIVE):
            pass
