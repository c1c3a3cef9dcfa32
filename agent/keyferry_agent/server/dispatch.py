"""The dispatcher, which turns messages into answers: it decides requests, runs their jobs, audits them and encodes results.

It is synchronous, and uses neither sockets nor trio.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import structlog

from keyferry.declaration import result_to_wire
from keyferry.errors import KmsError, ProtocolError, kms_error
from keyferry.operations import GetAgentHealthResult, GetAgentStatusResult
from keyferry.protocol import wire

from .. import handlers
from ..audit import Appended
from ..audit.entry import AuditedRequest, AuditEntry, blob_hash
from ..authz.caller import Caller
from ..authz.decision_cache import DecisionCache
from ..authz.grants import CallerGrants
from ..peer import Peer
from ..state import ServerState
from ..telemetry.metrics import Metrics
from .rate_limit import Rate
from .refusals import error_fields, refusal
from .request_id import new_request_id

__all__ = [
    "MAX_OFFLOADED",
    "Batch",
    "CompletedRequest",
    "Dispatcher",
    "Encode",
    "Exchange",
    "Message",
    "OffloadedJob",
    "ServerContext",
]

MAX_OFFLOADED: Final = 16
"""Offloaded jobs of one connection in flight: four for each thread, so that a thread never waits for the connection."""
_MAX_BATCH_MESSAGES: Final = 256
"""Messages of a batch, including notifications, which take time although they get no answer."""
_UNRECORDED: Final = GetAgentHealthResult
"""The result that has no audit entry: probes request it every few seconds, and it contains nothing about keys or callers."""
_ALWAYS_ANSWERED: Final = GetAgentStatusResult
"""The result that is sent even if its audit entry cannot be written: it contains the reason why all others are refused."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class Record(Protocol):
    """The audit log, as far as the dispatcher uses it. A request is audited before it is answered."""

    def record(self, requests: Sequence[AuditedRequest]) -> Appended: ...


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
    request_id: str
    started: float
    entry: AuditEntry
    outcome: Any


class Decision(NamedTuple):
    """A cached decision about a request: its job, its audit entry, and the grants and generation for which it holds."""

    job: handlers.Job
    entry: AuditEntry
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

    def entry(self) -> AuditEntry:
        """Return the audit entry of a request that no handler decides. It contains the operation only."""
        return AuditEntry.of_method(self.parse().method)


class OffloadedJob(NamedTuple):
    """A decided request whose job runs in a thread. Its message is kept so that it can be decided again."""

    job: handlers.Job
    msgid: int
    request_id: str
    started: float
    entry: AuditEntry
    message: Message
    granted: CallerGrants
    generation: int


Encode: TypeAlias = Callable[[int, dict[str, Any] | None, dict[str, Any] | None], bytes]


@dataclass(slots=True)
class Exchange:
    """The requests of one connection, from received messages to encoded answers."""

    caller: Caller
    encode: Encode = wire.encode_response
    """Encodes one answer, from its message ID, its error and its result."""
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
        """Move a connection's next messages into its exchange, with `max_requests` requests at most.

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
        request = decoder.peek()
        if request is None:
            return False
        exchange.caller.refresh(self._agent.policy)
        decision = self._recall(exchange.caller, request.body)
        if decision is None:
            return False
        decoder.skip()
        exchange.pending.append(Message(request.msgid, request, None, decision))
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

    def refuse(
        self, exchange: Exchange, error: KmsError, entry: AuditEntry, *, recorded: bool = True, limited: bool = False
    ) -> None:
        """Answer a request that no handler decides with an error. `recorded`: whether it has an audit entry.

        `limited`: whether the request counts for the caller's rate, whose error then comes first.
        """
        request_id, started = new_request_id(), time.monotonic()
        if limited and not self._context.rate.allows(exchange.caller.user, started):
            error = kms_error("Rejected.Throttling")
        request = CompletedRequest(0, request_id, started, entry, refusal(error, request_id, entry))
        if recorded:
            exchange.completed.append(request)
            self._answer([exchange])
        else:
            self._observe(request)
            exchange.answers = self._packed(request, exchange.encode)

    def _complete(self, exchange: Exchange) -> None:
        """Complete requests. A request whose job has finished, but whose decision no longer holds, is decided again first."""
        jobs, exchange.finished = exchange.finished, []
        for job, outcome in jobs:
            exchange.in_flight -= 1
            if self._holds(exchange.caller, job):
                request = CompletedRequest(job.msgid, job.request_id, job.started, job.entry, outcome)
                exchange.completed.append(request)
            else:  # not `_begin`: its rate counts a request once
                self._decide(exchange, job.message, job.request_id, job.started)
        while exchange.pending and exchange.in_flight < MAX_OFFLOADED:
            self._begin(exchange, exchange.pending.popleft())

    def _recall(self, caller: Caller, body: bytes) -> Decision | None:
        """Return the cached decision about an equal request from a caller with the same grants, if it still holds."""
        decision = self._decisions.get(caller.granted, body)
        return decision if decision is not None and self._holds(caller, decision) else None

    def _holds(self, caller: Caller, decision: Decision | OffloadedJob) -> bool:
        """Return whether a decision still holds: same policy and keyring, same evidence about the caller, same key state."""
        agent = self._agent
        caller.refresh(agent.policy)
        if decision.generation != agent.generation or decision.granted is not caller.granted:
            return False
        return decision.job.holds is None or decision.job.holds()

    def _begin(self, exchange: Exchange, message: Message) -> None:
        request_id, started = new_request_id(), time.monotonic()
        if self._context.rate.allows(exchange.caller.user, started):
            self._decide(exchange, message, request_id, started)
        else:
            error, entry = kms_error("Rejected.Throttling"), message.entry()
            exchange.completed.append(CompletedRequest(message.msgid, request_id, started, entry, error))

    def _decide(self, exchange: Exchange, message: Message, request_id: str, started: float) -> None:
        """Decide one request, and run its job here or leave it to a thread."""
        caller, decision = exchange.caller, message.decision
        outcome: Any
        entry: AuditEntry | None = None
        try:
            if decision is not None and self._holds(caller, decision):
                outcome, entry = decision.job, decision.entry
            else:
                outcome, entry = self._prepare(caller, message)
                self._remember(caller, message, outcome, entry)
            if isinstance(outcome, Exception):
                outcome = refusal(outcome, request_id, entry)
            elif outcome.offload:
                granted, generation = caller.granted, self._agent.generation
                job = OffloadedJob(outcome, message.msgid, request_id, started, entry, message, granted, generation)
                exchange.in_flight += 1
                exchange.offloaded.append(job)
                return
            else:
                outcome = outcome.run()
        except Exception as error:
            entry = entry or message.entry()
            outcome = refusal(error, request_id, entry)
        exchange.completed.append(CompletedRequest(message.msgid, request_id, started, entry, outcome))

    def _prepare(self, caller: Caller, message: Message) -> handlers.PreparedRequest:
        request = message.parse()
        if isinstance(request, wire.InvalidRequest):
            return handlers.PreparedRequest(kms_error("InvalidParameter", f"{request.why}."), message.entry())
        caller.refresh(self._agent.policy)
        return handlers.prepare(self._agent, caller, request.method, request.params)

    def _remember(self, caller: Caller, message: Message, outcome: Any, entry: AuditEntry) -> None:
        """Cache the decision about a request, if its job can answer equal requests."""
        if isinstance(outcome, handlers.Job) and outcome.repeatable and message.packed is not None:
            decision = Decision(outcome, entry, caller.granted, self._agent.generation)
            self._decisions.add(caller.granted, message.packed.body, decision)

    def _answer(self, exchanges: Sequence[Exchange]) -> None:
        """Write the audit entries of completed requests, and only then encode their answers."""
        if not exchanges:
            return
        requests = [
            _audited(exchange.caller.peer, request)
            for exchange in exchanges
            for request in exchange.completed
            if type(request.outcome) is not _UNRECORDED
        ]
        entries, failure = self._context.audit.record(requests) if requests else Appended(0)
        if self._context.metrics is not None:
            for exchange in exchanges:
                for request in exchange.completed:
                    self._observe(request)
        refused_ids: set[str] = set()
        if failure is not None:
            ids = [request.request_id for request in requests[entries:]]
            log.error("audit.failed", error=failure.strerror, request_ids=ids)
            if self._agent.settings.audit.on_failure == "refuse":
                refused_ids = set(ids)
        for exchange in exchanges:
            answers = bytearray()
            for request in exchange.completed:
                if request.request_id in refused_ids and type(request.outcome) is not _ALWAYS_ANSWERED:
                    error = kms_error("ServiceUnavailableTemporary", "The audit record could not be written.")
                    answers += self._packed(request._replace(outcome=error), exchange.encode)
                else:
                    answers += self._packed(request, exchange.encode)
            exchange.completed.clear()
            exchange.answers = bytes(answers)

    def _observe(self, request: CompletedRequest) -> None:
        if self._context.metrics is not None:
            code = request.outcome.code if isinstance(request.outcome, KmsError) else "OK"
            self._context.metrics.observe(request.entry.operation, code, time.monotonic() - request.started)

    def _packed(self, request: CompletedRequest, encode: Encode) -> bytes:
        msgid, request_id, _, entry, outcome = request
        counters = self._agent.counters
        counters.requests_total += 1
        error = outcome if isinstance(outcome, KmsError) else None
        if error is None:
            try:
                result = result_to_wire(outcome)
                result["RequestId"] = request_id
                return encode(msgid, None, result)
            except Exception as failure:  # every result of a handler should be encodable
                error = refusal(RuntimeError(f"the answer cannot be sent: {type(failure).__name__}"), request_id, entry)
        counters.requests_refused += 1
        return encode(msgid, error_fields(error.code, error.message, request_id, error.http_status), None)


def _audited(peer: Peer, request: CompletedRequest) -> AuditedRequest:
    """Return a completed request for the audit log, with the hash of the CiphertextBlob in its result."""
    _, request_id, started, entry, outcome = request
    if isinstance(outcome, KmsError):
        return AuditedRequest(peer, request_id, started, entry, outcome.code)
    return AuditedRequest(peer, request_id, started, entry, "OK", blob_hash(outcome))
