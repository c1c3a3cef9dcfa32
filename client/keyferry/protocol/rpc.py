"""The I/O-free part of both clients: encoding of calls, and matching of one connection's answers to its requests."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from ..declaration import Operation, request_to_wire, result_from_wire
from ..errors import AgentUnavailable, KmsError, ProtocolError, kms_error
from ..operations import OPERATIONS
from ..parameters import MAX_PAGE, PLAINTEXT, PUBLIC_KEY_BLOB, encode_base64
from . import wire

__all__ = [
    "CONNECT_STEP_SECONDS",
    "DEFAULT_SOCKET",
    "MAX_LOST_CONNECTIONS",
    "RECEIVE_BYTES",
    "Call",
    "Chunk",
    "PendingCall",
    "PendingResponse",
    "RpcSession",
    "count_answered",
    "default_socket",
    "pem_to_der",
    "pending_calls",
    "seconds",
    "socket_path",
    "unreachable",
    "why_unreachable",
]

DEFAULT_SOCKET: Final = "/run/keyferry/agent.sock"
RECEIVE_BYTES: Final = 65_536
"""Bytes to receive in one call."""
MAX_LOST_CONNECTIONS: Final = 3
"""Number of new connections lost without an answer after which a call fails.

During a restart, one connection can reach the agent that is stopping, and another one can end in a crash.
"""
CONNECT_STEP_SECONDS: Final = 0.005
"""Seconds between two attempts to connect to an agent whose queue of connections is full."""
_MAX_CHUNK_BYTES: Final = 32_768
"""Bytes of requests in one chunk, except for a single longer request."""

_DER_PREFIXES: Final = (bytes.fromhex("30820122300d"), bytes.fromhex("305930130607"))
"""First bytes of the DER of the two supported kinds of public key: RSA of 2,048 bits, and SM2."""
_URL_PREFIXES: Final = ("unix://", "unix:")

_PLAIN_TYPES: Final = frozenset({str, int, bool, dict})


def default_socket() -> str:
    """Return the path of the agent's socket: `$KEYFERRY_SOCKET`, else /run/keyferry/agent.sock. Raises `AgentUnavailable`."""
    try:
        return socket_path(os.environ.get("KEYFERRY_SOCKET") or DEFAULT_SOCKET)
    except ValueError as error:
        raise AgentUnavailable(f"KEYFERRY_SOCKET: {error}") from None


def socket_path(text: str) -> str:
    """Return the path in the text of a setting: a path, `unix://PATH`, `unix:PATH`, or one that begins with `~`.

    Raises ValueError for an abstract socket and for an empty path.
    """
    path = text
    for prefix in _URL_PREFIXES:
        if text.startswith(prefix):
            path = text.removeprefix(prefix)
            break
    if path.startswith("@"):
        raise ValueError(f"{text} names an abstract socket, which every user can take; set the path of a socket file")
    if not path:
        raise ValueError(f"{text!r} does not name a socket; set the path of a socket file")
    return os.path.expanduser(path)


def seconds(timeout: float) -> float:
    """Return a valid timeout unchanged. Raises ValueError for a negative number or NaN, TypeError for other types."""
    if not float(timeout) >= 0:
        raise ValueError(f"a timeout is a number of seconds from 0, not {timeout!r}")
    return timeout


def unreachable(path: str, error: OSError) -> AgentUnavailable:
    """Return the exception for a socket that does not connect, or whose connection broke."""
    is_temporary = isinstance(error, FileNotFoundError | ConnectionError) and _describe_non_socket(path) is None
    return AgentUnavailable(why_unreachable(path, error), retryable=is_temporary)


def why_unreachable(path: str, error: OSError) -> str:
    """Return a message about a socket that does not connect, with advice for the user."""
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist; start keyferry-agent, or set the path of its socket"
    if isinstance(error, ConnectionRefusedError):
        return _describe_non_socket(path) or f"{path}: no process listens on this socket; start keyferry-agent"
    if isinstance(error, PermissionError):
        return f"{path}: this user may not open the socket; check its mode and group"
    return f"{path}: {error.strerror or error}"


def _describe_non_socket(path: str) -> str | None:
    """Return a message if the path is a folder, or a file that is not a socket; None for a socket or a missing file."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    if stat.S_ISDIR(mode):
        return (
            f"{path} is a folder, not a socket: a container runtime creates a folder where the socket does not exist yet; "
            "remove it, start keyferry-agent, then the container"
        )
    if stat.S_ISREG(mode):
        return f"{path} is a regular file, not a socket; set the path that keyferry-agent listens on"
    if not stat.S_ISSOCK(mode):
        return f"{path} is not a socket; set the path that keyferry-agent listens on"
    return None


def pem_to_der(data: bytes) -> bytes:
    """Return the DER of a public key in PEM, DER or Base64. Raises ValueError, as `public_keys.to_der` does."""
    if data.startswith(_DER_PREFIXES):
        return data
    from ..public_keys import to_der  # noqa: PLC0415 - `import keyferry` is kept short; few callers have PEM

    return to_der(data)


def _public_key_text(text: str) -> str:
    data = text.encode(errors="replace")
    der = pem_to_der(data)
    return text if der == data else encode_base64(der)


class Call(NamedTuple):
    """One call: the operation's name and parameters, and the tuple for its result (None: return the answer's map)."""

    name: str
    params: dict[str, Any]
    result: type[Any] | None = None

    @classmethod
    def of(cls, operation: Operation[..., Any], request: Any) -> "Call":
        """Return the call of a request tuple, with PEM and binary parameters converted to Base64."""
        params = request_to_wire(request)
        blob, plaintext = params.get(PUBLIC_KEY_BLOB.name), params.get(PLAINTEXT.name)
        if isinstance(blob, bytes):
            params[PUBLIC_KEY_BLOB.name] = encode_base64(pem_to_der(blob))
        elif isinstance(blob, str) and (
            "-" in blob or not blob.isascii()
        ):  # the text is not Base64; it can be the text of a PEM file
            params[PUBLIC_KEY_BLOB.name] = _public_key_text(blob)
        if isinstance(plaintext, bytes):
            params[PLAINTEXT.name] = encode_base64(plaintext)
        for key, value in params.items():
            if type(value) not in _PLAIN_TYPES and isinstance(value, Mapping):
                params[key] = dict(value)
        return cls(operation.name, params, operation.result)


class PendingResponse:
    """A request in flight. `response` is None until the agent answers, or an error if the request could not be sent.

    Holds no parameters: it can outlive a cancelled call, and parameters may contain a plaintext.
    """

    __slots__ = ("msgid", "response")

    def __init__(self) -> None:
        self.msgid = 0
        self.response: wire.Response | KmsError | None = None


class PendingCall(NamedTuple):
    """A call and its response."""

    call: Call
    pending: PendingResponse

    @classmethod
    def of(cls, call: Call) -> "PendingCall":
        """Return a call that was not sent yet."""
        return cls(call, PendingResponse())

    @property
    def name(self) -> str:
        """Return the operation's name."""
        return self.call.name

    def refusal(self) -> KmsError | None:
        """Return the agent's refusal; None for a result, and for a pending request. Raises `ProtocolError`."""
        response = self.pending.response
        if response is None or isinstance(response, KmsError):
            return response
        return None if response.error is None else _refusal(response.error)

    def result(self) -> Any:
        """Return the result. Raises the `KmsError` that the agent sent, and `ProtocolError`."""
        outcome = self.outcome()
        if isinstance(outcome, KmsError):
            raise outcome
        return outcome

    def request_id(self) -> str:
        """Return the RequestId of a result, or an empty text."""
        response = self.pending.response
        result = response.result if isinstance(response, wire.Response) else None
        return str((result or {}).get("RequestId", ""))

    def outcome(self) -> Any:
        """Return the result, or the `KmsError` that the agent sent. Raises `ProtocolError`."""
        call, response = self.call, self.pending.response
        assert response is not None
        refusal = self.refusal()
        if refusal is not None:
            return refusal
        assert isinstance(response, wire.Response)
        answer = response.result or {}
        if call.result is None:
            return answer
        try:
            return result_from_wire(call.result, answer)
        except KeyError as error:
            raise ProtocolError(f"the answer to {call.name} has no {error}") from None
        except (TypeError, AttributeError) as error:
            raise ProtocolError(f"the answer to {call.name} has a field of another type: {error}") from None


def pending_calls(requests: Iterable[Any]) -> list[PendingCall]:
    """Return the calls for request tuples, and for pairs of an operation's name and its parameters by the API's names.

    Raises TypeError for anything else.
    """
    return [PendingCall.of(_to_call(request)) for request in requests]


def _to_call(request: Any) -> Call:
    operation = OPERATIONS.get(type(request).__name__)
    if operation is not None and isinstance(request, operation.request):
        return Call.of(operation, request)
    if isinstance(request, tuple) and len(request) == 2:
        name, params = request
        if isinstance(name, str) and isinstance(params, Mapping):
            return Call(name, dict(params))
    raise TypeError(
        f"expected a request of keyferry.operations, or a name and parameters, not {type(request).__name__}"
    )


def count_answered(calls: Iterable[PendingCall]) -> int:
    """Return the number of calls that are answered."""
    return sum(response.response is not None for _, response in calls)


class Chunk(NamedTuple):
    """Requests to send with one write, and their encoded bytes."""

    data: bytearray
    requests: list[PendingResponse]


class RpcSession:
    """The requests and answers of one connection. Answers may come in any order."""

    def __init__(self) -> None:
        self._decoder = wire.Decoder(max_array=MAX_PAGE)
        self._msgid = 0
        self._unanswered: dict[int, PendingResponse] = {}

    def encode(self, call: PendingCall) -> bytes:
        """Return the bytes of a request; for a request that breaks the protocol, return no bytes and store its refusal.

        If such a request were sent, the agent would close the connection, and the other calls on it would fail.
        """
        (name, params, _), response = call
        self._msgid = response.msgid = (self._msgid + 1) & wire.MAX_MSGID
        try:
            wire.check_sendable(params)
            request = wire.encode_request(response.msgid, name, params)
        except (ProtocolError, ValueError, OverflowError) as error:
            response.response = kms_error("InvalidParameter", f"The request was not sent: {error}.")
            return b""
        self._unanswered[response.msgid] = response
        return request

    def chunks(self, calls: Iterable[PendingCall]) -> Iterator[Chunk]:
        """Yield the requests that are not answered yet, in chunks."""
        chunk = Chunk(bytearray(), [])
        for call in calls:
            if call.pending.response is not None:
                continue
            request = self.encode(call)
            if chunk.data and len(chunk.data) + len(request) > _MAX_CHUNK_BYTES:
                yield chunk
                chunk = Chunk(bytearray(), [])
            chunk.data.extend(request)
            chunk.requests.append(call.pending)
        if chunk.requests:
            yield chunk

    def withdraw(self, chunk: Chunk) -> None:
        """Remove requests that were encoded, but not sent."""
        for response in chunk.requests:
            self._unanswered.pop(response.msgid, None)

    def receive(self, data: bytes) -> list[PendingResponse]:
        """Decode received bytes and return the requests that they answer.

        Raises `ProtocolError`, or `KmsError` when the agent refuses the whole connection. After either, the connection cannot
        be used again.
        """
        self._decoder.feed(data)
        answers = []
        for message in self._decoder.messages():
            if not isinstance(message, wire.Response):
                raise ProtocolError("the agent sent a message that is not a response")
            if message.msgid is None:  # the agent refused the connection, or could not read a request; it hangs up
                error = message.error or {}
                if error.get("Code") == "ProtocolError":
                    raise ProtocolError(f"the agent could not read the request: {error.get('Message')}")
                raise _refusal(error)
            response = self._unanswered.pop(message.msgid, None)
            if response is None:
                raise ProtocolError(
                    f"the agent answered msgid {message.msgid}, which is not that of an unanswered request"
                )
            response.response = message
            answers.append(response)
        return answers


def _refusal(error: Mapping[str, Any]) -> KmsError:
    code, message, status = error.get("Code"), error.get("Message"), error.get("HttpStatus")
    if not isinstance(code, str) or not isinstance(message, str):
        raise ProtocolError("the agent sent an error without a Code or a Message")
    request_id = str(error.get("RequestId", ""))
    return kms_error(code, message=message, request_id=request_id, http_status=status if isinstance(status, int) else 0)
