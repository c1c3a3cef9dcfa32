"""Moving records under their master keys' newest versions: every record opens to the same data key before, during and after."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from support import crashing_rewrap
from support.agent import RunningAgent, configured
from support.postgres import Cluster
from support.records import damage, fill, flipped, opened
from support.rotatable_agent import RotatableAgent, rotating_agent
from support.skip_unless import ROOT, postgresql

from keyferry import AgentUnavailable, Client
from keyferry.parameters import decode_base64
from keyferry.store import Outcome, Record, Store, StoreError, rewrap
from keyferry.store import store as store_module
from keyferry.store.record import now

COUNT = 50


@pytest.fixture(scope="module")
def rotatable_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RotatableAgent]:
    """One agent for all tests that leave it running: each has a store of its own."""
    with rotating_agent(tmp_path_factory.mktemp("rotating")) as rotatable_agent:
        yield rotatable_agent


@pytest.fixture
def kms(rotatable_agent: RotatableAgent) -> Iterator[Client]:
    """A client of it."""
    with rotatable_agent.agent.client() as client:
        yield client


@pytest.fixture
def store(store_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty store, with pages so small that there are several."""
    monkeypatch.setattr(store_module, "_PAGE_RECORDS", crashing_rewrap.PAGE)
    with Store(store_url) as made:
        yield made


def versions(store: Store) -> set[str]:
    """The versions of all records, as their columns and their blobs say."""
    keyring_json = {record.key_version_id for record in store}
    assert keyring_json == {decode_base64(record.ciphertext_blob)[:36].decode() for record in store}
    return keyring_json


def test_rewrap_moves_every_record_and_keeps_its_data_key(
    store: Store, kms: Client, rotatable_agent: RotatableAgent
) -> None:
    """Records of several versions move, those of the primary version stay, and a second run has nothing to do."""
    keys = fill(store, kms, COUNT)
    rotatable_agent.rotate()
    keys |= fill(store, kms, COUNT, start=COUNT)
    primary = rotatable_agent.rotate()
    keys |= fill(store, kms, 5, start=2 * COUNT)
    before = {record.name: record for record in store}
    advanced: list[int] = []
    found: list[int] = []
    outcome = rewrap(store, kms, advanced=advanced.append, found=found.append)
    assert outcome == Outcome(records=105, found=100, moved=100, changed=0, failed=0)
    assert (found, sum(advanced)) == ([100], 100)
    assert len(advanced) == 5
    assert versions(store) == {primary}
    assert opened(store, kms) == keys
    for record in store:
        old = before[record.name]
        assert (record.created, record.context_text, record.key_id) == (old.created, old.context_text, old.key_id)
        assert (record.rewrapped is None) == (int(record.name[1:]) >= 2 * COUNT)
        assert (record == old) == (int(record.name[1:]) >= 2 * COUNT)
    assert rewrap(store, kms) == Outcome(records=105, found=0, moved=0, changed=0, failed=0)


def test_rewrap_of_an_empty_store_succeeds(store: Store, kms: Client) -> None:
    """The store exists and has no record."""
    store.add(Record("a", "no such key", "v", "b", "{}", now()))
    with store._engine.begin() as connection:
        connection.execute(sqlalchemy.text("DELETE FROM keyferry_records"))
    assert rewrap(store, kms) == Outcome(0, 0, 0, 0, 0)


def test_a_store_that_does_not_exist_is_a_failure(store: Store, kms: Client) -> None:
    """With a wrong URL, a success without records would be misleading."""
    for dry_run in (False, True):
        with pytest.raises(StoreError, match="there is no store"):
            rewrap(store, kms, dry_run=dry_run)


def test_dry_run_reports_and_changes_nothing(store: Store, kms: Client, rotatable_agent: RotatableAgent) -> None:
    """A dry run finds a record that would fail."""
    fill(store, kms, COUNT)
    rotatable_agent.rotate()
    damage(store, "r7", "ciphertext_blob", lambda text: text[:100] + ("A" if text[100] != "A" else "B") + text[101:])
    before = list(store)
    failures: list[str] = []
    outcome = rewrap(store, kms, dry_run=True, failed=failures.append)
    assert outcome == Outcome(records=COUNT, found=COUNT, moved=COUNT - 1, changed=0, failed=1)
    assert [each.split(":")[0] for each in failures] == ["r7"]
    assert list(store) == before


def test_record_with_one_wrong_bit_is_left_and_others_move(
    sqlite_store: Store, kms: Client, rotatable_agent: RotatableAgent
) -> None:
    """The bit is in version, format, salt, commitment, ciphertext or tag."""
    bits = [*range(0, 149 * 8, 9), 149 * 8 - 1]
    keys = fill(sqlite_store, kms, len(bits) + 3)
    primary = rotatable_agent.rotate()
    for number, bit in enumerate(bits):
        damage(sqlite_store, f"r{number}", "ciphertext_blob", lambda text, bit=bit: flipped(text, bit))  # type: ignore[misc]
    before = {record.name: record for record in sqlite_store}
    failures: list[str] = []
    outcome = rewrap(sqlite_store, kms, failed=failures.append)
    assert outcome == Outcome(records=len(bits) + 3, found=len(bits) + 3, moved=3, changed=0, failed=len(bits))
    assert [each.split(":")[0] for each in failures] == [f"r{number}" for number in range(len(bits))]
    after = list(sqlite_store)
    assert [record for record in after if record.rewrapped] == after[-3:]
    assert all(record == before[record.name] for record in after[:-3])
    whole = after[-3:]
    assert opened(whole, kms) == {record.name: keys[record.name] for record in whole}
    assert {record.key_version_id for record in whole} == {primary}


def test_a_record_with_a_damaged_column_is_reported_or_repaired(
    sqlite_store: Store, kms: Client, rotatable_agent: RotatableAgent
) -> None:
    """A wrong context or key is reported; a wrong version is corrected from the blob."""
    keys = fill(sqlite_store, kms, 6)
    primary = rotatable_agent.rotate()
    damage(sqlite_store, "r1", "encryption_context", lambda text: text.replace("t1", "t2"))
    damage(sqlite_store, "r2", "encryption_context", lambda text: text[:-1])
    damage(sqlite_store, "r3", "key_id", lambda text: "x" + text[1:])
    damage(sqlite_store, "r4", "key_version_id", lambda _text: primary)
    failures: list[str] = []
    outcome = rewrap(sqlite_store, kms, failed=failures.append)
    assert outcome == Outcome(records=6, found=6, moved=3, changed=0, failed=3)
    assert sorted(each.split(":")[0].split(" of ")[0] for each in failures) == ["1 records", "r1", "r2"]
    moved = [record for record in sqlite_store if record.rewrapped]
    assert opened(moved, kms) == {name: keys[name] for name in ("r0", "r4", "r5")}
    damage(sqlite_store, "r0", "key_version_id", lambda text: "x" + text[1:])
    damage(sqlite_store, "r3", "key_id", lambda _text: moved[0].key_id)
    assert rewrap(sqlite_store, kms) == Outcome(records=6, found=4, moved=2, changed=0, failed=2)
    assert sqlite_store.get("r0").key_version_id == primary
    assert opened([sqlite_store.get("r0"), sqlite_store.get("r3")], kms) == {"r0": keys["r0"], "r3": keys["r3"]}


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store_url", "point"),
    [
        *(("sqlite", point) for point in crashing_rewrap.POINTS),
        *(pytest.param("postgresql", point, marks=postgresql()) for point in ("replacing", "committed")),
    ],
    indirect=["store_url"],
)
def test_killed_rewrap_lost_nothing_and_is_resumed(
    store: Store, store_url: str, kms: Client, rotatable_agent: RotatableAgent, point: str
) -> None:
    """After SIGKILL at any point of the second page, each record opens to its data key, and the next run moves all."""
    keys = fill(store, kms, COUNT)
    primary = rotatable_agent.rotate()
    arguments = [store_url, str(rotatable_agent.agent.socket), point, "2"]
    ended = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "crashing_rewrap.py", *arguments], check=False, timeout=60
    )
    assert ended.returncode == -signal.SIGKILL
    assert opened(store, kms) == keys
    moved = sum(record.key_version_id == primary for record in store)
    assert moved == (2 if point == "committed" else 1) * crashing_rewrap.PAGE
    outcome = rewrap(store, kms)
    assert outcome == Outcome(records=COUNT, found=COUNT - moved, moved=COUNT - moved, changed=0, failed=0)
    assert versions(store) == {primary}
    assert opened(store, kms) == keys


@postgresql()
@pytest.mark.parametrize("point", ["between pages", "in a transaction"])
def test_killed_database_loses_nothing_and_rewrap_is_resumed(
    postgres: Cluster, kms: Client, rotatable_agent: RotatableAgent, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL, stopped in this very moment: the run ends with an error, the next one does the rest."""
    monkeypatch.setattr(store_module, "_PAGE_RECORDS", crashing_rewrap.PAGE)
    with Store(postgres.new_database()) as store:
        keys = fill(store, kms, COUNT)
        primary = rotatable_agent.rotate()
        stopped: list[int] = []

        def stop(*_arguments: object) -> None:
            if not stopped:
                stopped.append(1)
                postgres.stop()

        def updated(*arguments: Any) -> None:
            if "UPDATE" in arguments[2]:
                stop()

        if point == "in a transaction":
            sqlalchemy.event.listen(store._engine, "after_cursor_execute", updated)
        try:
            with pytest.raises(StoreError, match="PostgreSQL database"):
                rewrap(store, kms, advanced=stop if point == "between pages" else lambda _count: None)
        finally:
            postgres.start()
        assert opened(store, kms) == keys
        left = sum(record.key_version_id != primary for record in store)
        assert left == (COUNT - crashing_rewrap.PAGE if point == "between pages" else COUNT)
        assert rewrap(store, kms) == Outcome(records=COUNT, found=left, moved=left, changed=0, failed=0)
        assert versions(store) == {primary}
        assert opened(store, kms) == keys


def test_an_agent_that_goes_away_leaves_what_was_moved_moved(sqlite_store: Store, tmp_path: Path) -> None:
    """And the rest for the next time."""
    with rotating_agent(tmp_path) as rotatable_agent:
        with rotatable_agent.agent.client() as kms:
            fill(sqlite_store, kms, COUNT)
        primary = rotatable_agent.rotate()
        with rotatable_agent.agent.client() as kms, pytest.raises(AgentUnavailable):
            rewrap(sqlite_store, kms, advanced=lambda _count: rotatable_agent.agent.kill())
    assert [record.key_version_id == primary for record in sqlite_store] == [True] * crashing_rewrap.PAGE + [False] * (
        COUNT - crashing_rewrap.PAGE
    )


# --- others at the same time ------------------------------------------------------------------------------------------


def test_two_simultaneous_rewraps_do_no_harm(
    store: Store, store_url: str, kms: Client, rotatable_agent: RotatableAgent
) -> None:
    """Each record is moved once, by one of them."""
    keys = fill(store, kms, 6 * COUNT)
    primary = rotatable_agent.rotate()
    start = threading.Barrier(2)

    def wait(_count: int) -> None:
        start.wait()

    outcomes: list[Outcome] = []

    def run() -> None:
        with Store(store_url) as own, rotatable_agent.agent.client() as client:
            outcomes.append(rewrap(own, client, found=wait))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.failed for outcome in outcomes] == [0, 0]
    assert sum(outcome.moved for outcome in outcomes) == 6 * COUNT
    assert versions(store) == {primary}
    assert opened(store, kms) == keys


def test_concurrent_change_of_a_record_is_kept(
    store: Store, kms: Client, rotatable_agent: RotatableAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between read and replacement, one record gets another data key and another record is deleted."""
    keys = fill(store, kms, 5)
    rotatable_agent.rotate()
    other = kms.generate_data_key(key_id="alias/a")
    replace = Store.replace

    def meanwhile(self: Store, changes: Any) -> int:
        damage(store, "r2", "ciphertext_blob", lambda _text: other.ciphertext_blob)
        damage(store, "r2", "encryption_context", lambda _text: "{}")
        with store._engine.begin() as connection:
            connection.execute(sqlalchemy.text("DELETE FROM keyferry_records WHERE name = 'r3'"))
        return replace(self, changes)

    monkeypatch.setattr(Store, "replace", meanwhile)
    assert rewrap(store, kms) == Outcome(records=4, found=5, moved=3, changed=2, failed=0)
    del keys["r3"]
    assert opened(store, kms) == {**keys, "r2": other.plaintext}


def test_rewrap_follows_a_rotation_during_its_run(
    sqlite_store: Store, kms: Client, rotatable_agent: RotatableAgent
) -> None:
    """In the end all records are under the primary version of that time."""
    keys = fill(sqlite_store, kms, COUNT)
    rotatable_agent.rotate()
    newest: list[str] = []

    def rotate(_count: int) -> None:
        if not newest:
            newest.append(rotatable_agent.rotate())

    assert rewrap(sqlite_store, kms, advanced=rotate).failed == 0
    assert versions(sqlite_store) == set(newest)
    assert opened(sqlite_store, kms) == keys


def test_records_move_under_their_own_master_keys(
    sqlite_store: Store, kms: Client, rotatable_agent: RotatableAgent
) -> None:
    """SM4 keys are among them; records of a disabled key stay, and are reported."""
    rotatable_agent.change("create-key", "--alias", "alias/b", "--key-spec", "Aliyun_SM4")
    rotatable_agent.change("create-key", "--alias", "alias/c")
    aliases = ("alias/a", "alias/b", "alias/c")
    keys: dict[str, str] = {}
    for number, alias in enumerate(aliases):
        keys |= fill(sqlite_store, kms, 10, key_id=alias, start=number * 10)
    for alias in aliases:
        rotatable_agent.change("rotate", alias)
    rotatable_agent.change("disable", "alias/c")
    failures: list[str] = []
    assert rewrap(sqlite_store, kms, failed=failures.append) == Outcome(30, 30, 20, 0, 10)
    assert all("Rejected.Disabled" in why for why in failures)
    rotatable_agent.change("enable", "alias/c")
    assert rewrap(sqlite_store, kms) == Outcome(30, 10, 10, 0, 0)
    assert opened(sqlite_store, kms) == keys


def test_record_of_a_development_keyring_is_left(sqlite_store: Store, socket_path: Path) -> None:
    """A development keyring ends with its agent, so its records are reported as without a key."""
    with RunningAgent(configured(socket_path, ""), socket_path) as agent, agent.client() as kms:
        fill(sqlite_store, kms, 3, key_id="alias/dev")
    failures: list[str] = []
    with RunningAgent(["--dev"], socket_path) as agent, agent.client() as kms:
        assert rewrap(sqlite_store, kms, failed=failures.append) == Outcome(3, 3, 0, 0, 3)
    assert len(failures) == 1
    assert "Forbidden.KeyNotFound" in failures[0]


def test_a_record_may_be_made_and_read_without_a_database() -> None:
    """A record converts to and from JSON, as the documentation describes."""
    record = Record("a", "k", "v", "b", '{"x": "y"}', "2026-01-31T12:00:00Z")
    assert record.data_key_record() == {
        "KeyId": "k",
        "KeyVersionId": "v",
        "CiphertextBlob": "b",
        "EncryptionContext": {"x": "y"},
    }
