"""The dispatcher, which turns messages into answers: it decides requests, runs their jobs, audits them and encodes results.

It is synchronous, and uses neither sockets nor trio.
"""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import structlog

from keyferry.declaration import result_to_wire
from keyferry.errors import KmsError, ProtocolError, kms_error
from keyferry.operations import GetAgentHealthResult, GetAgentStatusResult
from keyferry.protocol import wire

from .. import handlers
from ..audit import Appended
from ..audit.entry import AuditEntry
from ..authz.caller import Caller
from ..authz.decision_cache import DecisionCache
from ..authz.grants import CallerGrants
from ..peer import Peer
from ..state import ServerState
from ..telemetry.metrics import Metrics
from .rate_limit import Rate

__all__ = [
    "MAX_OFFLOADED",
    "Batch",
    "CompletedRequest",
    "Dispatcher",
    "Exchange",
    "Message",
    "OffloadedJob",
    "ServerContext",
    "closing",
    "refusal",
]

MAX_OFFLOADED: Final = 16
"""Offloaded jobs of one connection in flight: four for each thread, so that a thread never waits for the connection."""
_MAX_BATCH_MESSAGES: Final = 256
"""Messages of a batch, including notifications, which take time although they get no answer."""
_MAX_OPERATION_NAME_LENGTH: Final = 64
"""Characters of an operation's name in an audit entry. A client may send any text as the name."""
_REQUEST_ID_BATCH: Final = 64
_UNRECORDED: Final = GetAgentHealthResult
"""The result that has no audit entry: probes request it every few seconds, and it contains nothing about keys or callers."""
_ALWAYS_ANSWERED: Final = GetAgentStatusResult
"""The result that is sent even if its audit entry cannot be written: it contains the reason why all others are refused."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class Record(Protocol):
    """The audit log, as far as the dispatcher uses it. A request is audited before it is answered."""

    def record(self, requests: Sequence[tuple[Peer, AuditEntry, str]]) -> Appended: ...


@dataclass
class ServerContext:
    """The agent's state and the services that the dispatcher needs to answer requests."""

    agent: ServerState
    audit: Record
    rate: Rate
    notifications: Rate
    """The same object as `rate` if requests have a limit: then a notification counts as a request."""
    metrics: Metrics | None = None


class CompletedRequest(NamedTuple):
    """A request with its outcome: a result, or an error."""

    msgid: int
    audited: AuditEntry
    outcome: Any


class Decision(NamedTuple):
    """A cached decision about a request: its job, its audit fields, and the grants and generation for which it holds."""

    job: handlers.Job
    audited: AuditEntry
    granted: CallerGrants
    generation: int


class Message(NamedTuple):
    """A request as it was received: parsed, or with the decision about an equal request."""

    msgid: int
    packed: wire.PackedRequest | None
    request: wire.Request | wire.InvalidRequest | None
    decision: Decision | None = None

    def parse(self) -> wire.Request | wire.InvalidRequest:
        """Return the parsed request. Does not raise: a message with a decision equals one that was parsed before."""
        if self.request is not None:
            return self.request
        assert self.packed is not None
        return self.packed.parse()


class OffloadedJob(NamedTuple):
    """A decided request whose job runs in a thread. Its message is kept so that it can be decided again."""

    job: handlers.Job
    msgid: int
    audited: AuditEntry
    message: Message
    granted: CallerGrants
    generation: int


@dataclass(slots=True)
class Exchange:
    """The requests of one connection, from received messages to encoded answers."""

    caller: Caller
    pending: deque[Message] = field(default_factory=deque)
    """Requests to decide."""
    offloaded: list[OffloadedJob] = field(default_factory=list)
    """Jobs to submit to the thread pool."""
    finished: list[tuple[OffloadedJob, Any]] = field(default_factory=list)
    """Jobs that a thread has finished, with their outcomes."""
    in_flight: int = 0
    """Offloaded jobs in flight: their answers are not in `answers` yet."""
    completed: list[CompletedRequest] = field(default_factory=list)
    answers: bytes = b""
    """Encoded answers to send. Their requests are audited."""
    failure: Exception | None = None
    """An internal error of the agent. No further request of this connection is answered."""


class Batch(NamedTuple):
    """The number of messages taken from a connection for one round, and the protocol error after them, if any."""

    error: ProtocolError | None
    messages: int
    notifications: int
    last: bool
    """Whether all received messages were taken."""


class Dispatcher:
    """Answers the requests of all connections, one round at a time."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._agent = context.agent
        self._decisions: DecisionCache[Decision] = DecisionCache()
        self._agent.on_adopt.append(self._decisions.clear)  # decisions refer to keys of the old keyring

    def take(
        self, exchange: Exchange, messages: Iterator[wire.PackedRequest | wire.Message], max_requests: int
    ) -> Batch:
        """Move a connection's next messages into its exchange, with `most` requests at most.

        Looks up the decision about each request, and parses the requests without one. A protocol error is returned, not raised.
        """
        caller, count, notifications = exchange.caller, 0, 0
        caller.refresh(self._agent.policy)
        try:
            for message in messages:
                count += 1
                if isinstance(message, wire.PackedRequest):
                    decision = self._recall(caller, message.body)
                    request = message.parse() if decision is None else None
                    exchange.pending.append(Message(message.msgid, message, request, decision))
                elif isinstance(message, wire.Notification):
                    notifications += 1
                elif isinstance(message, wire.Response):
                    raise ProtocolError("a response, where a request is expected")
                else:
                    exchange.pending.append(Message(message.msgid, None, message))
                if len(exchange.pending) >= max_requests or count == _MAX_BATCH_MESSAGES:
                    return Batch(None, count, notifications, last=False)
        except ProtocolError as error:
            return Batch(error, count, notifications, last=True)
        return Batch(None, count, notifications, last=True)

    def take_recalled(self, exchange: Exchange, decoder: wire.Decoder) -> bool:
        """Take a decoder's only message if it is a request with a cached decision, which is the usual case.

        Return False, and take nothing, if it is not.
        """
        packed = decoder.peek()
        if packed is None:
            return False
        exchange.caller.refresh(self._agent.policy)
        decision = self._recall(exchange.caller, packed.body)
        if decision is None:
            return False
        decoder.skip()
        exchange.pending.append(Message(packed.msgid, packed, None, decision))
        return True

    def notified(self, caller: Caller, count: int) -> bool:
        """Count notifications. Return False if the caller has exceeded its rate."""
        self._agent.counters.notifications_total += count
        if self._context.metrics is not None:
            self._context.metrics.notified(count)
        return self._context.notifications.allows(caller.user, time.monotonic(), count)

    def run(self, exchanges: Sequence[Exchange]) -> None:
        """Decide the requests of these connections and run their jobs. Write all audit entries at once, then encode answers."""
        for exchange in exchanges:
            try:
                self._complete(exchange)
            except Exception as error:  # an error in one connection must not affect others
                exchange.failure = error
                exchange.completed.clear()
        self._answer([exchange for exchange in exchanges if exchange.completed])

    def _complete(self, exchange: Exchange) -> None:
        """Complete requests. A request whose job has finished, but whose decision no longer holds, is decided again first."""
        caller, completed = exchange.caller, exchange.completed
        finished, exchange.finished = exchange.finished, []
        for job, outcome in finished:
            exchange.in_flight -= 1
            if self._holds(caller, job):
                completed.append(CompletedRequest(job.msgid, job.audited, outcome))
                continue
            audited = AuditEntry(job.audited.request_id, job.audited.started, job.audited.operation)
            self._decide(exchange, job.message, audited)  # not `_begin`: its rate counts a request once
        while exchange.pending and exchange.in_flight < MAX_OFFLOADED:
            self._begin(exchange, exchange.pending.popleft())

    def _recall(self, caller: Caller, body: bytes) -> Decision | None:
        """Return the cached decision about an equal request from a caller with the same grants, if it still holds."""
        decision = self._decisions.get(caller.granted, body)
        return decision if decision is not None and self._holds(caller, decision) else None

    def _holds(self, caller: Caller, decided: Decision | OffloadedJob) -> bool:
        """Return whether a decision still holds: same policy and keyring, same evidence about the caller, same key state."""
        agent = self._agent
        caller.refresh(agent.policy)
        if decided.generation != agent.generation or decided.granted is not caller.granted:
            return False
        return decided.job.holds is None or decided.job.holds()

    def _begin(self, exchange: Exchange, message: Message) -> None:
        request_id, started = new_request_id(), time.monotonic()
        if message.decision is not None:
            operation = message.decision.audited.operation
        else:
            operation = ascii(message.parse().method[:_MAX_OPERATION_NAME_LENGTH])[1:-1]
        audited = AuditEntry(request_id, started, operation)
        if not self._context.rate.allows(exchange.caller.user, started):
            exchange.completed.append(CompletedRequest(message.msgid, audited, kms_error("Rejected.Throttling")))
            return
        self._decide(exchange, message, audited)

    def _decide(self, exchange: Exchange, message: Message, audited: AuditEntry) -> None:
        """Decide one request, and run its job here or leave it to a thread."""
        caller, decision = exchange.caller, message.decision
        try:
            if decision is not None and self._holds(caller, decision):
                audited = decision.audited.again(audited.request_id, audited.started)
                job = decision.job
            else:
                job = self._prepare(caller, message, audited)
            if job.offload:
                exchange.in_flight += 1
                exchange.offloaded.append(
                    OffloadedJob(job, message.msgid, audited, message, caller.granted, self._agent.generation)
                )
                return
            outcome = job.run()
        except Exception as error:
            outcome = refusal(error, audited)
        exchange.completed.append(CompletedRequest(message.msgid, audited, outcome))

    def _prepare(self, caller: Caller, message: Message, audited: AuditEntry) -> handlers.Job:
        agent, request = self._agent, message.parse()
        if isinstance(request, wire.InvalidRequest):
            raise kms_error("InvalidParameter", f"{request.why}.")
        caller.refresh(agent.policy)
        job = handlers.prepare(agent, caller, request.method, request.params, audited)
        if job.repeatable and message.packed is not None:
            decision = Decision(job, audited, caller.granted, agent.generation)
            self._decisions.add(caller.granted, message.packed.body, decision)
        return job

    def _answer(self, exchanges: Sequence[Exchange]) -> None:
        """Write the audit entries of completed requests, and only then encode their answers."""
        if not exchanges:
            return
        outcomes = [
            (exchange.caller.peer, audited, _outcome(audited, outcome))
            for exchange in exchanges
            for _, audited, outcome in exchange.completed
            if type(outcome) is not _UNRECORDED
        ]
        recorded, failure = self._context.audit.record(outcomes) if outcomes else Appended(0)
        if self._context.metrics is not None:
            now = time.monotonic()
            for exchange in exchanges:
                for _, audited, outcome in exchange.completed:
                    code = outcome.code if isinstance(outcome, KmsError) else "OK"
                    self._context.metrics.observe(audited.operation, code, now - audited.started)
        missing: set[str] = set()
        if failure is not None:
            ids = [audited.request_id for _, audited, _ in outcomes[recorded:]]
            log.error("audit.failed", error=failure.strerror, request_ids=ids)
            if self._agent.settings.audit.on_failure == "refuse":
                missing = set(ids)
        for exchange in exchanges:
            answers = bytearray()
            for msgid, audited, outcome in exchange.completed:
                if missing and audited.request_id in missing and type(outcome) is not _ALWAYS_ANSWERED:
                    unrecorded = kms_error("ServiceUnavailableTemporary", "The audit record could not be written.")
                    answers += self._packed(msgid, audited, unrecorded)
                else:
                    answers += self._packed(msgid, audited, outcome)
            exchange.completed.clear()
            exchange.answers = bytes(answers)

    def _packed(self, msgid: int, audited: AuditEntry, outcome: Any) -> bytes:
        counters = self._agent.counters
        counters.requests_total += 1
        error = outcome if isinstance(outcome, KmsError) else None
        if error is None:
            try:
                result = result_to_wire(outcome)
                result["RequestId"] = audited.request_id
                return wire.encode_response(msgid, None, result)
            except Exception as failure:  # every result of a handler should be encodable
                error = refusal(RuntimeError(f"the answer cannot be sent: {type(failure).__name__}"), audited)
        counters.requests_refused += 1
        return wire.encode_response(
            msgid, _error(error.code, error.message, audited.request_id, error.http_status), None
        )


def _outcome(audited: AuditEntry, outcome: Any) -> str:
    """Return the outcome's text for the audit entry, and note the hash of its CiphertextBlob in the entry."""
    if isinstance(outcome, KmsError):
        return outcome.code
    audited.note(outcome)
    return "OK"


def _request_ids() -> Iterator[str]:
    while True:
        digits = os.urandom(16 * _REQUEST_ID_BATCH).hex().upper()
        for at in range(0, len(digits), 32):
            part = digits[at : at + 32]
            variant = "89AB"[int(part[16], 16) & 3]
            yield f"{part[:8]}-{part[8:12]}-4{part[13:16]}-{variant}{part[17:20]}-{part[20:]}"


new_request_id: Final = _request_ids().__next__
"""A fresh RequestId: a random UUID (RFC 9562, version 4) in the cloud's upper-case form.

uuid4() and its conversion to text take eight times as long. That matters because every request needs an ID.
"""


def refusal(error: Exception, audited: AuditEntry) -> KmsError:
    """Return the error to answer instead of a result. Logs an internal error.

    The error is a new exception. A raised exception refers to every frame that it passed through, and so to a plaintext or to
    a replaced keyring. If one of these frames refers to it in turn, they live until the next garbage collection.
    """
    if isinstance(error, KmsError):
        return kms_error(error.code, message=error.message, http_status=error.http_status)
    log.error("request.failed", request_id=audited.request_id, operation=audited.operation, exc_info=error)
    return kms_error("InternalFailure")


def _error(code: str, message: str, request_id: str, http_status: int) -> dict[str, Any]:
    return {"Code": code, "Message": message, "RequestId": request_id, "HttpStatus": http_status}


def closing(code: str, message: str, http_status: int) -> bytes:
    """Return the last message on a connection: an error without a message ID, which answers no single request."""
    return wire.encode_response(None, _error(code, message, new_request_id(), http_status), None)
