"""Rounds: one task serves all connections, with one batch of requests of each connection at a time.

A round reads each ready connection once, decides its requests, and runs their jobs. It passes all audit entries to the
writer thread in one call, and sends the answers of each connection in one write(2). Every connection that was ready when the
round began is served before the task polls again. So a connection waits for at most one batch of each other connection.

A round is synchronous except for a checkpoint after each `MAX_BATCH` requests. A connection's own task does everything that
has to wait: sending to a client that does not read its answers, inspecting a program, closing the connection. Meanwhile the
line is `aside`, and rounds neither read nor write it.
"""

import math
import os
import select
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import structlog
import trio

from ..state import MAX_BATCH
from .dispatch import Dispatcher, ServerContext
from .line import Line
from .offloading import offload
from .refusals import closing
from .thread_pool import FairThreadPool

__all__ = ["Rounds"]

_SHARED_BATCH: Final = 8
"""Requests of one connection in one round, if another connection was served in recent rounds."""
_SHARED_ROUNDS: Final = 8
"""Rounds with a single connection after which its batches are large again."""
_MOMENT_SECONDS: Final = 0.0001
"""Seconds to poll for the next request before blocking. The task polls only if its last wait was as short."""
_LOOP_SECONDS: Final = 0.004
"""Seconds for which polling may keep trio's event loop from running."""
log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class Rounds:
    """Serves lines. All methods except `run` are synchronous; call them in the event loop's thread."""

    def __init__(self, context: ServerContext, pool: FairThreadPool) -> None:
        """Create the epoll. Raises OSError if the process has no descriptor left."""
        self._agent = context.agent
        self._dispatcher = Dispatcher(context)
        self._pool = pool
        self._poll = select.epoll()
        self._lines: dict[int, Line] = {}
        self._next: dict[Line, None] = {}
        """Lines to serve in the next round, even if their sockets are not readable."""
        self._incomplete: OrderedDict[Line, None] = OrderedDict()
        """Lines with a partly received message, in the order in which those messages began."""
        self._last_look = math.inf
        self._drained = False
        """Whether the last look of a drain is over. Then a line ends as soon as it has no partly received message."""
        self._alone: Line | None = None
        self._shared = 0

    def __len__(self) -> int:
        return len(self._lines)

    def close(self) -> None:
        """Close the epoll's descriptor."""
        self._poll.close()

    def add(self, line: Line) -> None:
        """Add a line to the lines that are served. Raises OSError."""
        self._lines[line.number] = line
        self._listen(line, wanted=True)
        if self._drained:
            self._call(line)

    def forget(self, line: Line) -> None:
        """Stop serving a line. Call before its socket is closed.

        A child process that inherited the socket would keep it in the epoll, under a descriptor number that is reused.
        """
        line.ended = True
        self._incomplete.pop(line, None)
        self._alone = None if self._alone is line else self._alone
        self._listen(line, wanted=False)
        if self._lines.get(line.number) is line:
            del self._lines[line.number]

    def resume(self, line: Line) -> None:
        """Serve a line again after its own task has finished with it."""
        line.aside = False
        line.new_message = True  # the line was not waiting for the rest of a message
        self._call(line)

    def serve_confirmed(self, line: Line) -> None:
        """Serve a line at once, in a round of its own. Call right after its caller was confirmed."""
        line.aside = False
        if self._take(line, self._batch):
            self._answer([line])
        self._rouse()  # there may be a backlog, or another deadline

    def drain(self, last_look: float) -> None:
        """End each connection without a partly received message, after a last round at `last_look` on trio's clock."""
        self._last_look = last_look
        self._rouse()

    async def run(self) -> None:
        """Serve all lines, until cancelled."""
        turn, quick = 0.0, False
        while True:
            if self._next:
                await trio.lowlevel.checkpoint()
                turn = time.monotonic()
            elif not quick or not self._soon(turn):
                start = time.monotonic()
                await self._wait()
                turn = time.monotonic()
                quick = turn - start < _MOMENT_SECONDS
            await self._round()

    def _soon(self, turn: float) -> bool:
        """Return whether a client sends a request within `_MOMENT_SECONDS`. Blocks the event loop for that long.

        Waking a sleeping processor takes a quarter of a request's time.
        """
        now = time.monotonic()
        if self._pool.busy or now - turn > _LOOP_SECONDS:
            return False
        while time.monotonic() < now + _MOMENT_SECONDS:
            if self._poll.poll(0, 1):
                return True
            os.sched_yield()  # the client may need this processor
        return False

    async def _wait(self) -> None:
        try:
            if (deadline := self._deadline()) == math.inf:  # the usual case; a cancel scope would cost time
                await trio.lowlevel.wait_readable(self._poll)
            else:
                with trio.move_on_at(deadline):
                    await trio.lowlevel.wait_readable(self._poll)
        except trio.ClosedResourceError:
            pass  # `_rouse` was called

    def _rouse(self) -> None:
        """Make the task begin a round if it is waiting. Needs no descriptor of its own."""
        if not self._poll.closed:
            trio.lowlevel.notify_closing(self._poll)

    def _deadline(self) -> float:
        if not self._incomplete:
            return self._last_look
        return min(next(iter(self._incomplete)).message_since + self._timeout(), self._last_look)

    async def _round(self) -> None:
        """Serve each ready line once."""
        now = trio.current_time()
        lines, self._next = self._next, {}
        for number, _ in self._poll.poll(0, max(1, len(self._lines))):
            line = self._lines[number]  # always present: a line is unregistered before it is deleted
            line.readable = True
            lines[line] = None
        if self._incomplete:
            self._add_late(lines, now)
        max_requests = self._share(lines)
        backlog = [line for line in lines if line.asks]
        await self._serve([line for line in lines if not line.asks] if backlog else lines, max_requests)
        if backlog:
            await self._serve(backlog, max_requests)  # last, since they were served in the round before, too
        if now >= self._last_look:
            self._last_look, self._drained = math.inf, True
            for line in [*self._lines.values()]:
                self._settle(line)

    async def _serve(self, lines: Iterable[Line], max_requests: int) -> None:
        """Serve each of these lines once, in groups of about `MAX_BATCH` requests with a checkpoint after each group."""
        serving: list[Line] = []
        requests = 0
        for line in lines:
            if self._prepare(line) and self._take(line, max_requests):
                serving.append(line)
                requests += len(line.exchange.pending) + len(line.exchange.finished) + line.notifications // 8
            if requests >= MAX_BATCH:
                self._answer(serving)
                serving, requests = [], 0
                await trio.lowlevel.checkpoint()
        self._answer(serving)

    def _share(self, lines: dict[Line, None]) -> int:
        """Return the maximum of requests of each line in this round, which is small if lines compete."""
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
        """Add the lines whose message is incomplete after its timeout. They are read once more before they are closed."""
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
        """Receive the bytes that are available, and confirm the caller. Return False if there is nothing to answer now."""
        readable, line.readable = line.readable, False
        if line.ended or line.aside:
            return False
        try:
            if readable and not line.closing and not line.asks and not line.full:
                line.receive()
            if not line.exchange.finished and (not line.asks or line.full):
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

    def _take(self, line: Line, max_requests: int) -> bool:
        """Take the next batch of a line's messages. Return False if that failed."""
        if line.messages is None or line.exchange.pending or line.full:
            return True
        try:
            if line.unread and self._dispatcher.take_recalled(line.exchange, line.decoder):
                line.messages = None
                return True
            line.unread = False
            batch = self._dispatcher.take(line.exchange, line.messages, max_requests)
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
        """Run and audit the requests of these lines, then send the answers of each line."""
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
        if exchange.offloaded:
            offload(self._agent, self._pool, exchange, lambda: self._call(line))
        answers, exchange.answers = exchange.answers, b""
        if line.last_word and not exchange.pending and not exchange.in_flight:
            answers, line.last_word = answers + line.last_word, b""
        if answers and not self._send(line, answers):
            return
        self._settle(line)

    def _send(self, line: Line, answers: bytes) -> bool:
        """Send answers. Return False if not all were sent: the line's own task then sends the rest, or the line has ended."""
        try:
            sent_bytes = os.write(line.number, answers)
        except BlockingIOError:
            sent_bytes = 0
        except OSError:
            self._end(line)
            return False
        if sent_bytes == len(answers):
            return True
        line.unsent = answers[sent_bytes:]
        self._put_aside(line)
        return False

    def _settle(self, line: Line) -> None:
        """Decide how a line goes on after all its answers were sent: wait for bytes, be served again, or end."""
        if line.ended or line.aside:
            return
        late, line.late = line.late, False
        if not line.closing and not line.asks:
            self._settle_reading(line, late=late)
        if line.asks and not line.full:
            self._next[line] = None
        elif line.closing and not line.asks and not line.exchange.in_flight:
            self._put_aside(line)
            return
        self._listen(line, wanted=not line.closing and not line.full)

    def _settle_reading(self, line: Line, *, late: bool) -> None:
        if not line.decoder.incomplete:
            self._incomplete.pop(line, None)
            line.closing = self._drained
            return
        # The timeout does not include the time that the agent takes to answer. A message in many pieces gets no more time.
        if line.new_message or line.full:
            self._begin_message(line)
        elif late:
            log.info("connection.slow_request", **line.who)
            line.closing = True
            return
        line.new_message = False

    def _begin_message(self, line: Line) -> None:
        """Start the timeout for the rest of a line's message."""
        line.message_since = trio.current_time()
        self._incomplete[line] = None
        self._incomplete.move_to_end(line)

    def _refuse(self, line: Line, code: str, why: str, http_status: int) -> None:
        """Stop reading a line, and send it the reason after the answers to all earlier requests."""
        self._agent.counters.requests_refused += 1
        log.info("connection.protocol_error", why=why, **line.who)
        line.closing = line.refused = True
        line.last_word = closing(code, f"{why}.", http_status)

    def _call(self, line: Line) -> None:
        """Serve a line in the next round even if its socket is not readable."""
        if not line.ended and not line.aside:
            self._next[line] = None
            self._rouse()

    def _listen(self, line: Line, *, wanted: bool) -> None:
        if wanted == line.listening:
            return
        if wanted:
            self._poll.register(line.number, select.EPOLLIN)
        else:
            with suppress(OSError):  # a closed socket has left the epoll already
                self._poll.unregister(line.number)
        line.listening = wanted

    def _put_aside(self, line: Line) -> None:
        """Stop serving a line until its own task calls `resume` or `serve_confirmed`."""
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
