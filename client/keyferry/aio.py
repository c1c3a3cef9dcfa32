"""The client for trio and asyncio (extra `async`): the same methods, awaited.

    from keyferry.aio import Client

    async with Client() as kms:
        made = await kms.generate_data_key(key_id="alias/orders")

Tasks share one connection, and their calls are in flight at the same time. The client has no background task and no nursery:
one of the tasks that wait for answers reads for all of them. Exceptions are those of the blocking client, not in groups.
"""

import os
import socket as sockets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Self, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import UNIXSocketStream

from . import logs
from .declaration import Awaiting, Operation
from .errors import AgentUnavailable, KeyferryError, KmsError
from .operations import Operations
from .protocol.rpc import (
    CONNECT_STEP,
    LOST_MOST,
    RECEIVE,
    Asked,
    Call,
    Chunk,
    Pending,
    RpcSession,
    answered,
    calls,
    default_socket,
    seconds,
    unreachable,
)
from .retry import Attempts, Retry

__all__ = ["Client"]

R = TypeVar("R")

_WINDOW: Final = 98_304
"""Most bytes of requests in flight on one connection: less than a socket's buffer holds (212,992 on Linux)."""
_OVERHEAD: Final = 1_024
"""Bytes of the socket's buffer that each write takes in addition to its data."""
_OF_ONE_LOOP: Final = frozenset({"_binding", "_connecting", "_connection", "_loop", "_released"})
"""Attributes of a client that a pickle leaves out."""


class Client(Operations, Awaiting):
    """A client like `keyferry.Client`, for one event loop. Its tasks can share it, and a call can be cancelled at any time.

    A call from another event loop raises `KeyferryError` until the first loop has ended, or has closed the client. A forked
    child and an unpickled client open connections of their own.

    `timeout` is in seconds and bounds one whole call. For a pipeline, it bounds the wait for each further part of the answers.
    `retry` is that of `keyferry.Client`.
    """

    def __init__(
        self, socket: str | os.PathLike[str] | None = None, *, timeout: float = 30.0, retry: Retry | None = None
    ) -> None:
        self._path = os.fspath(socket) if socket is not None else default_socket()
        self._timeout = seconds(timeout)
        self._retry = retry
        self._forget()

    def _forget(self) -> None:
        """Reset to the state without a connection and without an event loop."""
        self._binding = threading.Lock()
        self._loop: tuple[int, Any] | None = None
        self._released = False
        self._connecting = anyio.Lock()
        self._connection: _Connection | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OF_ONE_LOOP}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"Client({self._path!r})"

    async def aclose(self) -> None:
        """Close the connection. The client stays usable: the next call opens a new connection."""
        self._bind()
        async with self._connecting:
            await self._disconnect()
            self._released = True

    def _bind(self) -> None:
        """Bind the client to the running event loop. Raises `KeyferryError` if another loop uses the client."""
        try:
            loop = (os.getpid(), anyio.lowlevel.current_token().native_token)
        except RuntimeError:
            raise KeyferryError("keyferry.aio needs a running event loop, of trio or asyncio") from None
        if self._loop == loop:
            return
        with self._binding:
            if self._loop is not None:
                if self._loop[0] == loop[0] and not self._released and not _has_ended(self._loop[1]):
                    raise KeyferryError(
                        f"{self!r} is in use in another event loop, and one client is for one event loop: "
                        "make a client for each loop and each thread"
                    )
                if self._connection is not None:
                    self._connection.abandon()
                self._connection, self._connecting = None, anyio.Lock()
            self._loop, self._released = loop, False

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def call(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request by the API's own names and return the result as the agent sent it.

        For operations that have no method.
        """
        answer: dict[str, Any] = await self._one(Call(operation, dict(params)))
        return answer

    async def pipeline(self, wanted: Iterable[Any]) -> list[Any]:
        """Send many requests together and return the outcome of each, like `keyferry.Client.pipeline`."""
        asked = [Asked.of(call) for call in calls(wanted)]
        if asked:
            await self._exchange(asked)
        return [each.outcome() for each in asked]

    async def perform(self, operation: Operation[..., R], request: Any) -> R:
        result: R = await self._one(Call.of(operation, request))
        return result

    async def _one(self, call: Call) -> Any:
        asked = Asked.of(call)
        await self._exchange([asked])
        outcome = asked.outcome()
        if isinstance(outcome, KmsError):
            raise outcome
        return outcome

    async def _exchange(self, asked: Sequence[Asked]) -> None:
        """Send all calls and wait for their answers. Every failure is raised as a `KeyferryError`."""
        self._bind()
        began = anyio.current_time()
        try:
            with anyio.move_on_after(self._timeout) as patience:
                await self._repeat(asked, patience)
            if patience.cancelled_caught:
                raise AgentUnavailable(f"no answer from {self._path} within {self._timeout:g} s")
        except BaseException as error:
            logs.failed(asked, error, anyio.current_time() - began)
            raise
        logs.answered(asked, anyio.current_time() - began)

    async def _repeat(self, asked: Sequence[Asked], patience: anyio.CancelScope) -> None:
        """Repeat the calls as often as the client's `Retry` permits."""
        attempts = Attempts(self._retry)
        while True:
            failure = None
            try:
                await self._attempt(asked, patience)
                now = anyio.current_time()
                delay = attempts.after_answers(asked, now, patience.deadline - now)
            except KeyferryError as error:
                failure, now = error, anyio.current_time()
                delay = attempts.after_failure(error, now, patience.deadline - now)
                if delay is None:
                    raise
            if delay is None:
                return
            logs.repeating(asked, failure, delay)
            del failure  # its traceback holds this frame
            await anyio.sleep(delay)

    async def _attempt(self, asked: Sequence[Asked], patience: anyio.CancelScope) -> None:
        """Send the calls, on new connections where one is lost. Raises `AgentUnavailable` after `LOST_MOST` losses."""
        lost = done = 0
        try:
            while True:
                fresh = self._connection is None or self._connection.broken is not None
                connection = await self._connected()
                try:
                    await self._go(connection, asked, patience)
                    return
                except ConnectionAbortedError:
                    pass  # another task was cancelled while it sent; do not count that as a loss
                except ConnectionError:
                    before, done = done, answered(asked)
                    lost += fresh and done == before
                    if lost == LOST_MOST:
                        raise
        except OSError as error:
            raise unreachable(self._path, error) from error

    async def _go(self, connection: "_Connection", asked: Sequence[Asked], patience: anyio.CancelScope) -> None:
        """Send the calls that are not answered yet on one connection, and wait for their answers."""
        for chunk in connection.exchange.chunks(asked):
            await connection.send(chunk)
            self._extend(patience)
        for _, pending in asked:
            await connection.answer(pending)
            self._extend(patience)

    def _extend(self, patience: anyio.CancelScope) -> None:
        if not patience.cancel_called:  # after the deadline the scope is being cancelled, and cannot be extended
            patience.deadline = anyio.current_time() + self._timeout

    async def _connected(self) -> "_Connection":
        async with self._connecting:
            if self._connection is not None and self._connection.broken is not None:
                await self._disconnect()
            if self._connection is None:
                self._released = False
                self._connection = _Connection(*await _connect(self._path))
            return self._connection


class _Sent:
    """A chunk in flight: its size in the socket's buffer, in bytes, and the number of its unanswered requests."""

    __slots__ = ("left", "size")

    def __init__(self, size: int, left: int) -> None:
        self.size = size
        self.left = left


class _Connection:
    """One connection, shared by any number of tasks. One waiting task reads for all, and wakes the others.

    Sending is limited to a window so that it never blocks: otherwise both ends could block in send, each waiting for the other
    to read.
    """

    def __init__(self, stream: UNIXSocketStream, socket: sockets.socket) -> None:
        self.exchange = RpcSession()
        self._socket = socket
        self._stream = stream
        self._sending = anyio.Lock()
        self._waiting: dict[object, anyio.Event] = {}
        self._somebody_reads = False
        self._under_way = 0
        self._sent: dict[Pending, _Sent] = {}
        self._sender = object()  # the key in `_waiting` of the one task that waits to send
        self.broken: Exception | None = None

    async def close(self) -> None:
        """Close the connection. Tasks that wait for an answer on it raise `AgentUnavailable`."""
        self._fail(AgentUnavailable("the client was closed while the call was under way", retryable=False))
        await self._stream.aclose()

    def abandon(self) -> None:
        """Close the connection without its event loop, which has ended, or belongs to the parent process."""
        self._socket.close()

    async def send(self, chunk: Chunk) -> None:
        """Send a chunk completely, after waiting for the window. Raises ConnectionError."""
        if not chunk.data:
            return
        try:
            await self._sending.acquire()
        except BaseException:
            self.exchange.withdraw(chunk)
            raise
        try:
            sent = _Sent(len(chunk.data) + _OVERHEAD, 0)
            await self._until(
                self._sender, lambda: not self._under_way or self._under_way + sent.size <= _WINDOW, chunk
            )
            self._under_way += sent.size
            for pending in chunk.requests:
                if pending.response is None:
                    self._sent[pending] = sent
                    sent.left += 1
            try:
                await self._stream.send(bytes(chunk.data))
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                self._fail(ConnectionResetError("the agent closed the connection"))
                self._check()
            except BaseException:  # cancelled: a part of the chunk may be sent, so the connection is unusable
                self._fail(ConnectionAbortedError("a request was cut off"))
                raise
        finally:
            self._sending.release()

    async def answer(self, pending: Pending) -> None:
        """Wait for the answer to a request that was sent. Raises ConnectionError, and the errors of `RpcSession.receive`."""
        await self._until(pending, lambda: pending.response is not None)

    async def _until(self, waiter: object, done: Callable[[], bool], unsent: Chunk | None = None) -> None:
        """Read until `done` returns True, or wait while another task reads. On failure, withdraw the requests of `unsent`."""
        try:
            while not done():
                self._check()
                if self._somebody_reads:
                    woken = self._waiting[waiter] = anyio.Event()
                    await woken.wait()
                else:
                    await self._read()
        except BaseException:
            if unsent is not None:
                self.exchange.withdraw(unsent)
            raise
        finally:
            self._waiting.pop(waiter, None)
            if not self._somebody_reads:  # the reading task ends, answered or cancelled: wake another task to read
                for event in self._waiting.values():
                    event.set()
                    break

    async def _read(self) -> None:
        self._somebody_reads = True
        try:
            answered = self.exchange.receive(await self._stream.receive(RECEIVE))
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            self._fail(ConnectionResetError("the agent closed the connection without an answer"))
        except KeyferryError as error:
            self._fail(error)
        else:
            for pending in answered:
                sent = self._sent.pop(pending)
                sent.left -= 1
                if not sent.left:
                    self._under_way -= sent.size
                if pending in self._waiting:
                    self._waiting[pending].set()
            if self._sender in self._waiting:
                self._waiting[self._sender].set()
        finally:
            self._somebody_reads = False

    def _fail(self, error: Exception) -> None:
        self.broken = self.broken or error
        for event in self._waiting.values():
            event.set()

    def _check(self) -> None:
        if self.broken is not None:
            raise self.broken.with_traceback(None)


async def _connect(path: str) -> tuple[UNIXSocketStream, sockets.socket]:
    connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        connection.setblocking(False)
        while True:
            try:
                connection.connect(path)  # on a Unix socket, succeeds immediately or finds the queue full
                break
            except BlockingIOError:
                await anyio.sleep(CONNECT_STEP)
        return await UNIXSocketStream.from_socket(connection), connection
    except BaseException:
        connection.close()
        raise


def _has_ended(loop: Any) -> bool:
    """Return whether an event loop has ended: asyncio has a method for that, and trio refuses new work."""
    if hasattr(loop, "is_closed"):
        return bool(loop.is_closed())
    try:
        loop.run_sync_soon(_nothing)
    except RuntimeError:  # trio.RunFinishedError
        return True
    return False


def _nothing() -> None:
    """Do nothing. `_has_ended` passes this function to a trio loop as a trial."""
