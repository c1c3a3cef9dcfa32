"""SQLite's files: one path for every form of URL, and a store that does not exist is never taken for an empty one."""

import os
import pwd
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.skip_unless import ROOT, root
from test_store import NEW, blob, record

from keyferry import Client
from keyferry.store import Store, StoreError, rewrap

EXISTS = "a b%20c#d.db"
ENCODED = "a%20b%2520c%23d.db"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working and home folder, with a store in it that has one record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with Store(f"sqlite:///{tmp_path / EXISTS}") as store:
        store.add(record("a"))
    return tmp_path


@pytest.mark.parametrize(
    "url",
    [
        f"sqlite:///{EXISTS}",
        f"sqlite:///./{EXISTS}",
        f"SQLite+pysqlite:///{EXISTS}",
        "sqlite:///{folder}/" + EXISTS,
        "sqlite:////{folder}/" + EXISTS,
        f"sqlite:///~/{EXISTS}",
        f"sqlite:///{EXISTS}?mode=ro",
        f"sqlite:///{EXISTS}?timeout=5&mode=rw",
        f"sqlite:///file:{ENCODED}?uri=true",
        f"sqlite:///file:{ENCODED}?mode=ro&uri=true",
        f"sqlite:///file:{ENCODED}?uri=1&mode=rw&cache=shared",
        f"sqlite:///file:{ENCODED}#fragment?uri=true",
        "sqlite:///file:{folder}/" + ENCODED + "?mode=ro&uri=true",
        "sqlite:///file://{folder}/" + ENCODED + "?mode=ro&uri=true&immutable=1",
        "sqlite:///file://localhost{folder}/" + ENCODED + "?uri=true",
    ],
)
def test_every_form_of_a_url_leads_to_the_same_file(url: str, folder: Path) -> None:
    """The file is opened there, and not created anywhere else."""
    with Store(url.format(folder=folder)) as store:
        assert store._exists()
        assert [each.name for each in store] == ["a"]
        assert (store.count(), store.key_ids(), store.get("a").name) == (1, ["a-key"], "a")
        assert EXISTS in repr(store)
    assert os.listdir(folder) == [EXISTS]


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///none.db",
        f"sqlite:///{ENCODED}",
        "sqlite:////no/such",
        "sqlite:///~/none.db",
        "sqlite:///C:\\none.db",
        "sqlite:///c:/none/none.db",
        "sqlite:///file:none.db?uri=true",
        "sqlite:///file:none.db?mode=ro&uri=true",
        "sqlite:///file:none.db?mode=rwc&uri=true",
        "sqlite:///./file:none.db",
        "sqlite:///\udcff.db",
    ],
)
def test_a_store_that_does_not_exist_is_an_error(url: str, folder: Path) -> None:
    """Every method but `add` raises, and none of them creates the store."""
    calls: list[Callable[[Store], Any]] = [
        list,
        Store.count,
        Store.key_ids,
        lambda store: store.get("a"),
        lambda store: rewrap(store, Client(folder / "agent.sock")),
        lambda store: rewrap(store, Client(folder / "agent.sock"), dry_run=True),
    ]
    for call in calls:
        with Store(url) as store, pytest.raises(StoreError, match="there is no") as caught:
            call(store)
        assert store._place in str(caught.value)
    with Store(url) as store:
        assert not store._exists()
        store.check_free("a")
    changes: list[Callable[[Store], Any]] = [
        lambda store: store.add(record("a")),
        lambda store: store.check_free("a"),
    ]
    for change in changes:
        with Store(url, create=False) as store, pytest.raises(StoreError, match="there is no store"):
            change(store)
    assert os.listdir(folder) == [EXISTS]


def test_a_file_without_the_table_is_not_a_store(folder: Path) -> None:
    """An empty file and another program's database are refused."""
    (folder / "empty.db").touch()
    with closing(sqlite3.connect(folder / "other.db")) as database:
        database.execute("CREATE TABLE other (x)")
    for name in ("empty.db", "other.db"):
        with Store(f"sqlite:///{name}") as store:
            with pytest.raises(StoreError, match=f"no store in .*/{name}"):
                store.count()
            store.add(record("a"))
            assert store.count() == 1


def test_a_store_without_records_is_not_an_error(folder: Path) -> None:
    """A store that was created and has no record is valid."""
    with Store(f"sqlite:///{EXISTS}") as store, store._engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM keyferry_records")
    with Store(f"sqlite:///{EXISTS}") as store:
        assert (list(store), store.count(), store.key_ids()) == ([], 0, [])


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///", "in memory"),
        ("sqlite://:memory:", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file::memory:?uri=true", "in memory"),
        ("sqlite:///file:?uri=true", "in memory"),
        ("sqlite:///file:x?mode=memory&cache=shared&uri=true", "in memory"),
        ("sqlite:///x.db?mode=memory", "in memory"),
        ("sqlite:///file:/x?vfs=memdb&uri=true", "in memory"),
        ("sqlite://x.db", "three slashes for a relative path .* four for an absolute path"),
        ("sqlite://folder/x.db", "three slashes"),
        ("sqlite://localhost/x.db", "three slashes"),
        ("sqlite://C:/x.db", "three slashes"),
        ("sqlite://~/x.db", "three slashes"),
        ("sqlite:/x.db", "three slashes"),
        ("sqlite:x.db", "three slashes"),
        ("sqlite:///file:x.db", "add uri=true"),
        ("sqlite:///file:x.db?mode=ro", "add uri=true"),
        ("sqlite:///file://host/x.db?uri=true", "begins with file:/"),
        ("sqlite:///file:a%00b?uri=true", "null character"),
        ("sqlite:///a\0b", "null character"),
        ("sqlite:///x?y.db", "NAME=VALUE"),
        ("sqlite:///x.db?mode=no", 'the option "mode"'),
        ("sqlite:///x.db?uri=perhaps", 'the option "uri"'),
        ("sqlite:///x.db?timeout=abc", 'the option "timeout"'),
        ("sqlite:///x.db?timeout=nan", 'the option "timeout"'),
        ("sqlite:///x.db?timeout=1e300", 'the option "timeout"'),
        ("sqlite:///x.db?isolation_level=None", 'the option "isolation_level"'),
        ("sqlite:///x.db?check_same_thread=x", 'the option "check_same_thread"'),
        ("sqlite:///x.db?detect_types=x", 'the option "detect_types"'),
        ("sqlite:///x.db?journal_mode=wal", "an option of the store's URL"),
        ("sqlite:///~nobody-at-all/x.db", "no such user"),
        ("sqlite+aiosqlite:///x.db", "does not have the driver"),
        (f"sqlite:///{ROOT}", "a folder, not a file"),
        ("sqlite:///~", "a folder, not a file"),
        ("sqlite:////dev/null", "not a regular file"),
        (f"sqlite:///{ROOT / 'Makefile'}", "file is not a database"),
        (f"sqlite:///{ROOT / 'Makefile'}/x.db", "Not a directory"),
        ("sqlite:///" + "x" * 300, "File name too long"),
        (f"sqlite:///{EXISTS}?vfs=none", "no such vfs"),
    ],
)
def test_unusable_url_is_explained(url: str, why: str, folder: Path) -> None:
    """Reading and adding have the same reason, and no file is created."""
    for use in (Store.count, lambda store: store.add(record("b"))):
        with pytest.raises(StoreError, match=why), Store(url) as store:
            use(store)
    assert os.listdir(folder) == [EXISTS]


@pytest.mark.parametrize("mode", ["ro", "rw"])
def test_mode_without_creation_is_respected(mode: str, folder: Path) -> None:
    """`add` does not create the file either, and a store that is opened read-only is not changed."""
    with Store(f"sqlite:///none.db?mode={mode}") as store, pytest.raises(StoreError, match=f"mode={mode}"):
        store.add(record("a"))
    with Store(f"sqlite:///file:{ENCODED}?mode=ro&uri=true") as store:
        for change in (
            lambda: store.add(record("b")),
            lambda: store.replace([(store.get("a"), blob(NEW), NEW)]),
        ):
            with pytest.raises(StoreError, match="readonly"):
                change()
        assert next(iter(store)).key_version_id != NEW
    assert os.listdir(folder) == [EXISTS]


def test_replaced_file_is_the_store_from_then_on(folder: Path) -> None:
    """No record is written to a file that has lost its name."""
    with Store(f"sqlite:///{EXISTS}") as store:
        assert store.count() == 1
        (folder / EXISTS).rename(folder / "old")
        with pytest.raises(StoreError, match="there is no store"):
            store.count()
        store.add(record("b"))
        assert [each.name for each in store] == ["b"]


def test_a_missing_working_directory_is_an_error_of_the_store(folder: Path) -> None:
    """Only relative paths need a working directory."""
    (folder / "gone").mkdir()
    os.chdir(folder / "gone")
    (folder / "gone").rmdir()
    with pytest.raises(StoreError, match="working directory"):
        Store("sqlite:///x.db")
    with Store(f"sqlite:///{folder / EXISTS}") as store:
        assert store.count() == 1


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_user_without_a_home_needs_an_explicit_store(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is made in the working directory, and a passwd entry replaces $HOME."""
    monkeypatch.chdir(tmp_path)
    for name in ("KEYFERRY_STORE", "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert repr(Store("sqlite:///~/x.db")) == f"Store('{pwd.getpwuid(os.getuid()).pw_dir}/x.db')"
    monkeypatch.setattr(os, "getuid", lambda: 3_999_999_999)
    for url in (None, "sqlite:///~/x.db", "sqlite:///file:~/x.db?uri=true"):
        with pytest.raises(StoreError, match=r"set \$KEYFERRY_STORE"):
            Store(url)
    assert os.listdir(tmp_path) == []


# --- files that this user may not write, or read ------------------------------------------------------------------------


@pytest.fixture
def shared(folder: Path) -> Path:
    """Stores of another user's, some in WAL mode, in folders that others may read or not."""
    for name in (".", "closed"):
        place = folder / name
        place.mkdir(exist_ok=True)
        for store_name, mode in (("plain.db", "delete"), ("wal.db", "wal")):
            with closing(sqlite3.connect(place / store_name)) as database:
                database.execute(f"PRAGMA journal_mode={mode}")
            with Store(f"sqlite:///{place / store_name}") as store:
                store.add(record("a"))
    (folder / "secret.db").write_bytes((folder / "plain.db").read_bytes())
    (folder / "secret.db").chmod(0o600)
    (folder / "closed").chmod(0o700)
    for parent in folder.parents:
        if parent.stat().st_mode & 0o777 == 0o700:
            parent.chmod(0o711)
    folder.chmod(0o755)
    return folder


def as_nobody(work: Callable[[], str]) -> str:
    """Return a function's result, or the store's error, in a process of another user."""
    near, far = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65_534)
            os.setuid(65_534)
            try:
                result = work()
            except StoreError as error:
                result = f"StoreError: {error}"
            os.write(far, result.encode())
        finally:
            os._exit(0)
    os.close(far)
    with open(near, "rb") as answer:
        text = answer.read().decode()
    os.waitpid(child, 0)
    return text


@root()
@pytest.mark.parametrize(
    ("url", "reading", "adding"),
    [
        ("plain.db", "1", "attempt to write a readonly database"),
        ("plain.db?mode=ro", "1", "attempt to write a readonly database"),
        ("wal.db", "the file is in WAL mode", "the file is in WAL mode"),
        ("wal.db?mode=ro", "the file is in WAL mode", "the file is in WAL mode"),
        ("wal.db?immutable=1", "1", "attempt to write a readonly database"),
        ("secret.db", "Permission denied", "Permission denied"),
        ("closed/plain.db", "Permission denied", "Permission denied"),
        ("closed/none.db", "Permission denied", "Permission denied"),
        ("none.db", "there is no store", "Permission denied"),
        ("none/none.db", "there is no store", "Permission denied"),
    ],
)
def test_missing_file_permission_is_an_error(url: str, reading: str, adding: str, shared: Path) -> None:
    """A store that cannot be looked up is not called missing, and a read-only one is not called empty."""
    place = f"sqlite:///{shared}/{url}"

    def read() -> str:
        with Store(place) as store:
            return str(store.count())

    def add() -> str:
        with Store(place) as store:
            store.add(record("b"))
        return "added"

    assert reading in as_nobody(read)
    assert adding in as_nobody(add)
