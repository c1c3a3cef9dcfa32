"""The blocking client: a socket around the codec. It checks nothing that the agent checks.

Every method is one operation of `operations`, with its parameters as keyword arguments and its result as a frozen tuple:

    with Client() as kms:
        data_key = kms.generate_and_export_data_key(
            key_id="alias/orders", public_key_blob=module.public_key_blob,
            wrapping_key_spec=module.wrapping_key_spec, wrapping_algorithm=module.wrapping_algorithm)
        data_key.ciphertext_blob, data_key.exported_data_key
"""

import math
import os
import select
import socket as sockets
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Self, TypeVar

from . import logs
from .declaration import Blocking, Operation
from .errors import AgentUnavailable, KeyferryError
from .operations import Operations
from .protocol.rpc import (
    CONNECT_STEP_SECONDS,
    MAX_LOST_CONNECTIONS,
    RECEIVE_BYTES,
    Call,
    PendingCall,
    RpcSession,
    count_answered,
    default_socket,
    pending_calls,
    seconds,
    unreachable,
)
from .retry import Attempts, Retry

__all__ = ["Client"]

R = TypeVar("R")

_MAX_POLL_SECONDS: Final = 3_600.0
"""Most seconds of one call of poll(2), whose timeout is limited. Longer waits take several calls."""
_READABLE: Final = 0x001
_WRITABLE: Final = 0x004
"""POLLIN and POLLOUT of Linux. A program that replaces the module `select` may have removed them from it."""
_PROCESS_STATE: Final = frozenset({"_connection", "_lock", "_poll", "_session"})
"""Attributes of a client that a pickle leaves out."""


class Client(Operations, Blocking):
    """A client with one connection to the agent, which is opened at the first call, and again after it was lost.

    Threads can share a client; it sends one thread's call at a time. After a fork, the child opens its own connection. A
    client can be pickled, for processes that start in another way: the pickle holds the path and the timeout, not the
    connection. `timeout` is in seconds and bounds one whole call, connecting included. For a pipeline, it bounds the wait for
    each further part of the answers.

    Calls raise `KmsError` and its subclasses when the agent refuses, `AgentUnavailable` without an answer in time, and
    `ProtocolError` when the peer does not follow the protocol. When a connection that was used before breaks, as after a
    restart of the agent, the client sends the unanswered requests again on a new connection. That is safe, because no operation
    changes anything in the agent.

    With `retry`, calls are also repeated after failures that are `retryable`, such as an agent that does not run. Without it,
    the failure is raised immediately.
    """

    def __init__(
        self, socket: str | os.PathLike[str] | None = None, *, timeout: float = 30.0, retry: Retry | None = None
    ) -> None:
        self._path = os.fspath(socket) if socket is not None else default_socket()
        self._timeout = seconds(timeout)
        self._retry = retry
        self._connection: sockets.socket | None = None
        self._poll: select.poll | _Select
        self._reset()
        _clients.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._path!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _PROCESS_STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connection = None
        self._reset()
        _clients.add(self)

    def close(self) -> None:
        """Close the connection. The client stays usable: the next call opens a new connection."""
        with self._lock:
            self._disconnect()

    def call(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request by the API's own names and return the result as the agent sent it.

        For operations that have no method.
        """
        answer: dict[str, Any] = self._call_one(Call(operation, dict(params)))
        return answer

    def pipeline(self, requests: Iterable[Any]) -> list[Any]:
        """Send many requests together and return, in their order, the result of each or the `KmsError` that refused it.

        A request is a tuple of `keyferry.operations`, such as `operations.Decrypt(ciphertext_blob=blob)`; its result is that of
        the method. Or a request is a pair of an operation's name and its parameters by the API's own names, as for `call`.
        Raises the same errors as a call, except for refusals, and TypeError for a value that is not a request.
        """
        calls = pending_calls(requests)
        if calls:
            self._exchange(calls)
        return [call.outcome() for call in calls]

    def perform(self, operation: Operation[..., R], request: Any) -> R:
        result: R = self._call_one(Call.of(operation, request))
        return result

    def _call_one(self, call: Call) -> Any:
        pending = PendingCall.of(call)
        self._exchange([pending])
        return pending.result()

    def _exchange(self, calls: Sequence[PendingCall]) -> None:
        """Send all calls and wait for their answers. Every failure is raised as a `KeyferryError`."""
        start = time.monotonic()
        try:
            self._repeat(calls, _Deadline(self._timeout))
        except BaseException as error:
            logs.failed(calls, error, time.monotonic() - start)
            raise
        logs.answered(calls, time.monotonic() - start)

    def _repeat(self, calls: Sequence[PendingCall], deadline: "_Deadline") -> None:
        """Repeat the calls as often as the client's `Retry` permits."""
        attempts = Attempts(self._retry)
        while True:
            failure = None
            try:
                self._attempt(calls, deadline)
                delay = attempts.after_answers(calls, time.monotonic(), deadline.remaining())
            except KeyferryError as error:
                failure = error
                delay = attempts.after_failure(error, time.monotonic(), deadline.remaining())
                if delay is None:
                    raise
            if delay is None:
                return
            logs.repeating(calls, failure, delay)
            del failure  # its traceback holds this frame
            time.sleep(delay)

    def _attempt(self, calls: Sequence[PendingCall], deadline: "_Deadline") -> None:
        # The lock to release is this one: a fork in a signal handler during the call replaces the child's attribute.
        lock = self._lock
        if not lock.acquire(timeout=min(deadline.remaining(), threading.TIMEOUT_MAX)):
            raise AgentUnavailable(
                f"{self._path}: other threads used this client for {self._timeout:g} s; use a client for each thread"
            )
        try:
            self._run(calls, deadline)
        except BaseException as error:
            # A call that was cut off, also by KeyboardInterrupt, leaves the connection unusable.
            self._disconnect()
            if isinstance(error, TimeoutError):
                raise AgentUnavailable(f"no answer from {self._path} within {self._timeout:g} s") from None
            if isinstance(error, OSError):
                raise unreachable(self._path, error) from error
            if isinstance(error, Exception) and not isinstance(error, (KeyferryError, MemoryError)):
                # The error comes from a program that replaces parts of the standard library: eventlet, gevent.
                raise KeyferryError(
                    f"the client cannot use its socket in this program: {type(error).__name__}: {error}"
                ) from error
            raise
        finally:
            lock.release()

    def _run(self, calls: Sequence[PendingCall], deadline: "_Deadline") -> None:
        """Send the calls, on new connections where one is lost. Raises ConnectionError after `MAX_LOST_CONNECTIONS` losses."""
        losses = progress = 0
        while True:
            is_new = self._connection is None
            try:
                self._run_once(calls, deadline)
                return
            except ConnectionError:
                if self._connection is None:
                    raise  # no process listens on the socket
                before, progress = progress, count_answered(calls)
                losses += is_new and progress == before
                if losses == MAX_LOST_CONNECTIONS:
                    raise
                self._disconnect()  # a restarting agent closed the old connection; the new agent may listen already

    def _run_once(self, calls: Sequence[PendingCall], deadline: "_Deadline") -> None:
        """Send the calls that are not answered yet on one connection, and wait for their answers."""
        connection = self._connection
        if connection is None:
            connection = self._connection = self._connect(deadline)
            self._poll = select.poll() if hasattr(select, "poll") else _Select()
            self._poll.register(connection, _READABLE)
        for chunk in self._session.chunks(calls):
            self._send(connection, chunk.data, deadline)
        for _, pending in calls:
            while pending.response is None:
                self._wait(deadline)
                self._receive(connection, deadline)

    def _send(self, connection: sockets.socket, data: bytearray, deadline: "_Deadline") -> None:
        """Send all of the data, and read answers meanwhile: the agent stops reading while its answers are not read."""
        unsent = memoryview(data)[_send_some(connection, data) :]
        if not unsent:
            return
        self._poll.modify(connection, _READABLE | _WRITABLE)
        while unsent:
            if self._wait(deadline) & ~_WRITABLE:
                self._receive(connection, deadline)
            unsent = unsent[_send_some(connection, unsent) :]
        self._poll.modify(connection, _READABLE)

    def _receive(self, connection: sockets.socket, deadline: "_Deadline") -> None:
        received = connection.recv(RECEIVE_BYTES)
        if not received:
            raise ConnectionResetError("the agent closed the connection without an answer")
        if self._session.receive(received):
            deadline.extend()

    def _wait(self, deadline: "_Deadline") -> int:
        """Wait until the connection is ready, and return the events of poll(2). Raises TimeoutError."""
        while not (events := self._poll.poll(math.ceil(min(deadline.check(), _MAX_POLL_SECONDS) * 1_000))):
            pass
        return events[0][1]

    def _connect(self, deadline: "_Deadline") -> sockets.socket:
        deadline.check()
        connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        connection.setblocking(False)
        try:
            while True:
                try:
                    connection.connect(self._path)  # on a Unix socket, succeeds immediately or finds the queue full
                    break
                except BlockingIOError:  # the agent's queue of connections is full for now
                    time.sleep(min(CONNECT_STEP_SECONDS, deadline.check()))
        except BaseException:
            connection.close()
            raise
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            # A partial answer in the old session may hold a plaintext.
            self._connection, self._session = None, RpcSession()

    def after_fork(self) -> None:
        """Drop the parent's connection in a forked child. The parent keeps its own descriptor of the connection."""
        self._disconnect()
        self._reset()  # another thread of the parent may have held the lock

    def _reset(self) -> None:
        """Reset to the state without a connection: in a new client, and in a forked child, as the parent owns the old one."""
        self._lock = threading.Lock()
        self._session = RpcSession()


def _send_some(connection: sockets.socket, data: bytearray | memoryview) -> int:
    try:
        return connection.send(data)
    except BlockingIOError:
        return 0


class _Select:
    """The part of select.poll that a client uses, on top of select.select. For eventlet, which removes poll."""

    def register(self, connection: sockets.socket, events: int) -> None:
        self._connection = connection
        self._events = events

    modify = register

    def poll(self, milliseconds: int) -> list[tuple[int, int]]:
        """Wait until the connection is ready. Return the descriptor and its events, or an empty list after the timeout."""
        readers = [self._connection]
        writers = readers if self._events & _WRITABLE else []
        readable, writable, _ = select.select(readers, writers, [], milliseconds / 1_000)
        events = (_READABLE if readable else 0) | (_WRITABLE if writable else 0)
        return [(self._connection.fileno(), events)] if events else []


class _Deadline:
    """The time at which a call fails, as it has waited for the client's timeout."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.extend()

    def extend(self) -> None:
        """Start the timeout again, after progress."""
        self._at = time.monotonic() + self._timeout

    def remaining(self) -> float:
        """Return the seconds that are left, at least 0."""
        return max(self._at - time.monotonic(), 0.0)

    def check(self) -> float:
        """Return the seconds that are left, more than 0. Raises TimeoutError after the deadline."""
        seconds_left = self.remaining()
        if not seconds_left:
            raise TimeoutError
        return seconds_left


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    for client in _clients:
        client.after_fork()


os.register_at_fork(after_in_child=_after_fork)
