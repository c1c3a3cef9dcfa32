"""The table of records, in SQLite and in PostgreSQL: records are read back, and refusals change nothing."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy
from support.agent import RunningAgent
from support.postgres import Cluster
from support.skip_unless import libpq, postgresql

from keyferry.parameters import encode_base64
from keyferry.store import Record, Store, StoreError, location, new_record
from keyferry.store.record import MAX_NAME_CHARACTERS, context_text

KEY, OLD, NEW = "a-key", "1" * 36, "2" * 36
PASSWORD = "hunter2"


def blob(version: str, number: int = 0) -> str:
    """Return bytes with the form of a CiphertextBlob under a version."""
    return encode_base64(version.encode() + b"\x01" + number.to_bytes(4, "big") * 28)


def record(name: str, version: str = OLD, number: int = 0, key_id: str = KEY) -> Record:
    """Return a record that no key opens."""
    return Record(name, key_id, version, blob(version, number), context_text({"n": name}), "2026-01-31T12:00:00Z")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """An empty store in each kind of database."""
    with Store(store_url) as opened:
        yield opened


def test_added_records_are_read_back(store: Store, agent: RunningAgent) -> None:
    """A record is made through the agent without its plaintext, converts to JSON, and serves a module."""
    with agent.client() as kms:
        made = new_record(kms, "orders/2026 ü", key_id="alias/dev", encryption_context={"tenant": "acme", "a": "é\0"})
        store.add(made)
        as_text = new_record(kms, "b", key_id="alias/dev", encryption_context='{"x": "y"}', number_of_bytes=16)
        plain = new_record(kms, "c", key_id="alias/dev")
        store.add(as_text, plain)
        got = store.get("orders/2026 ü")
        exported = got.data_key_record()
        kms.decrypt(ciphertext_blob=exported["CiphertextBlob"], encryption_context=exported["EncryptionContext"])
    assert got._replace(row_id=0) == made
    assert got.to_json()["EncryptionContext"] == {"tenant": "acme", "a": "é\0"}
    assert store.get("b").encryption_context == {"x": "y"}
    assert store.get("c").encryption_context == {}
    assert [each.name for each in store] == ["orders/2026 ü", "b", "c"]


def test_missing_store_is_an_error_and_not_created(store: Store) -> None:
    """Only `add` creates an SQLite file or a PostgreSQL table; for all other calls a missing one is an error."""
    assert not store._exists()
    for read in (list, Store.count, Store.key_ids, lambda store: store.get("a")):
        with pytest.raises(StoreError, match=r"there is no .*(records\.sqlite|PostgreSQL database test)"):
            read(store)
    store.check_free("a")
    assert not store._exists()
    store.add(record("a"))
    assert store.count() == 1


def test_store_is_created_only_with_permission(store_url: str) -> None:
    """With create=False, `add` needs an existing store."""
    with Store(store_url, create=False) as store:
        with pytest.raises(StoreError, match="there is no store"):
            store.add(record("a"))
        with pytest.raises(StoreError, match="there is no store"):
            store.check_free("a")
        with Store(store_url) as other:
            other.add(record("a"))
        store.add(record("b"))
        assert store.count() == 2


@pytest.mark.parametrize(
    "name", ["", " a", "a ", "a\nb", "a\0b", "a\x1b[2J", "\ud800", "x" * (MAX_NAME_CHARACTERS + 1), "a\u202eb"]
)
def test_a_name_that_cannot_be_shown_is_refused(store: Store, name: str) -> None:
    """Before anything is asked, and in words that can be shown."""
    with pytest.raises(StoreError, match="not a valid record name") as caught:
        store.add(record(name))
    assert str(caught.value).isprintable()
    with pytest.raises(StoreError, match="not a valid record name"):
        store.check_free(name)
    with pytest.raises(StoreError, match="no record"):
        store.get(name)


def test_a_name_of_the_greatest_length_is_taken(store: Store) -> None:
    """Of any script."""
    store.add(record("名" * MAX_NAME_CHARACTERS))
    assert store.get("名" * MAX_NAME_CHARACTERS).name == "名" * MAX_NAME_CHARACTERS


def test_existing_name_is_refused_with_its_whole_batch(store: Store) -> None:
    """A record is never overwritten."""
    store.add(record("a"))
    with pytest.raises(StoreError, match="a is taken"):
        store.add(record("a", number=1))
    with pytest.raises(StoreError, match="a is taken"):
        store.check_free("a")
    with pytest.raises(StoreError, match="one of these names is taken"):
        store.add(record("b"), record("a"))
    assert [each._replace(row_id=0) for each in store] == [record("a")]


def test_records_are_read_in_the_order_of_their_addition(store: Store) -> None:
    names = [f"n{number * 7_919 % 1_201}" for number in range(1_201)]
    store.add(*(record(name, number=number) for number, name in enumerate(names)))
    assert [each.name for each in store] == names
    assert store.count() == 1_201


def test_records_under_other_versions_are_found_by_their_blobs(store: Store) -> None:
    """A column that contradicts the blob hides no record."""
    store.add(
        record("old"),
        record("new", NEW),
        record("column is wrong", NEW)._replace(key_version_id=OLD),
        record("blob is old", OLD)._replace(key_version_id=NEW),
        record("another key", OLD, key_id="b-key"),
    )
    (page,) = store.not_under(KEY, NEW)
    assert [each.name for each in page] == ["old", "column is wrong", "blob is old"]
    assert store.count(KEY, not_under=NEW) == 3
    assert store.count(KEY) == 4
    assert store.key_ids() == [KEY, "b-key"]


def test_record_is_replaced_only_if_unchanged(store: Store) -> None:
    """Another blob, context or key shows a concurrent change; other records are replaced."""
    store.add(*(record(name, number=place) for place, name in enumerate("abcd")))
    read = list(store)
    assert store.replace([(read[0], blob(NEW, 9), NEW)]) == 1
    stale = [read[0], read[1]._replace(context_text="{}"), read[2]._replace(key_id="b-key"), read[3]]
    assert store.replace([(each, blob(NEW, 8), NEW) for each in stale]) == 1
    assert store.replace([(each, blob(NEW, 7), NEW) for each in stale]) == 0
    assert store.replace([]) == 0
    after = list(store)
    assert [each.ciphertext_blob for each in after] == [blob(NEW, 9), blob(OLD, 1), blob(OLD, 2), blob(NEW, 8)]
    assert [each.key_version_id for each in after] == [NEW, OLD, OLD, NEW]
    assert [each.rewrapped is not None for each in after] == [True, False, False, True]
    assert [each.context_text for each in after] == [each.context_text for each in read]


def test_simultaneous_first_records_create_one_table(store_url: str) -> None:
    """Each of the writers may be the first."""
    start = threading.Barrier(4)
    failures = []

    def add(name: str) -> None:
        with Store(store_url) as store:
            start.wait()
            try:
                store.add(record(name))
            except StoreError as error:
                failures.append(error)

    threads = [threading.Thread(target=add, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with Store(store_url) as store:
        assert sorted(each.name for each in store) == ["a", "b", "c", "d"]


def test_one_damaged_record_does_not_hide_the_others(tmp_path: Path) -> None:
    """Columns that are not UTF-8 and a context that is not JSON are damage."""
    path = tmp_path / "records.sqlite"
    with Store(f"sqlite:///{path}") as store:
        store.add(*(record(name) for name in "abcdef"))
        with closing(sqlite3.connect(path)) as database:
            columns = {"a": "name", "b": "key_id", "c": "ciphertext_blob", "d": "created", "e": "encryption_context"}
            for name, column in columns.items():
                database.execute(
                    f"UPDATE keyferry_records SET {column} = CAST(x'41ff42' AS TEXT) WHERE name = ?", (name,)
                )
            database.commit()
        assert [each.name[-1] for each in store] == ["B", "b", "c", "d", "e", "f"]
        with pytest.raises(StoreError, match="e: its EncryptionContext in the store is damaged"):
            store.get("e").data_key_record()
        assert store.get("e").to_json()["EncryptionContext"] is None


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": "b", "a": "c"}', "[" * 100_000, "null"])
def test_invalid_context_is_damage(text: str) -> None:
    """An invalid context is never mistaken for an empty one."""
    with pytest.raises(StoreError, match="damaged"):
        assert record("a")._replace(context_text=text).encryption_context


# --- where a store is -------------------------------------------------------------------------------------------------


def test_default_store_is_a_private_file_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is under an absolute $XDG_DATA_HOME, else under ~/.local/share, in a directory for this user only."""
    monkeypatch.delenv("KEYFERRY_STORE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for home, expected in (
        (str(tmp_path / "d%41?x=y"), tmp_path / "d%41?x=y"),
        ("relative", tmp_path / ".local" / "share"),
        ("", tmp_path / ".local" / "share"),
    ):
        monkeypatch.setenv("XDG_DATA_HOME", home)
        assert location.resolve_url().database == str(expected / "keyferry" / "records.sqlite")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "d%41?x=y"))
    with Store() as store:
        store.add(record("a"))
    assert (tmp_path / "d%41?x=y" / "keyferry").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "d%41?x=y" / "keyferry" / "records.sqlite").exists()


def test_a_url_may_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password need not be on the command line. An argument wins."""
    file = tmp_path / "url"
    file.write_text("  postgresql://u:p@h/db\nmore\n")
    monkeypatch.setenv("KEYFERRY_STORE", f"@{file}")
    assert location.resolve_url() == location.resolve_url(f"@{file}") == location.resolve_url("postgres://u:p@h/db")
    assert location.resolve_url().drivername == "postgresql+psycopg"
    assert location.resolve_url("sqlite:///x").database == "x"
    for content in (b"", b"\n", b"@other", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(StoreError, match=str(file)):
            location.resolve_url()
    with pytest.raises(StoreError, match="No such file"):
        location.resolve_url("@/nowhere/url")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("nonsense", "cannot be read"),
        (f"postgresql://u:{PASSWORD}@h:port{PASSWORD}/db", "cannot be read"),
        (f"mysql://u:{PASSWORD}@h/db", "not in mysql"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("postgresql+psycopg2://h/db", "its driver, psycopg2, is not installed"),
        (f"postgresql+x{PASSWORD}://h/db", "does not have the driver"),
        (f"postgresql://u:{PASSWORD}@127.0.0.1:1/db", "PostgreSQL database db at 127.0.0.1: "),
        (f"postgresql://u@/db?host=/nowhere&password={PASSWORD}", "PostgreSQL database db at /nowhere: "),
        pytest.param("postgresql://u@/db?host=/nowhere", "No such file", marks=libpq()),
        ("sqlite:////proc/none/records.sqlite", "/proc/none"),
    ],
)
def test_unreachable_store_is_explained_without_its_password(url: str, why: str) -> None:
    """Neither the message, nor the cause of the error, nor a repr has the password."""

    def use() -> None:
        with Store(url) as store:
            assert PASSWORD not in repr(store)
            store.add(record("a"))

    with pytest.raises(StoreError) as caught:
        use()
    assert why in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@libpq()
def test_drivers_message_with_a_password_is_not_repeated() -> None:
    """Any text of the driver may hold the password."""
    store = Store(f"postgresql://u:{PASSWORD}@h/db?sslpassword=abc")
    for secret in (PASSWORD, "abc"):
        assert store._reason(RuntimeError(f"no such user u with {secret}")) == "RuntimeError"
    assert store._reason(RuntimeError("")) == "RuntimeError"
    assert store._reason(RuntimeError("no\nsuch")) == "no"


def test_missing_libpq_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Psycopg reports it as a failed import."""

    def refuse(*_args: object, **_options: object) -> None:
        raise ImportError("no pq wrapper available")

    monkeypatch.setattr(sqlalchemy, "create_engine", refuse)
    with pytest.raises(StoreError, match="libpq5"):
        Store("postgresql://u@h/db")


@postgresql()
def test_store_works_again_after_a_server_outage(postgres: Cluster) -> None:
    """During the outage an error names the reason."""
    with Store(postgres.new_database()) as store:
        store.add(record("a"))
        postgres.stop()
        try:
            for _ in range(2):
                with pytest.raises(StoreError, match="PostgreSQL database test"):
                    store.get("a")
        finally:
            postgres.start()
        assert store.get("a")._replace(row_id=0) == record("a")


@postgresql()
def test_missing_create_privilege_is_explained(postgres: Cluster) -> None:
    """The reason is PostgreSQL's own, and a user needs no such privilege for an existing table."""
    url = postgres.new_database()
    admin = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with admin.begin() as connection:
        connection.execute(sqlalchemy.text(f"CREATE ROLE app{os.getpid()} LOGIN"))
    app = url.replace("keyferry@", f"app{os.getpid()}@")
    with Store(app) as store, pytest.raises(StoreError, match="permission denied"):
        store.add(record("a"))
    with Store(url) as store:
        store.add(record("a"))
    with admin.begin() as connection:
        connection.execute(sqlalchemy.text(f"GRANT SELECT, INSERT, UPDATE ON keyferry_records TO app{os.getpid()}"))
    admin.dispose()
    with Store(app) as store:
        store.add(record("b"))
        assert store.replace([(store.get("a"), blob(NEW), NEW)]) == 1
