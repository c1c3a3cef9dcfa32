"""A remembered decision holds until a change of a key's date, its state, the evidence, or the settings.

The agent's state is in this process; the tests set its clock.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.inside import new_agent, new_audit_log
from support.keys import recipient

from keyferry.errors import KmsError
from keyferry.parameters import encode_base64
from keyferry.protocol import wire
from keyferry_agent import handlers
from keyferry_agent.audit.entry import AuditEntry
from keyferry_agent.authz.caller import Caller
from keyferry_agent.authz.grants import Grant
from keyferry_agent.keyring import document, keyring
from keyferry_agent.keyring.document import Document, KeyEntry, iso
from keyferry_agent.keyring.keyring import Keyring
from keyferry_agent.peer import Peer
from keyferry_agent.server.dispatch import CompletedRequest, Dispatcher, Exchange, Message, OffloadedJob, ServerContext
from keyferry_agent.server.rate_limit import Rate
from keyferry_agent.state import ServerState

DATE = datetime(2026, 12, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
CONTEXT = {"tenant": "acme"}
RSA, SM2 = recipient("RSAES_OAEP_SHA_256"), recipient("SM2PKE")
GENERATE = {"KeyId": "alias/dev", "EncryptionContext": CONTEXT}
ME = Peer(os.geteuid(), frozenset(), 1, "default")


class Clock(datetime):
    """A class like datetime, whose present a test sets."""

    present = DATE

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]  # noqa: ARG003
        return cls.present


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    """Set the agent's clock to a day before a key's date."""
    monkeypatch.setattr(Clock, "present", DATE - timedelta(days=1))
    monkeypatch.setattr(keyring, "datetime", Clock)
    monkeypatch.setattr(document, "datetime", Clock)
    return Clock


@pytest.fixture
def agent() -> ServerState:
    """Return an agent whose keys end at DATE, although they are enabled until then."""
    agent = new_agent()
    keys = (replace(key, delete_date=iso(DATE)) for key in agent.keyring.keys.values())
    agent.keyring = Keyring(keys, agent.keyring.memory, agent.keyring.check)
    return agent


class Asking:
    """One caller of an agent, whose requests come as bytes."""

    def __init__(
        self, agent: ServerState, folder: Path, peer: Peer = ME, *, dispatcher: Dispatcher | None = None
    ) -> None:
        self.agent = agent
        self.caller = Caller(peer)
        self.dispatcher = dispatcher or Dispatcher(ServerContext(agent, new_audit_log(folder), Rate(0), Rate(0)))
        self.exchange = Exchange(self.caller)
        self._decoder = wire.Decoder()

    def decide(self, method: str, params: dict[str, Any]) -> tuple[Message, Any]:
        """Return the received message and its decision."""
        self._decoder.feed(wire.encode_request(1, method, params))
        self.dispatcher.take(self.exchange, self._decoder.packed_messages(), 1)
        (message,) = self.exchange.pending
        self.exchange.pending.clear()
        return message, self.outcome_of(message)

    def outcome_of(self, message: Message) -> Any:
        """Return the decision on a message: a completed request, or an offloaded job."""
        self.dispatcher._begin(self.exchange, message)
        return self._decided()

    def decide_anew(self, job: OffloadedJob) -> Any:
        """Return what becomes of a job that comes back from its thread, and does not hold."""
        self.exchange.in_flight = 1
        self.exchange.finished = [(job, None)]
        self.dispatcher._complete(self.exchange)
        return self._decided()

    def _decided(self) -> Any:
        self.exchange.in_flight = 0
        outcomes: list[Any] = [*self.exchange.completed, *self.exchange.offloaded]
        self.exchange.completed.clear()
        self.exchange.offloaded.clear()
        (outcome,) = outcomes
        return outcome

    def holds(self, job: OffloadedJob) -> bool:
        """Return whether the decision about a job still holds."""
        return self.dispatcher._holds(self.caller, job)

    def remembered(self, method: str, params: dict[str, Any]) -> Message:
        """Ask until the request is recalled."""
        for _ in range(2):
            self.decide(method, params)
        message, _ = self.decide(method, params)
        assert message.decision is not None
        return message

    def code(self, method: str, params: dict[str, Any]) -> str:
        """Ask once more; return the code of a refusal, or OK. The request is not recalled."""
        message, decided = self.decide(method, params)
        assert message.decision is None
        return code_of(decided)


def code_of(decided: Any) -> str:
    """Return the code of an outcome, or OK."""
    assert not isinstance(decided, OffloadedJob)
    return (
        decided.outcome.code
        if isinstance(decided, CompletedRequest) and isinstance(decided.outcome, KmsError)
        else "OK"
    )


@pytest.fixture
def asking(agent: ServerState, tmp_path: Path, clock: type[Clock]) -> Asking:
    """Return a caller to whom everything is granted."""
    return Asking(agent, tmp_path)


REPEATABLE = [
    ("GenerateAndExportDataKey", GENERATE | RSA.params),
    ("GenerateDataKey", GENERATE),
    ("GenerateDataKeyWithoutPlaintext", GENERATE),
]


@pytest.mark.parametrize(("method", "params"), REPEATABLE, ids=[method for method, _ in REPEATABLE])
def test_a_remembered_request_ends_with_its_keys_date(
    asking: Asking, clock: type[Clock], method: str, params: dict[str, Any]
) -> None:
    """No reload and no other request comes between the last use and the date."""
    clock.present = DATE - SECOND
    asking.remembered(method, params)
    clock.present = DATE
    assert asking.code(method, params) == "Forbidden.AliasNotFound"


def test_request_recalled_before_its_keys_date_is_decided_again(asking: Asking, clock: type[Clock]) -> None:
    """The date comes between the recall of a message and the decision."""
    method, params = REPEATABLE[0]
    recalled = asking.remembered(method, params)
    clock.present = DATE
    assert code_of(asking.outcome_of(recalled)) == "Forbidden.AliasNotFound"


@pytest.mark.parametrize("method", ["GenerateAndExportDataKey", "ExportDataKey"])
def test_offloaded_job_is_valid_until_its_keys_date(asking: Asking, clock: type[Clock], method: str) -> None:
    """A thread may start the job late."""
    blob = asking.decide("Encrypt", GENERATE | {"Plaintext": encode_base64(bytes(32))})[1].outcome.ciphertext_blob
    params = SM2.params | (GENERATE if method.startswith("Generate") else {"CiphertextBlob": blob})
    _, slow = asking.decide(method, params | {"EncryptionContext": CONTEXT})
    assert isinstance(slow, OffloadedJob)
    clock.present = DATE - SECOND
    assert asking.holds(slow)
    clock.present = DATE
    assert not asking.holds(slow)
    gone = "Forbidden.AliasNotFound" if method.startswith("Generate") else "Forbidden.KeyVersionNotFound"
    assert code_of(asking.decide_anew(slow)) == gone


def less(agent: ServerState) -> None:
    """Take a grant away."""
    grant = Grant("less", {"uid": os.geteuid()}, ("kms:Decrypt",), ("*",))
    agent.adopt(replace(agent.settings, grants=(grant,)), agent.keyring)


def disabled(agent: ServerState) -> None:
    """Disable all keys, in another keyring."""
    keys = (replace(key, stored_state="Disabled") for key in agent.keyring.keys.values())
    agent.adopt(agent.settings, Keyring(keys, agent.keyring.memory, agent.keyring.check))


@pytest.mark.parametrize(
    ("change", "code"), [(less, "Forbidden.NoPermission"), (disabled, "Rejected.Disabled")], ids=["grant", "key"]
)
@pytest.mark.parametrize("where", ["before the recall", "after the recall", "before a thread"])
def test_reload_ends_earlier_decisions(
    asking: Asking, change: Callable[[ServerState], None], code: str, where: str
) -> None:
    """The rule holds at each place where a decision waits."""
    method = "GenerateAndExportDataKey"
    recalled = asking.remembered(method, GENERATE | RSA.params)
    _, slow = asking.decide(method, GENERATE | SM2.params)
    change(asking.agent)
    assert not asking.dispatcher._decisions
    if where == "before the recall":
        assert asking.code(method, GENERATE | RSA.params) == code
    elif where == "after the recall":
        assert code_of(asking.outcome_of(recalled)) == code
    else:
        assert not asking.holds(slow)
        assert code_of(asking.decide_anew(slow)) == code


@pytest.mark.parametrize("more", [{"unit": "orders.service"}, {"uid": 4_207}], ids=["more", "other"])
def test_new_evidence_ends_earlier_decisions(asking: Asking, more: dict[str, Any]) -> None:
    """A decision is valid for the evidence that it was made by, also on one connection."""
    method = "GenerateAndExportDataKey"
    grants = [
        Grant("all", {"uid": os.geteuid(), "unit": "none.service"}, ("kms:*",), ("*",)),
        Grant("unit", {"unit": "orders.service"}, ("kms:Decrypt",), ("*",)),
    ]
    asking.agent.adopt(replace(asking.agent.settings, grants=tuple(grants)), asking.agent.keyring)
    asking.caller.know(ME._replace(unit="none.service"))
    recalled = asking.remembered(method, GENERATE | RSA.params)
    _, slow = asking.decide(method, GENERATE | SM2.params)
    asking.caller.know(ME._replace(unit="none.service")._replace(**more))
    assert not asking.holds(slow)
    assert code_of(asking.outcome_of(recalled)) == "Forbidden.NoPermission"
    assert asking.code(method, GENERATE | RSA.params) == "Forbidden.NoPermission"


def test_a_decision_is_not_recalled_for_another_caller(asking: Asking, tmp_path: Path) -> None:
    """An equal request of a caller without a grant is decided for that caller."""
    method, params = REPEATABLE[0]
    asking.remembered(method, params)
    stranger = Asking(asking.agent, tmp_path, ME._replace(uid=4_207), dispatcher=asking.dispatcher)
    assert stranger.code(method, params) == "Forbidden.NoPermission"


def test_callers_with_the_same_grants_share_decisions(asking: Asking, tmp_path: Path) -> None:
    """A decision does not depend on the connection."""
    method, params = REPEATABLE[0]
    asking.remembered(method, params)
    message, decided = Asking(asking.agent, tmp_path, ME._replace(pid=2), dispatcher=asking.dispatcher).decide(
        method, params
    )
    assert message.decision is not None
    assert code_of(decided) == "OK"


def test_the_keys_that_grants_cover_end_with_their_date(asking: Asking, clock: type[Clock]) -> None:
    """The rule holds although the caller's keys were listed before."""
    caller = asking.caller
    caller.refresh(asking.agent.policy)
    assert len(asking.agent.visible_keys(caller.granted).keys) == 2
    clock.present = DATE
    assert asking.agent.visible_keys(caller.granted) == ((), ())
    disabled(asking.agent)
    clock.present = DATE - SECOND
    caller.refresh(asking.agent.policy)
    assert {key.stored_state for key in asking.agent.visible_keys(caller.granted).keys} == {"Disabled"}


# The second of the date itself


def test_a_key_is_deleted_in_the_second_of_its_date(agent: ServerState, clock: type[Clock]) -> None:
    """The key is deleted neither a second later nor a microsecond earlier."""
    (key, *_) = agent.keyring.keys.values()
    states = []
    for moment in (DATE - timedelta(microseconds=1), DATE, DATE + SECOND):
        clock.present = moment
        states.append((key.state(), key.enabled(), key.key_id in agent.keyring.gone()))
    assert states == [("Enabled", True, False), ("Deleted", False, True), ("Deleted", False, True)]


def test_a_key_is_purged_in_the_second_of_its_date(clock: type[Clock]) -> None:
    """Its aliases are purged with it, and other keys stay."""

    def purged(moment: datetime) -> tuple[list[str], dict[str, str]]:
        clock.present = moment
        keys = [KeyEntry(name, "Aliyun_SM4", "", [], "", delete_date=date) for name, date in dates.items()]
        content = Document([], keys, {f"alias/{name}": name for name in dates})
        content.purge()
        return [key.key_id for key in content.keys], content.aliases

    dates = {"due": iso(DATE), "later": iso(DATE + SECOND), "never": ""}
    assert purged(DATE - SECOND)[0] == ["due", "later", "never"]
    assert purged(DATE) == (["later", "never"], {"alias/later": "later", "alias/never": "never"})
    assert purged(DATE + SECOND)[0] == ["never"]


# The counters


def test_counters_separate_refused_requests(asking: Asking) -> None:
    """Each answer is counted once, and each error once more."""
    decided = [asking.decide("DescribeKey", {"KeyId": f"alias/{name}"})[1] for name in ("dev", "none", "dev-sm4")]
    decided.append(asking.decide("NoSuchOperation", {})[1])
    asking.exchange.completed.extend(decided)
    asking.dispatcher._answer([asking.exchange])
    counters = asking.agent.counters.snapshot()
    assert (counters.requests_total, counters.requests_refused) == (4, 2)


def test_handlers_decide_without_counting(asking: Asking) -> None:
    """A decision alone is not an answer."""
    asking.caller.refresh(asking.agent.policy)
    handlers.prepare(asking.agent, asking.caller, "DescribeKey", {"KeyId": "alias/dev"})
    assert asking.agent.counters.requests_total == 0


@pytest.mark.parametrize("operation", ["ListKeys", "ListAliases", "DescribeKey"])
def test_audit_entry_names_the_program_of_a_list(asking: Asking, operation: str) -> None:
    """The entry of a list has the caller's program, as that of any other request that a grant on a program allows."""
    grant = Grant("program", {"uid": os.geteuid(), "exe": "/bin/true"}, ("kms:*",), ("*",))
    asking.agent.adopt(replace(asking.agent.settings, grants=(grant,)), asking.agent.keyring)
    asking.caller.know(ME._replace(exe="/bin/true"))
    asking.caller.refresh(asking.agent.policy)
    params = {"KeyId": "alias/dev"} if operation == "DescribeKey" else {}
    entry = handlers.prepare(asking.agent, asking.caller, operation, params).entry
    assert (entry.grant, entry.by_program) == ("program", True)


def test_equal_requests_share_an_audit_entry(asking: Asking) -> None:
    """Requests that the decision cache answers have the entry of its decision, which cannot be changed."""
    method, params = REPEATABLE[0]
    message = asking.remembered(method, params)
    first, second = asking.outcome_of(message), asking.outcome_of(message)
    assert message.decision is not None
    assert first.entry is second.entry is message.decision.entry
    assert first.request_id != second.request_id
    with pytest.raises(AttributeError):
        first.entry.grant = "another"  # type: ignore[misc]


def test_refused_request_keeps_its_audit_fields(asking: Asking) -> None:
    """The entry of a refusal has the fields that were known when the request was refused."""
    disabled(asking.agent)
    asking.caller.refresh(asking.agent.policy)
    outcome, entry = handlers.prepare(asking.agent, asking.caller, "Encrypt", GENERATE | {"Plaintext": "AAAA"})
    assert isinstance(outcome, KmsError)
    assert outcome.code == "Rejected.Disabled"
    assert entry.grant
    assert entry.key_id
    assert entry.context_keys == tuple(CONTEXT)
    unknown = handlers.prepare(asking.agent, asking.caller, "密" * 100, {}).entry
    assert unknown == AuditEntry("\\u5bc6" * 64)
