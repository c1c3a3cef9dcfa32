"""The server: accepts and admits connections, and drains them. Nurseries are only here, in `connection`, and in the daemon."""

import errno
import math
import os
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Final

import structlog
import trio

from keyferry import libcrypto

from ..audit import Appended, AuditLog
from ..audit.entry import AuditedRequest
from ..authz.caller import Caller
from ..peer import Peer, Process, evidence
from ..peer.inspection import Inspector
from ..state import OFFLOAD_THREADS, ServerState
from ..telemetry.metrics import Metrics
from .admission import Admission, NoRoomError
from .connection import LINGER, Connection, refuse
from .dispatch import ServerContext
from .rate_limit import Rate
from .rounds import Rounds
from .thread_pool import FairThreadPool

__all__ = ["DRAIN_READ_SECONDS", "GRACE", "Server"]

GRACE: Final = 10.0
"""Seconds that a drain may take. Equal to the default timeout of a request."""
DRAIN_READ_SECONDS: Final = 0.05
"""Seconds in which a draining agent still reads requests, since clients sent them before they could know of the drain."""
_NOTIFICATIONS_PER_SECOND: Final = 10_000
"""Limit of one user's notifications if requests have no limit. Notifications have no effect, so clients need few of them."""
_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)
_MAX_REFUSALS: Final = 16
"""Refused connections that get an error message at one time. The others are closed without a message."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class NullAuditLog:
    """An audit log that discards its entries, for the agent's requests to itself."""

    def record(self, requests: Sequence[AuditedRequest]) -> Appended:
        return Appended(len(requests))


class Server:
    """Serves an agent on listeners until `drain` is called."""

    def __init__(self, agent: ServerState, audit: AuditLog, metrics: Metrics | None = None) -> None:
        self.agent = agent
        self.inspector = Inspector()
        rate = Rate(agent.settings.limits.requests_per_second)
        self.context = ServerContext(
            agent=agent,
            audit=audit,
            rate=rate,
            notifications=Rate(_NOTIFICATIONS_PER_SECOND) if rate.unlimited else rate,
            metrics=metrics,
        )
        # Without libcrypto's SM2, an offloaded job holds the GIL. One job at a time leaves time for other requests.
        self.pool = FairThreadPool(OFFLOAD_THREADS if libcrypto.has_sm2() else 1)
        self._rounds = Rounds(self.context, self.pool)
        self._admission = Admission(agent)
        self._reserve: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._accepting = trio.CancelScope()
        self._refusing = 0
        self._next_complaint = -math.inf
        self._all = trio.CancelScope()

    async def serve(
        self,
        listeners: Sequence[tuple[str, trio.SocketListener]],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and serve connections until `drain`. Returns after the last answer, or when the grace period is over."""
        with closing(self._rounds), self._all:
            async with trio.open_nursery() as serving:
                serving.start_soon(self._rounds.run)
                async with trio.open_nursery() as connections:
                    with self._accepting:
                        async with trio.open_nursery() as accepting:
                            for name, listener in listeners:
                                accepting.start_soon(self._accept, name, listener, connections)
                            task_status.started()
                serving.cancel_scope.cancel()
        if self._all.cancelled_caught:
            log.warning("drain.grace_over", connections=self.agent.counters.connections)

    async def serve_own(self, stream: trio.SocketStream) -> None:
        """Serve a connection of the agent to itself. Its requests are neither audited nor limited."""
        own = replace(self.context, audit=NullAuditLog(), rate=Rate(0), notifications=Rate(0), metrics=None)
        caller = Caller(Peer(uid=None, gids=frozenset(), pid=os.getpid(), listener=""))
        with closing(Rounds(own, self.pool)) as rounds:
            async with stream, trio.open_nursery() as serving:
                serving.start_soon(rounds.run)
                await Connection(rounds, self.agent, self.inspector, stream, caller, None).run()
                serving.cancel_scope.cancel()

    def drain(self, grace: float = GRACE) -> None:
        """Stop accepting, answer all received requests, and close the connections, at the latest after `grace` seconds.

        May be called again to shorten the grace period.
        """
        self.agent.draining = True
        self._rounds.drain(trio.current_time() + DRAIN_READ_SECONDS)
        self._all.deadline = min(self._all.deadline, trio.current_time() + grace)
        self._accepting.cancel()

    async def _accept(self, name: str, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        async with listener:
            await self._accept_all(name, listener, connections)

    async def _accept_all(self, name: str, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:  # out of descriptors or memory: log the error, and retry after a pause
                log.error("accept.failed", listener=name, error=error.strerror)
                if error.errno in _NO_DESCRIPTORS:
                    await self._refuse_with_the_reserve(listener)
                await trio.sleep(0.1)
                continue
            try:
                peer, process = evidence(stream.socket, name)
            except ProcessLookupError:
                log.info("connection.process_ended", listener=name)
                stream.socket.close()
            except OSError as error:
                log.error("accept.failed", listener=name, error=error.strerror or str(error))
                if error.errno in _NO_DESCRIPTORS:
                    await _refuse_for_descriptors(stream)
                stream.socket.close()
            except Exception as error:  # an error about one peer closes only its connection
                log.error("connection.failed", listener=name, exc_info=error)
                stream.socket.close()
            else:
                connections.start_soon(self._connection, stream, peer, process)

    async def _refuse_with_the_reserve(self, listener: trio.SocketListener) -> None:
        """Accept one connection with the reserved descriptor, send an error message, and close it."""
        if self._reserve is None:
            return
        os.close(self._reserve)
        self._reserve = None
        with trio.move_on_after(LINGER), suppress(OSError):
            await _refuse_for_descriptors(await listener.accept())
        with suppress(OSError):
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    async def _connection(self, stream: trio.SocketStream, peer: Peer, process: Process | None) -> None:
        """Serve one connection from its first byte to its last. Its errors do not affect other connections."""
        try:
            await self._admit(stream, peer, process)
        finally:
            if process is not None:
                process.close()

    async def _admit(self, stream: trio.SocketStream, peer: Peer, process: Process | None) -> None:
        self.agent.counters.connections_total += 1
        caller, scope = Caller(peer), trio.CancelScope()

        def closed_for_another() -> None:
            if self._may_complain():
                log.warning(
                    "connection.closed_for_another",
                    why="its caller has no grant, and its place was needed",
                    uid=peer.uid,
                )
            scope.cancel()

        try:
            place = self._admission.enter(caller, seen=process is not None, close=closed_for_another)
        except NoRoomError as error:
            await self._refuse(stream, peer, str(error))
            return
        try:
            with scope:
                async with stream:
                    await Connection(
                        self._rounds,
                        self.agent,
                        self.inspector,
                        stream,
                        caller,
                        process,
                        lambda: self._admission.judge(place),
                    ).run()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer has closed the connection
        except* Exception as errors:
            log.error("connection.failed", exc_info=errors)
        finally:
            self._admission.leave(place)

    def _may_complain(self) -> bool:
        """Return whether to log a warning now, at most one a second, so that refusing costs no more than serving."""
        now = trio.current_time()
        if now < self._next_complaint:
            return False
        self._next_complaint = now + 1
        return True

    async def _refuse(self, stream: trio.SocketStream, peer: Peer, why: str) -> None:
        """Refuse a connection with an error message in the protocol's form.

        Only `_MAX_REFUSALS` connections at a time get a message.
        """
        self.agent.counters.connections_refused += 1
        if self._may_complain():
            log.warning("connection.refused", why=why, uid=peer.uid)
        if self._refusing >= _MAX_REFUSALS:
            stream.socket.close()
            return
        self._refusing += 1
        try:
            await refuse(stream, why)
        finally:
            self._refusing -= 1


async def _refuse_for_descriptors(stream: trio.SocketStream) -> None:
    with trio.move_on_after(LINGER):
        await refuse(stream, "This agent has no file descriptor left for a connection")
