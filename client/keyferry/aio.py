"""The client for trio and asyncio (extra `async`): the same methods, awaited.

    from keyferry.aio import Client

    async with Client() as kms:
        data_key = await kms.generate_data_key(key_id="alias/orders")

Tasks share one connection, and their calls are in flight at the same time. The client has no background task and no nursery:
one of the tasks that wait for answers reads for all of them. Exceptions are those of the blocking client, not in groups.
"""

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Self, TypeVar

import anyio
import anyio.lowlevel

from . import logs
from .aio_connection import SharedConnection, connect
from .declaration import Awaiting, Operation
from .errors import AgentUnavailable, KeyferryError
from .operations import Operations
from .protocol.rpc import (
    MAX_LOST_CONNECTIONS,
    Call,
    PendingCall,
    count_answered,
    default_socket,
    pending_calls,
    seconds,
    unreachable,
)
from .retry import Attempts, Retry

__all__ = ["Client"]

R = TypeVar("R")

_LOOP_STATE: Final = frozenset({"_bind_lock", "_connect_lock", "_connection", "_loop", "_is_released"})
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
        self._reset()

    def _reset(self) -> None:
        """Reset to the state without a connection and without an event loop."""
        self._bind_lock = threading.Lock()
        self._loop: tuple[int, Any] | None = None
        self._is_released = False
        self._connect_lock = anyio.Lock()
        self._connection: SharedConnection | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _LOOP_STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"Client({self._path!r})"

    async def aclose(self) -> None:
        """Close the connection. The client stays usable: the next call opens a new connection."""
        self._bind()
        async with self._connect_lock:
            await self._disconnect()
            self._is_released = True

    def _bind(self) -> None:
        """Bind the client to the running event loop. Raises `KeyferryError` if another loop uses the client."""
        try:
            loop = (os.getpid(), anyio.lowlevel.current_token().native_token)
        except RuntimeError:
            raise KeyferryError("keyferry.aio needs a running event loop, of trio or asyncio") from None
        if self._loop == loop:
            return
        with self._bind_lock:
            if self._loop is not None:
                if self._loop[0] == loop[0] and not self._is_released and not _has_ended(self._loop[1]):
                    raise KeyferryError(
                        f"{self!r} is in use in another event loop; use a client for each event loop and each thread"
                    )
                if self._connection is not None:
                    self._connection.abandon()
                self._connection, self._connect_lock = None, anyio.Lock()
            self._loop, self._is_released = loop, False

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def call(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request by the API's own names and return the result as the agent sent it.

        For operations that have no method.
        """
        answer: dict[str, Any] = await self._call_one(Call(operation, dict(params)))
        return answer

    async def pipeline(self, requests: Iterable[Any]) -> list[Any]:
        """Send many requests together and return the outcome of each, like `keyferry.Client.pipeline`."""
        calls = pending_calls(requests)
        if calls:
            await self._exchange(calls)
        return [call.outcome() for call in calls]

    async def perform(self, operation: Operation[..., R], request: Any) -> R:
        result: R = await self._call_one(Call.of(operation, request))
        return result

    async def _call_one(self, call: Call) -> Any:
        pending_call = PendingCall.of(call)
        await self._exchange([pending_call])
        return pending_call.result()

    async def _exchange(self, calls: Sequence[PendingCall]) -> None:
        """Send all calls and wait for their answers. Every failure is raised as a `KeyferryError`."""
        self._bind()
        start = anyio.current_time()
        try:
            with anyio.move_on_after(self._timeout) as timeout_scope:
                await self._repeat(calls, timeout_scope)
            if timeout_scope.cancelled_caught:
                raise AgentUnavailable(f"no answer from {self._path} within {self._timeout:g} s")
        except BaseException as error:
            logs.failed(calls, error, anyio.current_time() - start)
            raise
        logs.answered(calls, anyio.current_time() - start)

    async def _repeat(self, calls: Sequence[PendingCall], timeout_scope: anyio.CancelScope) -> None:
        """Repeat the calls as often as the client's `Retry` permits."""
        attempts = Attempts(self._retry)
        while True:
            failure = None
            try:
                await self._attempt(calls, timeout_scope)
                now = anyio.current_time()
                delay = attempts.after_answers(calls, now, timeout_scope.deadline - now)
            except KeyferryError as error:
                failure, now = error, anyio.current_time()
                delay = attempts.after_failure(error, now, timeout_scope.deadline - now)
                if delay is None:
                    raise
            if delay is None:
                return
            logs.repeating(calls, failure, delay)
            del failure  # its traceback holds this frame
            await anyio.sleep(delay)

    async def _attempt(self, calls: Sequence[PendingCall], timeout_scope: anyio.CancelScope) -> None:
        """Send the calls, on a new connection after each loss. Raises `AgentUnavailable` after `MAX_LOST_CONNECTIONS`."""
        losses = progress = 0
        try:
            while True:
                is_new = self._connection is None or self._connection.broken is not None
                connection = await self._connected()
                try:
                    await self._run_once(connection, calls, timeout_scope)
                    return
                except ConnectionAbortedError:
                    pass  # another task was cancelled while it sent; do not count that as a loss
                except ConnectionError:
                    last_progress, progress = progress, count_answered(calls)
                    losses += is_new and progress == last_progress
                    if losses == MAX_LOST_CONNECTIONS:
                        raise
        except OSError as error:
            raise unreachable(self._path, error) from error

    async def _run_once(
        self, connection: SharedConnection, calls: Sequence[PendingCall], timeout_scope: anyio.CancelScope
    ) -> None:
        """Send the calls that are not answered yet on one connection, and wait for their answers."""
        for chunk in connection.session.chunks(calls):
            await connection.send(chunk)
            self._extend(timeout_scope)
        for _, response in calls:
            await connection.answer(response)
            self._extend(timeout_scope)

    def _extend(self, timeout_scope: anyio.CancelScope) -> None:
        if not timeout_scope.cancel_called:  # after the deadline the scope is being cancelled, and cannot be extended
            timeout_scope.deadline = anyio.current_time() + self._timeout

    async def _connected(self) -> SharedConnection:
        async with self._connect_lock:
            if self._connection is not None and self._connection.broken is not None:
                await self._disconnect()
            if self._connection is None:
                self._is_released = False
                self._connection = SharedConnection(*await connect(self._path))
            return self._connection


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
