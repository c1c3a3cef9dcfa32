"""The blocking client: a socket around the codec, with no rules of its own.

Every method is one operation of `operations`, with its parameters as keyword arguments and its result as a frozen tuple:

    with Client() as kms:
        made = kms.generate_and_export_data_key(
            key_id="alias/orders", public_key_blob=module.public_key_blob,
            wrapping_key_spec=module.wrapping_key_spec, wrapping_algorithm=module.wrapping_algorithm)
        made.ciphertext_blob, made.exported_data_key
"""

import os
import socket as sockets
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, ParamSpec, Self, TypeVar, overload

from . import operations, wire
from .errors import AgentUnavailable, KmsError, ProtocolError, kms_error
from .parameters import PUBLIC_KEY_BLOB, encode_base64

__all__ = ["DEFAULT_SOCKET", "Client", "default_socket", "pem_to_der"]

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_SOCKET: Final = "/run/keyferry/agent.sock"
_RECEIVE: Final = 65_536
_CONNECT_STEP: Final = 0.005
"""Seconds between two attempts to connect to an agent that has no room in its queue."""


def default_socket() -> str:
    """Where the agent listens: `$KEYFERRY_SOCKET`, else /run/keyferry/agent.sock."""
    return os.environ.get("KEYFERRY_SOCKET") or DEFAULT_SOCKET


def pem_to_der(data: bytes) -> bytes:
    """Take the armour off a PEM public key; bytes that have none are DER already."""
    text = data.strip()
    if not text.startswith(b"-----BEGIN"):
        return data
    import base64  # noqa: PLC0415 - `import keyferry` is kept short; few callers have PEM

    lines = text.splitlines()
    if lines[0] != b"-----BEGIN PUBLIC KEY-----" or lines[-1] != b"-----END PUBLIC KEY-----":
        raise ValueError("expected one PUBLIC KEY block (a SubjectPublicKeyInfo) in the PEM")
    return base64.b64decode(b"".join(lines[1:-1]), validate=True)


class _Method(Generic[P, R]):
    """One operation as a method of the client, with the signature of its request."""

    def __init__(self, request: Callable[P, object], result: type[R]) -> None:
        self._request = request
        self._result = result

    @overload
    def __get__(self, client: None, owner: type["Client"]) -> Self: ...
    @overload
    def __get__(self, client: "Client", owner: type["Client"]) -> Callable[P, R]: ...
    def __get__(self, client: "Client | None", owner: type["Client"]) -> Self | Callable[P, R]:
        if client is None:  # Client.decrypt, as pydoc reads it
            return self

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if args:
                raise TypeError("parameters of an operation are keyword arguments")
            return client._operate(self._request(*args, **kwargs), self._result)

        call.__name__ = self._request.__name__
        call.__doc__ = self._request.__doc__
        return call


class Client:
    """A connection to the agent, made at the first call and again when it is lost.

    Safe to share between threads (calls take turns) and to keep across a fork (the child connects anew). `timeout` is in
    seconds and bounds one whole call, connecting included.

    Calls raise `KmsError` and its children when the agent refuses, `AgentUnavailable` when nobody answers in time, and
    `ProtocolError` when what answers is no agent. When a connection that was used before breaks, as after a restart of the
    agent, the call is repeated on a new one: no operation changes anything in the agent.
    """

    generate_and_export_data_key = _Method(
        operations.GenerateAndExportDataKey, operations.GenerateAndExportDataKeyResult
    )
    export_data_key = _Method(operations.ExportDataKey, operations.ExportDataKeyResult)
    decrypt = _Method(operations.Decrypt, operations.DecryptResult)
    describe_key = _Method(operations.DescribeKey, operations.DescribeKeyResult)
    get_agent_status = _Method(operations.GetAgentStatus, operations.GetAgentStatusResult)

    def __init__(self, socket: str | os.PathLike[str] | None = None, *, timeout: float = 30.0) -> None:
        self._path = os.fspath(socket) if socket is not None else default_socket()
        self._timeout = timeout
        self._connection: sockets.socket | None = None
        self._msgid = 0
        self._forget()
        _clients.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._path!r})"

    def close(self) -> None:
        """Close the connection. The client stays usable: the next call opens another."""
        with self._lock:
            self._disconnect()

    def call(self, operation: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request by the API's own names and give the result as the agent sent it, for what has no method."""
        deadline = time.monotonic() + self._timeout
        if not self._lock.acquire(timeout=max(self._timeout, 0)):
            raise AgentUnavailable(f"other threads kept {self._path} busy for {self._timeout:g} s")
        try:
            self._msgid = (self._msgid + 1) & wire.MAX_MSGID
            try:
                request = wire.encode_request(self._msgid, operation, dict(params))
            except ProtocolError as error:
                raise kms_error("InvalidParameter", f"The request was not sent: {error}.") from None
            fresh = self._connection is None
            try:
                try:
                    answer = self._exchange(request, deadline)
                except ConnectionError:
                    if fresh:
                        raise
                    self._disconnect()  # an agent that was restarted closed the old connection; it may be back
                    answer = self._exchange(request, deadline)
            except TimeoutError:
                self._disconnect()
                raise AgentUnavailable(f"no answer from {self._path} within {self._timeout:g} s") from None
            except OSError as error:
                self._disconnect()
                raise AgentUnavailable(_why_unreachable(self._path, error)) from error
            except BaseException:  # half an exchange, a KeyboardInterrupt say, leaves a connection nobody can use
                self._disconnect()
                raise
        finally:
            self._lock.release()
        if answer.error is not None:
            raise _refusal(answer.error)
        return answer.result or {}

    def _operate(self, request: object, kind: type[R]) -> R:
        name = type(request).__name__
        params = operations.request_to_wire(request)
        blob = params.get(PUBLIC_KEY_BLOB.name)
        if isinstance(blob, bytes):
            params[PUBLIC_KEY_BLOB.name] = encode_base64(pem_to_der(blob))
        for key, value in params.items():
            if isinstance(value, Mapping):
                params[key] = dict(value)
        answer = self.call(name, params)
        try:
            result: R = operations.result_from_wire(kind, answer)
        except (KeyError, TypeError) as error:
            raise ProtocolError(f"the answer to {name} lacks {error}") from None
        return result

    def _exchange(self, request: bytes, deadline: float) -> wire.Response:
        if self._connection is None:
            self._connection = self._connect(deadline)
            self._decoder = wire.Decoder()
        connection = self._connection
        connection.settimeout(_left(deadline))
        connection.sendall(request)
        while True:
            for message in self._decoder.messages():
                if not isinstance(message, wire.Response):
                    raise ProtocolError("the agent sent something that is no response")
                if message.msgid is None:  # it does not take this connection, or could not read us, and hangs up
                    error = message.error or {}
                    if error.get("Code") == "ProtocolError":
                        raise ProtocolError(f"the agent could not read the request: {error.get('Message')}")
                    raise _refusal(error)
                if message.msgid == self._msgid:
                    return message
                raise ProtocolError("the agent answered a request that is not under way")
            connection.settimeout(_left(deadline))
            received = connection.recv(_RECEIVE)
            if not received:
                raise ConnectionResetError("the agent closed the connection without an answer")
            self._decoder.feed(received)

    def _connect(self, deadline: float) -> sockets.socket:
        connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        try:
            while True:
                try:
                    connection.settimeout(_left(deadline))
                    connection.connect(self._path)
                    break
                except BlockingIOError:  # the agent's queue of connections is full for now
                    time.sleep(_CONNECT_STEP)
        except BaseException:
            connection.close()
            raise
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _forget(self) -> None:
        """Start without a connection: in a new client, and in a child after fork, where the parent owns the old one."""
        self._lock = threading.Lock()
        self._decoder = wire.Decoder()
        self._msgid = 0


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    for client in _clients:
        client._disconnect()  # closes the child's descriptor; the parent keeps its own
        client._forget()  # another thread of the parent may have held the lock


os.register_at_fork(after_in_child=_after_fork)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _why_unreachable(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist: is keyferry-agent running, and is this its socket?"
    if isinstance(error, ConnectionRefusedError):
        return f"nobody listens on {path}: keyferry-agent is not running"
    if isinstance(error, PermissionError):
        return f"this user may not open {path}: see the socket's mode and group"
    return f"{path}: {error.strerror or error}"


def _refusal(error: Mapping[str, Any]) -> KmsError | ProtocolError:
    code, message, status = error.get("Code"), error.get("Message"), error.get("HttpStatus")
    if not isinstance(code, str) or not isinstance(message, str):
        return ProtocolError("the agent refused without a Code and a Message")
    request_id = str(error.get("RequestId", ""))
    return kms_error(code, message=message, request_id=request_id, http_status=status if isinstance(status, int) else 0)
