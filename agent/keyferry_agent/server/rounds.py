"""Rounds: one task that serves all connections, a batch of requests of each at a time.

A round reads each connection that is ready once, decides and does what they ask, has all of it recorded in one hand-over to
the writer thread, and writes the answers of each connection in one write. Every connection that was ready when the round
began is served before the task looks again, so no connection waits for more than one batch of each other connection.

A round is synchronous but for a checkpoint after each `MAX_BATCH` requests. What has to wait (a client that does not take
its answers, the inspection of a program, the end of a connection) is the task's of that connection: it has the line `aside`,
and rounds neither read nor write it meanwhile.
"""

import math
import os
import select
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

import structlog
import trio

from ..state import MAX_BATCH
from .dispatch import Dispatcher, OffloadedJob, ServerContext, closing, refusal
from .line import Line
from .thread_pool import FairThreadPool

__all__ = ["Rounds"]

_SHARED_BATCH: Final = 8
"""Requests of one connection in one round, where other connections were served a few rounds ago."""
_SHARED_ROUNDS: Final = 8
"""Rounds of one connection alone, after which its batches are large again."""
_MOMENT_SECONDS: Final = 0.0001
"""How long to look for the next request before sleeping, where the one before came as soon."""
_LOOP_SECONDS: Final = 0.004
"""How long trio's loop may have no turn."""
log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class Rounds:
    """Serves lines. All methods but `run` are synchronous, and for the event loop's thread."""

    def __init__(self, context: ServerContext, pool: FairThreadPool) -> None:
        """Raises OSError where there is no descriptor left."""
        self._agent = context.agent
        self._dispatcher = Dispatcher(context)
        self._pool = pool
        self._poll = select.epoll()
        self._lines: dict[int, Line] = {}
        self._next: dict[Line, None] = {}
        """Lines to serve in the next round, also where their sockets are not readable."""
        self._incomplete: OrderedDict[Line, None] = OrderedDict()
        """Lines of which a message was received in part, in the order in which those messages began."""
        self._last_look = math.inf
        self._drained = False
        """Whether the last look is over: a line ends as soon as it has nothing half-received."""
        self._alone: Line | None = None
        self._shared = 0

    def __len__(self) -> int:
        return len(self._lines)

    def close(self) -> None:
        """Close the epoll's descriptor."""
        self._poll.close()

    def add(self, line: Line) -> None:
        """Serve a line from now on. Raises OSError."""
        self._lines[line.number] = line
        self._listen(line, wanted=True)
        if self._drained:
            self._call(line)

    def forget(self, line: Line) -> None:
        """Serve it no longer. To be called before its socket is closed.

        A child that has inherited the socket would keep it in the epoll, under a number that is another connection's by then.
        """
        line.ended = True
        self._incomplete.pop(line, None)
        self._alone = None if self._alone is line else self._alone
        self._listen(line, wanted=False)
        if self._lines.get(line.number) is line:
            del self._lines[line.number]

    def resume(self, line: Line) -> None:
        """Serve a line again that its own task had."""
        line.aside = False
        line.new_message = True  # the wait was not for the rest of a message
        self._call(line)

    def serve_confirmed(self, line: Line) -> None:
        """Serve a line in a round of its own, at once: its caller was confirmed in this moment."""
        line.aside = False
        if self._take(line, self._batch):
            self._answer([line])
        self._rouse()  # there may be a backlog, or another deadline

    def drain(self, last_look: float) -> None:
        """End each connection that has nothing half-received, at a time on trio's clock, after one more round."""
        self._last_look = last_look
        self._rouse()

    async def run(self) -> None:
        """Serve all lines, for ever."""
        turn, quick = 0.0, False
        while True:
            if self._next:
                await trio.lowlevel.checkpoint()
                turn = time.monotonic()
            elif not quick or not self._soon(turn):
                began = time.monotonic()
                await self._wait()
                turn = time.monotonic()
                quick = turn - began < _MOMENT_SECONDS
            await self._round()

    def _soon(self, turn: float) -> bool:
        """Whether some client asks on in a moment: a processor that sleeps takes a quarter of a request's time to be back."""
        now = time.monotonic()
        if self._pool.busy or now - turn > _LOOP_SECONDS:
            return False
        while time.monotonic() < now + _MOMENT_SECONDS:
            if self._poll.poll(0, 1):
                return True
            os.sched_yield()  # the client may be on this very processor
        return False

    async def _wait(self) -> None:
        try:
            if (deadline := self._deadline()) == math.inf:  # most often: a scope takes time
                await trio.lowlevel.wait_readable(self._poll)
            else:
                with trio.move_on_at(deadline):
                    await trio.lowlevel.wait_readable(self._poll)
        except trio.ClosedResourceError:
            pass  # `_rouse`

    def _rouse(self) -> None:
        """Have the task begin a round, where it waits for one. Without a descriptor of its own for that."""
        if not self._poll.closed:
            trio.lowlevel.notify_closing(self._poll)

    def _deadline(self) -> float:
        if not self._incomplete:
            return self._last_look
        return min(next(iter(self._incomplete)).message_since + self._timeout(), self._last_look)

    async def _round(self) -> None:
        """Serve each line that is ready now, once."""
        now = trio.current_time()
        lines, self._next = self._next, {}
        for number, _ in self._poll.poll(0, max(1, len(self._lines))):
            line = self._lines[number]  # each is unregistered before it is forgotten
            line.readable = True
            lines[line] = None
        if self._incomplete:
            self._add_late(lines, now)
        most = self._share(lines)
        backlog = [line for line in lines if line.asks]
        await self._serve([line for line in lines if not line.asks] if backlog else lines, most)
        if backlog:
            await self._serve(backlog, most)  # they were in the round before, too
        if now >= self._last_look:
            self._last_look, self._drained = math.inf, True
            for line in [*self._lines.values()]:
                self._settle(line)

    async def _serve(self, lines: Iterable[Line], most: int) -> None:
        """Serve each of these lines once, as many together as have `MAX_BATCH` requests."""
        serving: list[Line] = []
        requests = 0
        for line in lines:
            if self._prepare(line) and self._take(line, most):
                serving.append(line)
                requests += len(line.exchange.asked) + len(line.exchange.done) + line.notifications // 8
            if requests >= MAX_BATCH:
                self._answer(serving)
                serving, requests = [], 0
                await trio.lowlevel.checkpoint()
        self._answer(serving)

    def _share(self, lines: dict[Line, None]) -> int:
        """How many requests of each line this round has: few, where lines wait for each other."""
        if len(lines) == 1 and self._alone in lines:
            self._shared = max(0, self._shared - 1)
        elif lines:
            self._alone = next(iter(lines))
            self._shared = _SHARED_ROUNDS if len(self._lines) > 1 else 0
        return self._batch

    @property
    def _batch(self) -> int:
        return _SHARED_BATCH if self._shared else MAX_BATCH

    def _add_late(self, lines: dict[Line, None], now: float) -> None:
        """Add the lines whose message is not whole although its time is over: what was sent in time is read first."""
        timeout = self._timeout()
        while self._incomplete:
            line = next(iter(self._incomplete))
            if line.message_since + timeout > now:
                break
            del self._incomplete[line]
            line.late = True
            if not line.aside:
                lines[line] = None

    def _timeout(self) -> float:
        return self._agent.settings.limits.request_timeout

    def _prepare(self, line: Line) -> bool:
        """Receive what there is, and confirm the caller; False where there is nothing to answer now."""
        readable, line.readable = line.readable, False
        if line.ended or line.aside:
            return False
        try:
            if readable and not line.closing and not line.asks and not line.full:
                line.receive()
            if not line.exchange.done and (not line.asks or line.full):
                self._settle(line)
                return False
            confirmed = line.identity.confirm_at_once()
        except OSError:  # the peer is gone
            self._end(line)
            return False
        except Exception as error:
            self._fail(line, error)
            return False
        if confirmed is None:
            line.to_inspect = True
            self._put_aside(line)
        elif not confirmed:
            self._end(line)
        return bool(confirmed)

    def _take(self, line: Line, most: int) -> bool:
        """Take the next batch of a line's messages; False where that failed."""
        if line.messages is None or line.exchange.asked or line.full:
            return True
        try:
            if line.unread and self._dispatcher.take_recalled(line.exchange, line.decoder):
                line.messages = None
                return True
            line.unread = False
            batch = self._dispatcher.take(line.exchange, line.messages, most)
        except Exception as error:
            self._fail(line, error)
            return False
        line.notifications = batch.notifications
        line.new_message = line.new_message or batch.messages > 0
        if batch.last:
            line.messages = None
        if batch.error is not None:
            self._refuse(line, "ProtocolError", str(batch.error), 400)
        return True

    def _answer(self, lines: list[Line]) -> None:
        """Do and record what these lines ask; then send each its answers."""
        if not lines:
            return
        try:
            self._dispatcher.run([line.exchange for line in lines])
        except Exception as error:
            for line in lines:
                self._fail(line, error)
            return
        for line in lines:
            try:
                if line.exchange.failure is not None:
                    raise line.exchange.failure
                self._finish(line)
            except Exception as error:
                self._fail(line, error)

    def _finish(self, line: Line) -> None:
        exchange = line.exchange
        count, line.notifications = line.notifications, 0
        if count and not self._dispatcher.notified(exchange.caller, count) and not line.refused:
            line.messages = None
            self._refuse(line, "Rejected.Throttling", "more notifications than this user may send", 429)
        offloaded, exchange.offloaded = exchange.offloaded, []
        for job in offloaded:
            self._offload(line, job)
        answers, exchange.answers = exchange.answers, b""
        if line.last_word and not exchange.asked and not exchange.under_way:
            answers, line.last_word = answers + line.last_word, b""
        if answers and not self._send(line, answers):
            return
        self._settle(line)

    def _send(self, line: Line, answers: bytes) -> bool:
        """Send answers; False where they are not taken whole at once: then the line's own task sends the rest, or ends it."""
        try:
            sent = os.write(line.number, answers)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._end(line)
            return False
        if sent == len(answers):
            return True
        line.unsent = answers[sent:]
        self._put_aside(line)
        return False

    def _settle(self, line: Line) -> None:
        """Decide what a line waits for, when everything that it was to be sent was sent."""
        if line.ended or line.aside:
            return
        late, line.late = line.late, False
        if not line.closing and not line.asks:
            self._settle_reading(line, late=late)
        if line.asks and not line.full:
            self._next[line] = None
        elif line.closing and not line.asks and not line.exchange.under_way:
            self._put_aside(line)
            return
        self._listen(line, wanted=not line.closing and not line.full)

    def _settle_reading(self, line: Line, *, late: bool) -> None:
        if not line.decoder.incomplete:
            self._incomplete.pop(line, None)
            line.closing = self._drained
            return
        # The time that answering took is not the client's; all other time is, however many pieces a message comes in.
        if line.new_message or line.full:
            self._begin_message(line)
        elif late:
            log.info("connection.slow_request", **line.who)
            line.closing = True
            return
        line.new_message = False

    def _begin_message(self, line: Line) -> None:
        """Give a line all of the time in which the rest of its message is due."""
        line.message_since = trio.current_time()
        self._incomplete[line] = None
        self._incomplete.move_to_end(line)

    def _refuse(self, line: Line, code: str, why: str, http_status: int) -> None:
        """Read nothing more, and say why after the answers to everything that was asked before."""
        self._agent.counters.requests_refused += 1
        log.info("connection.protocol_error", why=why, **line.who)
        line.closing = line.refused = True
        line.last_word = closing(code, f"{why}.", http_status)

    def _offload(self, line: Line, job: OffloadedJob) -> None:
        agent, generation = self._agent, job.generation

        def run() -> Any:
            # Begun after a reload, it would be done for nothing: its decision does not hold any more.
            return job.job.run() if agent.generation == generation else None

        def done(result: Any, error: Exception | None) -> None:
            line.exchange.done.append((job, result if error is None else refusal(error, job.audited)))
            self._call(line)

        try:
            self._pool.submit(line.exchange.caller.peer.uid, run, done)
        except RuntimeError as error:
            done(None, error)

    def _call(self, line: Line) -> None:
        """Have a line served in the next round, although it may send nothing."""
        if not line.ended and not line.aside:
            self._next[line] = None
            self._rouse()

    def _listen(self, line: Line, *, wanted: bool) -> None:
        if wanted == line.listening:
            return
        if wanted:
            self._poll.register(line.number, select.EPOLLIN)
        else:
            with suppress(OSError):  # it is closed: then it is not in the epoll any more
                self._poll.unregister(line.number)
        line.listening = wanted

    def _put_aside(self, line: Line) -> None:
        """Leave a line to its own task."""
        line.aside = True
        self._listen(line, wanted=False)
        line.wake()

    def _end(self, line: Line) -> None:
        self.forget(line)
        line.wake()

    def _fail(self, line: Line, error: Exception) -> None:
        if not line.ended:
            line.failure = error
            self._end(line)
