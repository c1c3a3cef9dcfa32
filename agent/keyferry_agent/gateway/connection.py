"""One connection of a gateway: reads requests with deadlines and limits, and sends their answers in order."""

from typing import Final, TypeAlias

import structlog
import trio

from ..server.connection import LINGER, linger
from ..server.server import DRAIN_READ_SECONDS
from ..state import ServerState
from .client import Client
from .endpoint import Endpoint
from .head import Head, HeadReader
from .http_request import Reception
from .refusals import HttpRefusal

__all__ = ["HeldBytes", "HttpConnection", "HttpStream"]

MAX_IDLE_SECONDS: Final = 75.0
"""Seconds between two requests of a client that has proved its access key."""
MAX_UNPROVEN_IDLE_SECONDS: Final = 10.0
"""Seconds of the same for other clients."""
MAX_HELD_BYTES: Final = 16 * 1024 * 1024
"""Bytes of unfinished requests on all connections together."""
_FIRST_READ_BYTES: Final = 4_096
"""Bytes to read where a request begins: enough for most. Freed memory is cleared, so that a larger buffer costs more time."""
_READ_BYTES: Final = 65_536
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

HttpStream: TypeAlias = "trio.SocketStream | trio.SSLStream[trio.SocketStream]"

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class HeldBytes:
    """Counts the bytes of unfinished requests on all connections."""

    def __init__(self) -> None:
        self._total = 0

    def replace(self, old_count: int, new_count: int) -> None:
        """Count `new_count` bytes of a connection instead of `old_count`. Raises `HttpRefusal` above the limit."""
        if self._total + new_count - old_count > MAX_HELD_BYTES and new_count > old_count:
            raise HttpRefusal(503, "ServiceUnavailableTemporary", "The gateway holds too many unfinished requests.")
        self._total += new_count - old_count


class HttpConnection:
    """Serves the requests of one connection, one at a time."""

    def __init__(
        self,
        agent: ServerState,
        endpoint: Endpoint,
        stream: HttpStream,
        client: Client,
        held: HeldBytes,
        idle: set[trio.CancelScope],
    ) -> None:
        """`idle`: the scopes of connections that wait for a request. The server cancels them when it drains."""
        self._agent = agent
        self._endpoint = endpoint
        self._stream = stream
        self._client = client
        self._reader = HeadReader()
        self._held = held
        self._held_count = 0
        self._idle = idle
        self._has_answered = False

    async def run(self) -> None:
        """Serve the connection until the client closes it, is late or violates HTTP, or until the agent drains."""
        try:
            while await self._serve_one():
                self._has_answered = True
        except HttpRefusal as refusal:
            if await self._send(self._endpoint.refuse(self._client, refusal)):
                await self._linger()
        finally:
            self._hold(0)

    async def _serve_one(self) -> bool:
        """Serve one request. Return whether the connection goes on. Its bytes are referenced by this call only."""
        reception = await self._receive()
        if reception is None:
            return False
        self._hold(len(self._reader.buffer))
        answer, goes_on = await self._endpoint.answer(self._client, reception)
        if not answer or not await self._send(answer):
            return False
        if not goes_on:
            await self._linger()
        return goes_on

    async def _receive(self) -> Reception | None:
        """Return the next request, or None if none comes. Raises `HttpRefusal`."""
        if not self._reader.buffer and not await self._wait_for_request():
            return None
        head = await self._receive_head()
        if head is None:
            return None
        body = await self._receive_body(head)
        return None if body is None else Reception(head, body)

    async def _wait_for_request(self) -> bool:
        """Return whether the first bytes of a request came, within the time for idle connections."""
        seconds = MAX_IDLE_SECONDS if self._client.proven else MAX_UNPROVEN_IDLE_SECONDS
        if self._agent.draining:  # the drain began during a request, so that its answer did not say so
            seconds = DRAIN_READ_SECONDS
        with trio.move_on_after(seconds) as scope:
            self._idle.add(scope)
            try:
                return await self._read()
            finally:
                self._idle.discard(scope)
        return False

    async def _receive_head(self) -> Head | None:
        with trio.move_on_after(self._timeout()):
            while (head := self._reader.take_head()) is None:
                if not await self._read():
                    return None
            return head
        self._refuse_late("The head of the request was not received in time.")
        return None

    async def _receive_body(self, head: Head) -> bytes | None:
        if not head.body_bytes and not head.is_chunked:
            return b""
        needed_bytes = 1 if head.is_chunked else head.body_bytes
        waits = head.expects_continue and len(self._reader.buffer) < needed_bytes
        if waits and not await self._send(_CONTINUE):
            return None
        with trio.move_on_after(self._timeout()):
            while (body := self._reader.take_body(head)) is None:
                if not await self._read():
                    return None
            return body
        self._refuse_late("The body of the request was not received in time.")
        return None

    def _refuse_late(self, message: str) -> None:
        if not self._has_answered:
            raise HttpRefusal(408, "RequestTimeout", message)

    async def _read(self) -> bool:
        """Add bytes to the reader. Return False if the client has closed the connection."""
        data = await self._stream.receive_some(_READ_BYTES if self._reader.buffer else _FIRST_READ_BYTES)
        if not data:
            return False
        self._reader.feed(data)
        self._hold(len(self._reader.buffer))
        return True

    def _hold(self, count: int) -> None:
        self._held.replace(self._held_count, count)
        self._held_count = count

    async def _send(self, answer: bytes) -> bool:
        """Send bytes. Return False if the client did not take them in time."""
        with trio.move_on_after(self._timeout()) as scope:
            await self._stream.send_all(answer)
        if scope.cancelled_caught:
            log.info("connection.answers_not_taken", listener=self._client.peer.listener)
        return not scope.cancelled_caught

    async def _linger(self) -> None:
        """Shut this side down and read on for a while, so that the kernel does not discard the answer in a reset."""
        stream = self._stream
        with trio.move_on_after(LINGER):
            await linger(stream.transport_stream if isinstance(stream, trio.SSLStream) else stream)

    def _timeout(self) -> float:
        return self._agent.settings.limits.request_timeout
