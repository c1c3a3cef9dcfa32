"""A rewrap's requests to an agent, and its checks of the answers: a wrong answer replaces no record."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.agent import RunningAgent
from support.keyring import change, configuration, serving
from support.records import damage, fill, flipped, opened
from support.rotatable_agent import RotatableAgent, rotating_agent

from keyferry import Client, operations
from keyferry.errors import kms_error
from keyferry.module import SoftwareModule
from keyferry.store import Outcome, Store, rewrap


@pytest.fixture(scope="module")
def rotatable_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RotatableAgent]:
    """One agent for all tests that only rotate its key: each has a store of its own."""
    with rotating_agent(tmp_path_factory.mktemp("rotating")) as rotatable_agent:
        yield rotatable_agent


@pytest.fixture
def kms(rotatable_agent: RotatableAgent) -> Iterator[Client]:
    """A client of it."""
    with rotatable_agent.agent.client() as client:
        yield client


def test_rewrap_needs_no_grant_to_a_plaintext(sqlite_store: Store, keyring: Path, socket_path: Path) -> None:
    """DescribeKey and both halves of ReEncrypt suffice, also under a grant with recipients."""
    with serving(keyring, socket_path) as agent, agent.client() as kms:
        keys = fill(sqlite_store, kms, 30)
    change(keyring, "rotate", "alias/a")
    actions = 'kms:DescribeKey", "kms:ReEncryptFrom", "kms:ReEncryptTo'
    config = keyring.parent / "narrow.toml"
    config.write_text(configuration(keyring, actions=actions) + f'recipients = ["sha256:{"0" * 64}"]\n')
    with RunningAgent(["--config", str(config)], socket_path) as agent, agent.client() as kms:
        assert rewrap(sqlite_store, kms) == Outcome(30, 30, 30, 0, 0)
    with serving(keyring, socket_path) as agent, agent.client() as kms:
        assert opened(sqlite_store, kms) == keys


def test_missing_grant_is_reported_and_nothing_moves(sqlite_store: Store, keyring: Path, socket_path: Path) -> None:
    """A missing grant is reported for each record, or once for all records of a key."""
    with serving(keyring, socket_path) as agent, agent.client() as kms:
        fill(sqlite_store, kms, 30)
    change(keyring, "rotate", "alias/a")
    before = list(sqlite_store)
    for actions, expected in (("kms:ReEncrypt*", 1), ("kms:DescribeKey", 30)):
        config = keyring.parent / "narrow.toml"
        config.write_text(configuration(keyring, actions=actions))
        failures: list[str] = []
        with RunningAgent(["--config", str(config)], socket_path) as agent, agent.client() as kms:
            assert rewrap(sqlite_store, kms, failed=failures.append) == Outcome(30, 30, 0, 0, 30)
        assert len(failures) == expected
        assert all("Forbidden.NoPermission" in why for why in failures)
    assert list(sqlite_store) == before


def test_rewrap_waits_for_a_throttling_agent(sqlite_store: Store, keyring: Path, socket_path: Path) -> None:
    """Rejected.Throttling is not a failure."""
    with serving(keyring, socket_path) as agent, agent.client() as kms:
        fill(sqlite_store, kms, 30)
    change(keyring, "rotate", "alias/a")
    with serving(keyring, socket_path, more="[limits]\nrequests_per_second = 25") as agent, agent.client() as kms:
        assert rewrap(sqlite_store, kms) == Outcome(30, 30, 30, 0, 0)


class Lying:
    """A client whose answers to ReEncrypt are changed on their way."""

    def __init__(self, kms: Client, change_of: Callable[[list[Any]], list[Any]]) -> None:
        self._kms = kms
        self._change = change_of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kms, name)

    def pipeline(self, wanted: Any) -> list[Any]:
        """Send requests; change the answers of all but checks."""
        requests = list(wanted)
        answers = self._kms.pipeline(requests)
        moving = requests and isinstance(requests[0], operations.ReEncrypt) and not requests[0].dry_run
        return self._change(answers) if moving else answers


def test_temporary_failure_is_retried_for_a_bounded_time(
    sqlite_store: Store, kms: Client, rotatable_agent: RotatableAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed audit log, for example, is temporary; the wait for it is bounded."""
    keys = fill(sqlite_store, kms, 3)
    rotatable_agent.rotate()
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    unavailable = kms_error("ServiceUnavailableTemporary")
    never: Any = Lying(kms, lambda answers: [unavailable for _ in answers])
    failures: list[str] = []
    assert rewrap(sqlite_store, never, failed=failures.append) == Outcome(3, 3, 0, 0, 3)
    assert all("ServiceUnavailableTemporary" in why for why in failures)
    times = iter(range(10))
    soon: Any = Lying(kms, lambda answers: [unavailable, *answers[1:]] if next(times) < 5 else answers)
    assert rewrap(sqlite_store, soon) == Outcome(3, 3, 3, 0, 0)
    assert opened(sqlite_store, kms) == keys


OTHER = "00000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize(
    "change_of",
    [
        lambda answer: answer._replace(ciphertext_blob=flipped(answer.ciphertext_blob, 300)),
        lambda answer: answer._replace(ciphertext_blob=flipped(answer.ciphertext_blob, 1_190)),
        lambda answer: answer._replace(ciphertext_blob=answer.ciphertext_blob[:-4]),
        lambda answer: answer._replace(ciphertext_blob=""),
        lambda answer: answer._replace(destination_key_version_id=OTHER),
        lambda answer: answer._replace(key_version_id=OTHER),
        lambda answer: answer._replace(key_id=OTHER),
        lambda answer: answer._replace(destination_key_id=OTHER),
    ],
)
def test_wrong_answer_replaces_no_record(
    sqlite_store: Store, kms: Client, rotatable_agent: RotatableAgent, change_of: Callable[[Any], Any]
) -> None:
    """The answer was changed on its way."""
    fill(sqlite_store, kms, 3)
    rotatable_agent.rotate()
    before = list(sqlite_store)
    lying: Any = Lying(kms, lambda answers: [answers[0], change_of(answers[1]), answers[2]])
    failures: list[str] = []
    assert rewrap(sqlite_store, lying, failed=failures.append) == Outcome(3, 3, 2, 0, 1)
    assert failures[0].startswith("r1: ")
    assert sqlite_store.get("r1") == before[1]


def test_module_detects_exchanged_data_keys(sqlite_store: Store, kms: Client, rotatable_agent: RotatableAgent) -> None:
    """Two exchanged blobs of one key and context both open, so only a use of the data keys shows the exchange."""
    keys = fill(sqlite_store, kms, 4)
    for name in keys:
        damage(sqlite_store, name, "encryption_context", lambda _text: "{}")
        damage(
            sqlite_store, name, "ciphertext_blob", lambda _text: kms.generate_data_key(key_id="alias/a").ciphertext_blob
        )
    keys = opened(sqlite_store, kms)
    rotatable_agent.rotate()

    def exchanged(answers: list[Any]) -> list[Any]:
        first, second = answers[0].ciphertext_blob, answers[1].ciphertext_blob
        return [
            answers[0]._replace(ciphertext_blob=second),
            answers[1]._replace(ciphertext_blob=first),
            *answers[2:],
        ]

    lying: Any = Lying(kms, exchanged)
    module = SoftwareModule.generate("RSA_2048")
    failures: list[str] = []
    assert rewrap(sqlite_store, lying, module=module, failed=failures.append) == Outcome(4, 4, 2, 0, 2)
    assert all("the module cannot prove" in why for why in failures)
    assert opened(sqlite_store, kms) == keys
    assert rewrap(sqlite_store, kms, module=module) == Outcome(4, 2, 2, 0, 0)
    assert opened(sqlite_store, kms) == keys
    assert not module._keys
