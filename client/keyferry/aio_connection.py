"""The connection of `keyferry.aio.Client`: any number of tasks send requests on it, and one of them reads for all."""

import socket as sockets
from collections.abc import Callable
from typing import Final

import anyio
from anyio.abc import UNIXSocketStream

from .errors import AgentUnavailable, KeyferryError
from .protocol.rpc import CONNECT_STEP_SECONDS, RECEIVE_BYTES, Chunk, PendingResponse, RpcSession

__all__ = ["SharedConnection", "connect"]

_WINDOW_BYTES: Final = 98_304
"""Most bytes of requests in flight on one connection: less than a socket's buffer holds (212,992 on Linux)."""
_WRITE_OVERHEAD_BYTES: Final = 1_024
"""Bytes of the socket's buffer that each write takes in addition to its data."""


class _ChunkInFlight:
    """A chunk that was sent: its size in the socket's buffer, in bytes, and the number of its unanswered requests."""

    __slots__ = ("size", "unanswered")

    def __init__(self, chunk: Chunk) -> None:
        self.size = len(chunk.data) + _WRITE_OVERHEAD_BYTES
        self.unanswered = 0


class SharedConnection:
    """One connection, shared by any number of tasks. One waiting task, the reader, reads for all of them.

    A task waits for the answer to its request, or, to send, for space in the window. The tasks follow this protocol:

    * Without a reader, a waiting task becomes the reader. It receives once, stores all answers, and wakes the tasks that they
      concern. With a reader, a task sleeps until it is woken. Then either checks whether its own wait is over.
    * A task that ends its wait, also by cancellation, wakes one sleeping task, unless there is a reader, to be the next one.
    * The task with the send lock waits until the requests in flight and its chunk fit the window. So sending never blocks:
      otherwise both ends could block in send, each waiting for the other to read. A chunk leaves the window when all of its
      requests are answered.
    * The first error breaks the connection for good, and wakes all tasks. Each of them raises that error.
    """

    def __init__(self, stream: UNIXSocketStream, socket: sockets.socket) -> None:
        self.session = RpcSession()
        self.broken: Exception | None = None
        self._socket = socket
        self._stream = stream
        self._send_lock = anyio.Lock()
        self._has_reader = False
        self._sleepers: dict[PendingResponse | None, anyio.Event] = {}
        """Events that wake sleeping tasks, by the response that a task waits for; None: by the task with the send lock."""
        self._chunks: dict[PendingResponse, _ChunkInFlight] = {}
        self._bytes_in_flight = 0

    async def close(self) -> None:
        """Close the connection. Tasks that wait for an answer on it raise `AgentUnavailable`."""
        self._fail(AgentUnavailable("the client was closed during the call", retryable=False))
        await self._stream.aclose()

    def abandon(self) -> None:
        """Close the connection without its event loop, which has ended, or belongs to the parent process."""
        self._socket.close()

    async def send(self, chunk: Chunk) -> None:
        """Send a chunk completely, after waiting for the window. Raises ConnectionError."""
        if not chunk.data:
            return
        try:
            await self._send_lock.acquire()
        except BaseException:
            self.session.withdraw(chunk)
            raise
        try:
            await self._enter_window(chunk)
            await self._write(chunk.data)
        finally:
            self._send_lock.release()

    async def answer(self, response: PendingResponse) -> None:
        """Wait for the answer to a request that was sent. Raises ConnectionError, and the errors of `RpcSession.receive`."""
        await self._wait(response, lambda: response.response is not None)

    async def _enter_window(self, chunk: Chunk) -> None:
        """Wait for space in the window, and count the chunk in it. On failure, withdraw its requests."""
        in_flight = _ChunkInFlight(chunk)
        try:
            await self._wait(
                None, lambda: not self._bytes_in_flight or self._bytes_in_flight + in_flight.size <= _WINDOW_BYTES
            )
        except BaseException:
            self.session.withdraw(chunk)
            raise
        self._bytes_in_flight += in_flight.size
        for response in chunk.requests:
            if response.response is None:
                self._chunks[response] = in_flight
                in_flight.unanswered += 1

    async def _write(self, data: bytearray) -> None:
        try:
            await self._stream.send(bytes(data))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            self._fail(ConnectionResetError("the agent closed the connection"))
            self._check()
        except BaseException:  # cancelled: a part of the chunk may be sent, so the connection is unusable
            self._fail(ConnectionAbortedError("a request was sent in part"))
            raise

    async def _wait(self, key: PendingResponse | None, is_over: Callable[[], bool]) -> None:
        """Read or sleep until `is_over` returns True. `key` is that of `_sleepers`. Raises the connection's error."""
        try:
            while not is_over():
                self._check()
                if self._has_reader:
                    event = self._sleepers[key] = anyio.Event()
                    await event.wait()
                else:
                    await self._read()
        finally:
            self._sleepers.pop(key, None)
            if not self._has_reader and self._sleepers:
                self._wake(next(iter(self._sleepers)))

    async def _read(self) -> None:
        """Receive once, as the reader, and wake the tasks that the answers concern. An error breaks the connection."""
        self._has_reader = True
        try:
            answers = self.session.receive(await self._stream.receive(RECEIVE_BYTES))
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            self._fail(ConnectionResetError("the agent closed the connection without an answer"))
        except KeyferryError as error:
            self._fail(error)
        else:
            for response in answers:
                self._leave_window(response)
                self._wake(response)
            self._wake(None)
        finally:
            self._has_reader = False

    def _leave_window(self, response: PendingResponse) -> None:
        chunk = self._chunks.pop(response)
        chunk.unanswered -= 1
        if not chunk.unanswered:
            self._bytes_in_flight -= chunk.size

    def _wake(self, key: PendingResponse | None) -> None:
        if key in self._sleepers:
            self._sleepers[key].set()

    def _fail(self, error: Exception) -> None:
        self.broken = self.broken or error
        for event in self._sleepers.values():
            event.set()

    def _check(self) -> None:
        if self.broken is not None:
            raise self.broken.with_traceback(None)


async def connect(path: str) -> tuple[UNIXSocketStream, sockets.socket]:
    """Connect to the agent, also while its queue of connections is full. Raises OSError."""
    connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        connection.setblocking(False)
        while True:
            try:
                connection.connect(path)  # on a Unix socket, succeeds immediately or finds the queue full
                break
            except BlockingIOError:
                await anyio.sleep(CONNECT_STEP_SECONDS)
        return await UNIXSocketStream.from_socket(connection), connection
    except BaseException:
        connection.close()
        raise
