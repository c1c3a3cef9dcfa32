"""The dispatcher, without sockets: how many messages of a connection it takes, its audit entries, and its answers."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from support.inside import new_agent
from support.keys import recipient

from keyferry.protocol import wire
from keyferry_agent.audit import Appended
from keyferry_agent.audit.entry import AuditedRequest
from keyferry_agent.authz.caller import Caller
from keyferry_agent.authz.grants import Grant
from keyferry_agent.config.settings import Audit
from keyferry_agent.peer import Peer
from keyferry_agent.server.dispatch import MAX_OFFLOADED, Batch, Dispatcher, Exchange, ServerContext
from keyferry_agent.server.rate_limit import Rate
from keyferry_agent.server.request_id import new_request_id
from keyferry_agent.state import ServerState

STATUS, HEALTH, LIST = "GetAgentStatus", "GetAgentHealth", "ListKeys"
ID = re.compile(r"[0-9A-F]{8}-[0-9A-F]{4}-4[0-9A-F]{3}-[89AB][0-9A-F]{3}-[0-9A-F]{12}")
MAX_MESSAGES = 256


class Recorder:
    """An audit log in memory that fails after a number of entries."""

    def __init__(self) -> None:
        self.room: int | None = None
        self.entries: list[tuple[str, str]] = []

    def record(self, requests: Sequence[AuditedRequest]) -> Appended:
        """Keep entries; return how many, and the failure."""
        self.entries += [(request.entry.operation, request.outcome) for request in requests[: self.room]]
        if self.room is None or self.room >= len(requests):
            return Appended(len(requests))
        return Appended(self.room, OSError(28, "No space left on device"))


class Observed(NamedTuple):
    """One call of `Metrics.observe`."""

    operation: str
    code: str
    seconds: float


class Observer:
    """Metrics that keep what they are given."""

    def __init__(self) -> None:
        self.requests: list[Observed] = []
        self.notifications = 0

    def observe(self, operation: str, outcome: str, seconds: float) -> None:
        """Keep one request."""
        self.requests.append(Observed(operation, outcome, seconds))

    def notified(self, count: int) -> None:
        """Count notifications."""
        self.notifications += count


class Line:
    """One connection to a dispatcher: it takes messages, and returns answers."""

    def __init__(self, agent: ServerState) -> None:
        self.agent = agent
        self.audit, self.metrics = Recorder(), Observer()
        context: Any = ServerContext(agent, self.audit, Rate(0), Rate(0), self.metrics)  # type: ignore[arg-type]
        self.dispatcher = Dispatcher(context)
        self.exchange = Exchange(Caller(Peer(next(iter(agent.settings.grants)).to["uid"], frozenset(), 1, "default")))
        self.decoder = wire.Decoder()

    def take(self, *messages: bytes, most: int = 1_000) -> Batch:
        """Receive messages, and take a batch of what was received."""
        self.decoder.feed(b"".join(messages))
        return self.dispatcher.take(self.exchange, self.decoder.packed_messages(), most)

    def run(self) -> list[wire.Response]:
        """Run what was taken, and return the answers."""
        self.dispatcher.run([self.exchange])
        assert self.exchange.failure is None
        decoder = wire.Decoder()
        decoder.feed(self.exchange.answers)
        self.exchange.answers = b""
        answers = list(decoder.messages())
        assert all(isinstance(answer, wire.Response) for answer in answers)
        return answers  # type: ignore[return-value]

    def ask(self, *methods: str) -> list[str]:
        """Return the code of each answer, OK for a result."""
        self.take(*(request(method, number) for number, method in enumerate(methods)))
        answers = self.run()
        assert [answer.msgid for answer in answers] == list(range(len(methods)))
        return ["OK" if answer.error is None else answer.error["Code"] for answer in answers]


def request(method: str = STATUS, msgid: int = 0, **params: Any) -> bytes:
    """Return the bytes of a request."""
    return wire.encode_request(msgid, method, params)


NOTIFICATION = b"\x93\x02\xa1x\x90"


@pytest.fixture
def line() -> Line:
    """Return a connection to an agent that grants everything."""
    return Line(new_agent())


def test_batch_has_at_most_so_many_requests(line: Line) -> None:
    """A batch ends with its last permitted request; the next batch begins behind it."""
    batch = line.take(*(request(msgid=number) for number in range(5)), most=3)
    assert batch == Batch(None, 3, 0, last=False)
    assert [answer.msgid for answer in line.run()] == [0, 1, 2]
    assert line.take(most=3) == Batch(None, 2, 0, last=True)
    assert [answer.msgid for answer in line.run()] == [3, 4]


def test_batch_ends_after_256_messages(line: Line) -> None:
    """Notifications get no answer, but a batch counts them, so that they do not hold other connections up."""
    line.decoder.feed(NOTIFICATION * (MAX_MESSAGES + 1))
    assert line.take() == Batch(None, MAX_MESSAGES, MAX_MESSAGES, last=False)
    assert line.take() == Batch(None, 1, 1, last=True)


def test_batch_returns_a_protocol_error_after_its_requests(line: Line) -> None:
    """A message that is not a request ends the batch; requests before it are answered."""
    batch = line.take(request(), wire.encode_response(1, None, {}), request(msgid=2))
    assert batch.error is not None
    assert (batch.messages, batch.last) == (2, True)
    assert [answer.msgid for answer in line.run()] == [0]


def test_request_ids_are_random_uuids_in_upper_case() -> None:
    """A RequestId is a UUID of version 4 (RFC 9562): all four variants occur, and no ID occurs twice."""
    ids = [new_request_id() for _ in range(1_000)]
    assert all(ID.fullmatch(name) for name in ids)
    assert len(set(ids)) == len(ids)
    assert {name[19] for name in ids} == set("89AB")
    assert all(len({name[at] for name in ids}) > 8 for at in range(36) if at not in (8, 13, 14, 18, 19, 23))


@pytest.mark.parametrize(
    ("name", "entry"),
    [("x" * 65, "x" * 64), ("x" * 64, "x" * 64), ("né\n", r"n\xe9\n"), ("", "")],
    ids=["too long", "longest", "escaped", "empty"],
)
def test_audit_entry_has_a_short_ascii_name(line: Line, name: str, entry: str) -> None:
    """A client may send any text as an operation: the entry has its first 64 characters, in ASCII."""
    assert line.ask(name) == ["InvalidAction.NotFound"]
    assert line.audit.entries == [(entry, "InvalidAction.NotFound")]


def test_metrics_observe_operation_code_and_seconds(line: Line) -> None:
    """Each answered request is observed once, with the time since it was taken."""
    assert line.ask(LIST, "Nothing") == ["OK", "InvalidAction.NotFound"]
    assert [(seen.operation, seen.code) for seen in line.metrics.requests] == [
        (LIST, "OK"),
        ("Nothing", "InvalidAction.NotFound"),
    ]
    assert all(0 <= seen.seconds < 60 for seen in line.metrics.requests)


def test_notifications_are_counted(line: Line) -> None:
    """Notifications are in the counters and in the metrics, and an unlimited caller may send any number."""
    assert line.dispatcher.notified(line.exchange.caller, 3)
    assert line.dispatcher.notified(line.exchange.caller, 2)
    assert (line.metrics.notifications, line.agent.counters.notifications_total) == (5, 5)


def test_counters_distinguish_refused_requests(line: Line) -> None:
    """Every answer counts as a request; an error counts as a refused one, too."""
    line.ask(LIST, "Nothing", STATUS)
    counters = line.agent.counters
    assert (counters.requests_total, counters.requests_refused) == (3, 1)


def test_health_has_no_audit_entry(line: Line) -> None:
    """Probes ask for the health every few seconds: its answer is not audited, other answers are."""
    assert line.ask(HEALTH, STATUS, HEALTH) == ["OK", "OK", "OK"]
    assert line.audit.entries == [(STATUS, "OK")]


def test_request_without_an_audit_entry_is_refused(line: Line) -> None:
    """When the audit log fails in the middle of a batch, the requests behind get an error; only the status is answered."""
    line.audit.room = 1
    codes = line.ask(LIST, LIST, STATUS, HEALTH, LIST)
    assert codes == ["OK", "ServiceUnavailableTemporary", "OK", "OK", "ServiceUnavailableTemporary"]


def test_agent_that_may_serve_unaudited_answers(line: Line) -> None:
    """With `on_failure = "serve"`, a failing audit log does not stop answers."""
    line.agent.settings = dataclasses.replace(line.agent.settings, audit=Audit(on_failure="serve"))
    line.audit.room = 0
    assert line.ask(LIST, STATUS) == ["OK", "OK"]


def test_connection_has_at_most_16_offloaded_jobs(line: Line) -> None:
    """Further requests of the connection wait, in order, until a job has finished."""
    params = {"KeyId": "alias/dev", **recipient("SM2PKE").params}
    line.take(*(request("GenerateAndExportDataKey", number, **params) for number in range(20)))
    assert line.run() == []
    exchange = line.exchange
    assert (MAX_OFFLOADED, exchange.in_flight, len(exchange.offloaded)) == (16, 16, 16)
    first, exchange.offloaded = exchange.offloaded[0], []
    exchange.finished = [(first, first.job.run())]
    assert [answer.msgid for answer in line.run()] == [0]
    assert [job.msgid for job in exchange.offloaded] == [16]
    assert exchange.in_flight == 16


def test_recipients_forbid_re_encrypt_between_any_two_keys(line: Line) -> None:
    """A grant with recipients covers ReEncrypt under one key alone, whichever of two key IDs is the larger one."""
    blobs = {}
    for alias in ("alias/dev", "alias/dev-sm4"):
        line.take(request("Encrypt", KeyId=alias, Plaintext="AAAA"))
        blobs[alias] = line.run()[0].result["CiphertextBlob"]  # type: ignore[index]
    uid = line.exchange.caller.peer.uid
    bound = Grant("bound", {"uid": uid}, ("kms:*",), ("*",), recipients=frozenset({"sha256:" + "0" * 64}))
    line.agent.adopt(dataclasses.replace(line.agent.settings, grants=(bound,)), line.agent.keyring)
    codes = {}
    for source, blob in blobs.items():
        for destination in blobs:
            line.take(request("ReEncrypt", CiphertextBlob=blob, DestinationKeyId=destination))
            (answer,) = line.run()
            codes[source == destination, source] = "OK" if answer.error is None else answer.error["Code"]
    assert codes == {
        (same, alias): "OK" if same else "Forbidden.NoPermission" for same in (True, False) for alias in blobs
    }


@pytest.mark.parametrize("operation", ["GenerateDataKey", "GenerateDataKeyWithoutPlaintext"])
def test_recipients_forbid_data_keys_in_plaintext(line: Line, operation: str) -> None:
    """A grant with recipients covers a data key that its caller does not learn, and no other."""
    uid = line.exchange.caller.peer.uid
    bound = Grant("bound", {"uid": uid}, ("kms:*",), ("*",), recipients=frozenset({"sha256:" + "0" * 64}))
    line.agent.adopt(dataclasses.replace(line.agent.settings, grants=(bound,)), line.agent.keyring)
    line.take(request(operation, KeyId="alias/dev"))
    (answer,) = line.run()
    assert (answer.error is None) == (operation == "GenerateDataKeyWithoutPlaintext")
