"""Records copied from store to store: every field as it was, none overwritten, and a killed copy finished by the next."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy
from support.agent import RunningAgent
from support.postgres import Cluster
from support.records import damage, fill, opened
from support.skip_unless import postgresql

from keyferry import command
from keyferry.store import Copied, Record, Store, StoreError, copy, schema, transfer
from keyferry.store import store as store_module
from keyferry.store.record import context_text


@pytest.fixture
def source(tmp_path: Path, agent: RunningAgent, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store of 7 records in SQLite, which is several pages here."""
    monkeypatch.setattr(transfer, "_PAGE_RECORDS", 3)
    with Store(f"sqlite:///{tmp_path / 'source.sqlite'}") as store, agent.client() as kms:
        fill(store, kms, 7, key_id="alias/dev")
        damage(store, "r1", "created", lambda _: "2020-01-31T12:00:00Z")
        with store._engine.begin() as connection:
            table = store_module._records
            changed = sqlalchemy.update(table).where(table.c.name == "r2").values(rewrapped="2021-01-31T12:00:00Z")
            connection.execute(changed)
        yield store


@pytest.fixture
def target(store_url: str) -> Iterator[Store]:
    """A store that does not exist yet, in each kind of database."""
    with Store(store_url) as store:
        yield store


def fields(store: Store) -> list[Record]:
    """The records in their order, without the numbers of their rows."""
    return [record._replace(row_id=0) for record in store]


def test_a_copy_keeps_every_field_and_the_order(source: Store, target: Store, agent: RunningAgent) -> None:
    """Dates are kept and the data keys open; a second copy finds all records present."""
    pages: list[int] = []
    assert copy(source, target, advanced=pages.append) == Copied(records=7, copied=7, present=0, refused=0)
    assert pages == [3, 3, 1]
    assert fields(target) == fields(source)
    with agent.client() as kms:
        assert opened(target, kms) == opened(source, kms)
    assert copy(source, target) == Copied(records=7, copied=0, present=7, refused=0)


def test_copy_works_from_postgresql_to_sqlite(source: Store, target: Store, tmp_path: Path) -> None:
    """Records that were copied to PostgreSQL are copied back to SQLite."""
    copy(source, target)
    with Store(f"sqlite:///{tmp_path / 'third.sqlite'}") as third:
        assert copy(target, third).copied == 7
        assert fields(third) == fields(source)


def test_a_copy_that_was_interrupted_is_finished_by_the_next(source: Store, target: Store) -> None:
    """Pages that an interrupted copy has written stay."""

    def interrupt(_count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(source, target, advanced=interrupt)
    assert target.count() == 3
    assert copy(source, target) == Copied(records=7, copied=4, present=3, refused=0)
    assert fields(target) == fields(source)


@pytest.mark.parametrize("column", ["ciphertext_blob", "encryption_context", "created", "key_version_id", "rewrapped"])
def test_a_record_that_differs_is_not_overwritten(source: Store, target: Store, column: str) -> None:
    """The difference is reported, and all other records are copied."""
    reasons: list[str] = []
    copy(source, target)
    damage(target, "r3", column, lambda _: "other")
    before = fields(target)
    assert copy(source, target, refused=reasons.append) == Copied(records=7, copied=0, present=6, refused=1)
    assert reasons == [f"r3: another record has this name in the target, and differs in {column}"]
    assert fields(target) == before


def test_a_damaged_record_is_left_where_it_is(source: Store, target: Store) -> None:
    """Bytes that are not text would be other bytes in the copy."""
    with closing(source._engine.raw_connection()) as connection:
        connection.execute("UPDATE keyferry_records SET key_id = CAST(X'ff41' AS TEXT) WHERE name = 'r0'")
        connection.execute("UPDATE keyferry_records SET created = 'a' || char(0) WHERE name = 'r4'")
        connection.execute("UPDATE keyferry_records SET name = ' r5' WHERE name = 'r5'")
        connection.commit()
    reasons: list[str] = []
    assert copy(source, target, refused=reasons.append) == Copied(records=7, copied=4, present=0, refused=3)
    assert reasons[:2] == [f"{name}: damaged in the source; repair the record there" for name in ("r0", "r4")]
    assert "not a valid record name" in reasons[2]


def test_empty_store_creates_no_target(source: Store, target: Store) -> None:
    """The target is created with its first record."""
    with source._engine.begin() as connection:
        connection.execute(sqlalchemy.delete(store_module._records))
    assert copy(source, target) == Copied(0, 0, 0, 0)
    with pytest.raises(StoreError, match="there is no store"):
        target.count()


# --- the commands -------------------------------------------------------------------------------------------------------


def test_command_counts_and_names_skipped_records(
    source: Store, store_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 1 if a record was skipped."""
    arguments = ["records", "copy", "--store", f"sqlite:///{tmp_path / 'source.sqlite'}", "--to", store_url]
    assert command.main(arguments) == 0
    ended = capsys.readouterr()
    assert (json.loads(ended.out), ended.err) == ({"Records": 7, "Copied": 7, "Present": 0, "Refused": 0}, "")
    damage(source, "r6", "created", lambda _: "2020-01-31T12:00:00Z")
    assert command.main(arguments) == 1
    ended = capsys.readouterr()
    assert json.loads(ended.out) == {"Records": 7, "Copied": 0, "Present": 6, "Refused": 1}
    assert ended.err == "keyferry: r6: another record has this name in the target, and differs in created\n"


@pytest.mark.parametrize("option", ["--store", "--to"])
def test_a_copy_repeats_no_password(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither URL's password is printed; a password on the command line is a warning, and one in a file is not."""
    with Store(f"sqlite:///{tmp_path / 'a.sqlite'}") as store:
        store.add(Record("a", "k", "v", "b", context_text({}), "2020-01-31T12:00:00Z"))
    secret = "postgresql://u:hunter2@127.0.0.1:1/db"
    (tmp_path / "url").write_text(secret)
    other = "--to" if option == "--store" else "--store"
    for url, warned in ((secret, True), (f"@{tmp_path / 'url'}", False)):
        assert command.main(["records", "copy", option, url, other, f"sqlite:///{tmp_path / 'a.sqlite'}"]) == 1
        err = capsys.readouterr().err
        assert ("a password on the command line" in err) is warned
        assert "PostgreSQL" in err
        assert "hunter2" not in err


def test_a_copy_to_nowhere_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty target is not the default store."""
    for arguments in (["--to", ""], []):
        with pytest.raises(SystemExit) as ended:
            command.main(["records", "copy", *arguments])
        assert ended.value.code == 2
    assert "--to" in capsys.readouterr().err


# --- the table, made by an administrator --------------------------------------------------------------------------------


def _statement(url: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert command.main(["records", "schema", "--store", url]) == 0
    return capsys.readouterr().out


def test_the_schema_makes_the_table_that_a_store_makes(
    source: Store, store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed schema has both dialects, may run twice, and needs no store."""
    statement = _statement(store_url, capsys)
    assert statement == f"{schema(store_url)}\n"
    with Store(store_url, create=False) as store:
        with pytest.raises(StoreError, match="there is no store"):
            store.count()
        if store._file is not None:
            store._file.create()
        for _ in range(2):
            with store._engine.begin() as connection:
                connection.exec_driver_sql(statement)
        assert store.count() == 0
        columns = sqlalchemy.inspect(store._engine).get_columns("keyferry_records")
        assert copy(source, store).copied == 7
    assert [column["name"] for column in columns] == list(store_module._records.columns.keys())


@postgresql()
def test_a_role_without_create_uses_the_administrators_table(
    postgres: Cluster, source: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """The grants of docs/records.md are enough; without the table, the message names the command that prints it."""
    admin_url = postgres.new_database()
    role_url = admin_url.replace("keyferry@", "orders@")
    with Store(admin_url) as admin:

        def run(statement: str) -> None:
            with admin._engine.begin() as connection:
                connection.exec_driver_sql(statement)

        run("DROP ROLE IF EXISTS orders")
        run("CREATE ROLE orders LOGIN")
        with Store(role_url) as store, pytest.raises(StoreError) as caught:
            copy(source, store)
        assert "permission denied for schema public. Have a role" in str(caught.value)
        assert "`keyferry records schema`" in str(caught.value)
        run(_statement(admin_url, capsys))
        with Store(role_url) as store, pytest.raises(StoreError, match="permission denied for table"):
            store.count()
        run("GRANT SELECT, INSERT, UPDATE ON keyferry_records TO orders")
        with Store(role_url) as store:
            assert copy(source, store).copied == 7
            (record, *_) = store
            assert store.replace([(record, "blob", "version")]) == 1
        run("DROP OWNED BY orders")
        run("DROP ROLE orders")
