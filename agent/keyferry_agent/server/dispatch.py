"""From messages to answers: decided, done, recorded, packed. Synchronous; knows no sockets and no trio."""

import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import structlog

from keyferry.declaration import result_to_wire
from keyferry.errors import KmsError, ProtocolError, kms_error
from keyferry.operations import GetAgentHealthResult, GetAgentStatusResult
from keyferry.protocol import wire

from .. import handlers
from ..audit import Appended
from ..audit.entry import AuditEntry
from ..authz.caller import Caller
from ..authz.grants import CallerGrants
from ..peer import Peer
from ..state import MAX_BATCH, ServerState
from ..telemetry.metrics import Metrics
from .rate_limit import Rate

__all__ = [
    "Batch",
    "CompletedRequest",
    "Dispatcher",
    "Message",
    "OffloadedJob",
    "ServerContext",
    "StartedRequest",
    "closing",
    "read_batch",
    "refusal",
]

_LOOKED_AT: Final = 256
"""Messages of a turn, notifications included: they get no answer, but take time all the same."""
_LONGEST_NAME: Final = 64
"""Characters of an operation's name to record: what a client calls an operation may be anything."""
_IDS_AT_ONCE: Final = 64
_UNRECORDED: Final = GetAgentHealthResult
"""The result that has no audit entry: a probe asks for it every few seconds, and it holds nothing of keys or callers."""
_ALWAYS_ANSWERED: Final = GetAgentStatusResult
"""The result that is sent although its audit entry cannot be written: it has the reason why all others are refused."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class Record(Protocol):
    """What requests are recorded in before they are answered."""

    def record(self, peer: Peer, requests: Sequence[tuple[AuditEntry, str]]) -> Appended: ...


@dataclass
class ServerContext:
    """What requests are answered with."""

    agent: ServerState
    audit: Record
    rate: Rate
    notifications: Rate
    """Requests' own rate where that has a limit: then a notification counts as a request."""
    metrics: Metrics | None = None


class CompletedRequest(NamedTuple):
    """A request whose outcome is known: a result, or the error that it ended in."""

    msgid: int
    audited: AuditEntry
    outcome: Any


Message: TypeAlias = wire.Request | wire.CachedRequest | wire.InvalidRequest


class _Remembered(NamedTuple):
    """What was decided of a request that may come again, for whom and when, and what is recorded of it."""

    job: handlers.Job
    audited: AuditEntry
    granted: CallerGrants
    generation: int


class StartedRequest(NamedTuple):
    """A request of which the first step is done."""

    msgid: int
    audited: AuditEntry
    rest: Generator[None, None, Any]


class OffloadedJob(NamedTuple):
    """A request that was decided, and is done in a thread. It may be decided anew from its message."""

    job: handlers.Job
    msgid: int
    audited: AuditEntry
    message: wire.Request | wire.CachedRequest
    granted: CallerGrants
    generation: int


class Dispatcher:
    """Answers one caller's requests."""

    def __init__(self, service: ServerContext, caller: Caller) -> None:
        self._service = service
        self._agent = service.agent
        self._caller = caller

    def recall(self, request: bytes) -> "_Remembered | None":
        """What was decided of an equal request of such a caller, if it still holds."""
        self._caller.refresh(self._agent.policy)
        known: _Remembered | None = self._agent.decision_cache.recall(self._caller.granted, request)
        return known if known is not None and self.holds(known) else None

    def holds(self, decided: "_Remembered | OffloadedJob") -> bool:
        """Whether nothing has changed since this was decided: policy, keyring, evidence about the caller, the key's state."""
        agent = self._agent
        self._caller.refresh(agent.policy)
        if decided.generation != agent.generation or decided.granted is not self._caller.granted:
            return False
        return decided.job.holds is None or decided.job.holds()

    def notified(self, count: int) -> bool:
        """Count notifications; False when the caller has sent more than it may."""
        self._agent.counters.notifications_total += count
        if self._service.metrics is not None:
            self._service.metrics.notified(count)
        return self._service.notifications.allows(self._caller.peer.uid, time.monotonic(), count)

    def decide(self, message: Message) -> "CompletedRequest | StartedRequest | OffloadedJob":
        """The outcome of one request, or what will give it: the second step of it, or a slow job."""
        msgid, request_id, started = message.msgid, new_request_id(), time.monotonic()
        if isinstance(message, wire.CachedRequest):
            operation = message.what.audited.operation
        else:
            operation = ascii(message.method[:_LONGEST_NAME])[1:-1]
        audited = AuditEntry(request_id, started, operation)
        if not self._service.rate.allows(self._caller.peer.uid, started):
            return CompletedRequest(msgid, audited, kms_error("Rejected.Throttling"))
        if isinstance(message, wire.InvalidRequest):
            return CompletedRequest(msgid, audited, kms_error("InvalidParameter", f"{message.why}."))
        return self._decide(message, audited)

    def decide_anew(self, slow: OffloadedJob) -> "CompletedRequest | StartedRequest | OffloadedJob":
        """Decide a request again whose decision does not hold any more: the same request, which counts once."""
        audited = slow.audited
        return self._decide(slow.message, AuditEntry(audited.request_id, audited.started, audited.operation))

    def _decide(
        self, message: wire.Request | wire.CachedRequest, audited: AuditEntry
    ) -> "CompletedRequest | StartedRequest | OffloadedJob":
        msgid = message.msgid
        try:
            if isinstance(message, wire.CachedRequest) and self.holds(message.what):
                audited = message.what.audited.again(audited.request_id, audited.started)
                job = message.what.job
            else:
                request = message.parsed() if isinstance(message, wire.CachedRequest) else message
                job = self._prepare(request, audited)
            if job.slow:
                return OffloadedJob(job, msgid, audited, message, self._caller.granted, self._agent.generation)
            if job.begin is not None:
                begun = job.begin()
                next(begun)
                return StartedRequest(msgid, audited, begun)
            return CompletedRequest(msgid, audited, job.run())
        except Exception as error:
            return CompletedRequest(msgid, audited, refusal(error, audited))

    def _prepare(self, request: wire.Request, audited: AuditEntry) -> handlers.Job:
        agent, caller = self._agent, self._caller
        caller.refresh(agent.policy)
        job = handlers.prepare(agent, caller, request.method, request.params, audited)
        if job.repeatable and request.tail:
            remembered = _Remembered(job, audited, caller.granted, agent.generation)
            agent.decision_cache.remember(caller.granted, request.tail, remembered)
        return job

    def answers(self, done: Sequence[CompletedRequest | StartedRequest]) -> bytes:
        """Write the record of requests, and only then make their answers."""
        if not done:
            return b""
        decided = [each if isinstance(each, CompletedRequest) else _ended(each) for each in done]
        outcomes = [
            (audited, _outcome(audited, outcome)) for _, audited, outcome in decided if type(outcome) is not _UNRECORDED
        ]
        recorded, failure = self._service.audit.record(self._caller.peer, outcomes) if outcomes else Appended(0)
        if self._service.metrics is not None:
            now = time.monotonic()
            for _, audited, outcome in decided:
                code = outcome.code if isinstance(outcome, KmsError) else "OK"
                self._service.metrics.observe(audited.operation, code, now - audited.started)
        missing: list[str] = []
        if failure is not None:
            missing = [audited.request_id for audited, _ in outcomes[recorded:]]
            log.error("audit.failed", error=failure.strerror, request_ids=missing)
        must = self._agent.settings.audit.on_failure == "refuse"
        answers = bytearray()
        for msgid, audited, outcome in decided:
            if missing and must and audited.request_id in missing and type(outcome) is not _ALWAYS_ANSWERED:
                unrecorded = kms_error("ServiceUnavailableTemporary", "The audit record could not be written.")
                answers += self._answer(msgid, audited, unrecorded)
            else:
                answers += self._answer(msgid, audited, outcome)
        return bytes(answers)

    def _answer(self, msgid: int, audited: AuditEntry, outcome: Any) -> bytes:
        counters = self._agent.counters
        counters.requests_total += 1
        error = outcome if isinstance(outcome, KmsError) else None
        if error is None:
            try:
                result = result_to_wire(outcome)
                result["RequestId"] = audited.request_id
                return wire.encode_response(msgid, None, result)
            except Exception as failure:  # nothing that a handler gives should be unsendable
                error = refusal(RuntimeError(f"the answer cannot be sent: {type(failure).__name__}"), audited)
        counters.requests_refused += 1
        return wire.encode_response(
            msgid, _error(error.code, error.message, audited.request_id, error.http_status), None
        )


def _outcome(audited: AuditEntry, outcome: Any) -> str:
    """Return an outcome as the audit entry has it, and note what else the entry has of it."""
    if isinstance(outcome, KmsError):
        return outcome.code
    audited.note(outcome)
    return "OK"


def _ended(begun: StartedRequest) -> CompletedRequest:
    msgid, audited, rest = begun
    try:
        return CompletedRequest(msgid, audited, handlers.run_to_completion(rest))
    except Exception as error:
        return CompletedRequest(msgid, audited, refusal(error, audited))


class Batch(NamedTuple):
    """The next requests to answer in one go, what is wrong behind them, and how many messages that took."""

    asked: list[Message]
    error: ProtocolError | None
    looked_at: int
    notifications: int
    last: bool
    """Whether there was no other message behind these."""


def read_batch(messages: Iterator[wire.Message], most: int = MAX_BATCH) -> Batch:
    """Parse a turn's requests together, at most so many: one's code is the next one's."""
    asked: list[Message] = []
    looked_at = notifications = 0
    try:
        for message in messages:
            looked_at += 1
            if isinstance(message, wire.Response):
                raise ProtocolError("a response, where a request is expected")
            if isinstance(message, wire.Notification):
                notifications += 1
            else:
                asked.append(message)
            if len(asked) == most or looked_at == _LOOKED_AT:
                return Batch(asked, None, looked_at, notifications, last=False)
    except ProtocolError as error:
        return Batch(asked, error, looked_at, notifications, last=True)
    return Batch(asked, None, looked_at, notifications, last=True)


def _request_ids() -> Iterator[str]:
    while True:
        digits = os.urandom(16 * _IDS_AT_ONCE).hex().upper()
        for at in range(0, len(digits), 32):
            each = digits[at : at + 32]
            variant = "89AB"[int(each[16], 16) & 3]
            yield f"{each[:8]}-{each[8:12]}-4{each[13:16]}-{variant}{each[17:20]}-{each[20:]}"


new_request_id: Final = _request_ids().__next__
"""A fresh RequestId: a random UUID (RFC 9562, version 4) in the cloud's upper-case form.

uuid4() and its text take eight times as long, which counts where every request has one.
"""


def refusal(error: Exception, audited: AuditEntry) -> KmsError:
    """What to answer instead of a result.

    A fresh exception: the one that was raised holds on to every frame it came through, and with them to a plaintext, or to a
    keyring that was replaced. Kept in one of these frames itself, it would do so until the next garbage collection.
    """
    if isinstance(error, KmsError):
        return kms_error(error.code, message=error.message, http_status=error.http_status)
    log.error("request.failed", request_id=audited.request_id, operation=audited.operation, exc_info=error)
    return kms_error("InternalFailure")


def _error(code: str, message: str, request_id: str, http_status: int) -> dict[str, Any]:
    return {"Code": code, "Message": message, "RequestId": request_id, "HttpStatus": http_status}


def closing(code: str, message: str, http_status: int) -> bytes:
    """The last message on a connection, which answers none in particular."""
    return wire.encode_response(None, _error(code, message, new_request_id(), http_status), None)
