"""One connection's own task: does everything that has to wait, which `rounds` may not do, and ends the connection."""

from collections.abc import Callable
from contextlib import suppress
from typing import Final

import structlog
import trio

from ..authz.caller import Caller
from ..peer import Process
from ..peer.inspection import Inspector
from ..state import ServerState
from .identity import Identity
from .line import Line
from .refusals import closing
from .rounds import Rounds

__all__ = ["LINGER", "Connection", "linger", "refuse"]

LINGER: Final = 1.0
"""Seconds in which a refused client may finish its write and read the error message."""
_RECEIVE: Final = 65_536

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class Connection:
    """One connection. It is served in rounds, and its own task waits where a round must not."""

    def __init__(
        self,
        rounds: Rounds,
        agent: ServerState,
        inspector: Inspector,
        stream: trio.SocketStream,
        caller: Caller,
        process: Process | None,
        more_evidence: Callable[[], None] = lambda: None,
    ) -> None:
        self._rounds = rounds
        self._agent = agent
        self._stream = stream
        self._process = process
        self._identity = Identity(agent, inspector, caller, process, more_evidence)
        self._called = trio.Event()
        self._line = Line(stream.socket.fileno(), caller, self._identity, self._wake)

    def _wake(self) -> None:
        self._called.set()

    async def run(self) -> None:
        """Serve the connection until the peer closes it, violates the protocol, is late or exits, or until the agent drains."""
        try:
            async with trio.open_nursery() as nursery:
                if self._process is not None:
                    nursery.start_soon(self._until_process_ends, self._process, nursery.cancel_scope)
                self._rounds.add(self._line)
                await self._serve()
                nursery.cancel_scope.cancel()
        finally:
            self._rounds.forget(self._line)

    async def _until_process_ends(self, process: Process, scope: trio.CancelScope) -> None:
        # The socket may now belong to another process, such as a child, whose credentials were never checked.
        await trio.lowlevel.wait_readable(process.fd)
        log.info("connection.process_ended", **self._line.who)
        scope.cancel()

    async def _serve(self) -> None:
        line = self._line
        while True:
            await self._called.wait()
            self._called = trio.Event()
            if line.failure is not None:
                raise line.failure
            if line.ended:
                return
            if line.unsent:
                unsent, line.unsent = line.unsent, b""
                if not await self._send(unsent):
                    return  # after a partial answer, the stream cannot carry another
                self._rounds.resume(line)
            elif line.to_inspect:
                line.to_inspect = False
                if not await self._identity.confirm():
                    return
                self._rounds.serve_confirmed(line)  # no await between `confirm` and this call
            else:
                if line.refused:
                    await linger(self._stream)
                return

    async def _send(self, answers: bytes) -> bool:
        """Send answers within the request timeout. Return False if the client did not read them in time, or is gone."""
        with trio.move_on_after(self._agent.settings.limits.request_timeout) as scope:
            try:
                await self._stream.send_all(answers)
            except trio.BrokenResourceError:
                return False
        if scope.cancelled_caught:
            log.info("connection.answers_not_taken", **self._line.who)
        return not scope.cancelled_caught


async def refuse(stream: trio.SocketStream, why: str) -> None:
    """Send an error message as the only answer on a connection, and close the connection."""
    async with stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(closing("Rejected.Throttling", f"{why}.", 429))
            await linger(stream)


async def linger(stream: trio.SocketStream) -> None:
    """Read and discard a client's bytes for `LINGER` seconds at most, before its connection is closed.

    If bytes are unread at the close, the kernel discards the last answer, or the client's write fails before it reads that.
    """
    with trio.move_on_after(LINGER), suppress(trio.BrokenResourceError):
        await stream.send_eof()
        while await stream.receive_some(_RECEIVE):
            pass
