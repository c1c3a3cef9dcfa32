"""A store's URL: every form of it that PostgreSQL's own programs accept, and that no error shows a password."""

import io
import logging
import string
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest
import sqlalchemy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.postgres import Cluster
from support.skip_unless import libpq, postgresql
from test_store import record

from keyferry import command
from keyferry.store import Store, StoreError, engine, location

ENCODED = "percent-encoded"


def connecting(url: str) -> dict[str, Any]:
    """The options of libpq that a URL stands for."""
    found = engine._libpq_options(location.resolve_url(url))
    return {name: value for name, value in found.items() if name not in ("client_encoding", "prepare_threshold")}


@libpq()
@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("postgres://u@h/d", {"user": "u", "host": "h", "dbname": "d"}),
        ("PostgreSQL://u@h:5433/d", {"user": "u", "host": "h", "port": "5433", "dbname": "d"}),
        ("postgresql+psycopg://h", {"host": "h"}),
        ("postgresql://", {}),
        ("postgresql:///d", {"dbname": "d"}),
        ("postgresql://u@/d?host=/run/postgresql", {"user": "u", "host": "/run/postgresql", "dbname": "d"}),
        ("postgresql://u@:5433/d?host=/run/pg", {"user": "u", "host": "/run/pg", "port": "5433", "dbname": "d"}),
        ("postgresql://%2Frun%2Fpg/d", {"host": "/run/pg", "dbname": "d"}),
        ("postgresql://u@/d?host=%40abstract", {"user": "u", "host": "@abstract", "dbname": "d"}),
        ("postgresql://h1:1,h2:2/d", {"host": "h1,h2", "port": "1,2", "dbname": "d"}),
        ("postgresql://h1,h2:2/d", {"host": "h1,h2", "port": ",2", "dbname": "d"}),
        ("postgresql://h1,h2/d", {"host": "h1,h2", "dbname": "d"}),
        ("postgresql:///d?host=h1:1&host=h2:2", {"host": "h1,h2", "port": "1,2", "dbname": "d"}),
        ("postgresql:///d?host=h1,h2&port=1,2", {"host": "h1,h2", "port": "1,2", "dbname": "d"}),
        ("postgresql:///d?host=h1,h2&port=1", {"host": "h1,h2", "port": "1", "dbname": "d"}),
        ("postgresql://u@[::1]:5433/d", {"user": "u", "host": "::1", "port": "5433", "dbname": "d"}),
        ("postgresql://[fe80::1%25eth0]/d", {"host": "fe80::1%eth0", "dbname": "d"}),
        ("postgresql://[::1],[::2]:2/d", {"host": "::1,::2", "port": ",2", "dbname": "d"}),
        ("postgresql:///d?host=::1", {"host": "::1", "dbname": "d"}),
        ("postgresql:///?service=orders", {"service": "orders"}),
        ("postgresql:///?passfile=/p&sslmode=verify-full", {"passfile": "/p", "sslmode": "verify-full"}),
        ("postgresql://h/d?ssl=true", {"host": "h", "dbname": "d", "sslmode": "require"}),
        ("postgresql://h/d?sslmode=&", {"host": "h", "dbname": "d"}),
        ("postgresql://a%40b:p%40%3A%2F%25%23%20%3F@h/d", {"user": "a@b", "password": "p@:/%# ?", "host": "h", "dbname": "d"}),
        ("postgresql://u:a:b#c@h/d", {"user": "u", "password": "a:b#c", "host": "h", "dbname": "d"}),
        ("postgresql://u:%C3%A9@h/d", {"user": "u", "password": "é", "host": "h", "dbname": "d"}),
        ("postgresql://h/a%20b", {"host": "h", "dbname": "a b"}),
        ("postgresql://h/d?user=u&password=a%26b", {"host": "h", "dbname": "d", "user": "u", "password": "a&b"}),
        ("postgresql://h/d?connect_timeout=3", {"host": "h", "dbname": "d", "connect_timeout": "3"}),
    ],
)  # fmt: skip
def test_a_postgresql_url_is_read_as_libpq_reads_it(url: str, options: dict[str, str]) -> None:
    """Hosts, ports and passwords may be written in each of libpq's ways."""
    assert connecting(url) == {"connect_timeout": 60, **options}
    Store(url).close()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://app:MARK@half@h/d",
        "postgresql://app:s3@MARK@h/d",
        "postgresql://app:s/MARK@h/d",
        "postgresql://app:12/MARK@h/d",
        "postgresql://app:s?MARK@h/d",
        "postgresql://app:12?MARK=x@h/d",
        "postgresql://app:12?host=MARK@h/d",
        "postgresql://app:MARK%@h/d",
        "postgresql://app:MARK%zz@h/d",
        "postgresql://app:MARK%ff@h/d",
        "postgresql://app:MARK\udcff@h/d",
        "postgresql://app:MARK\n@h/d",
        "postgresql://app:MARK/d",
        "postgresql://app:MARK",
        "postgresql://app:99999/MARK@h",
        "postgresql://app:123456/d",
        "postgresql://h:5432/d?password=MARK@MARK",
        "postgresql://u:[MARK]/d",
        "postgresql://[MARK]/d",
        "postgresql://a:b:MARK/d",
    ],
)
def test_a_password_that_is_not_encoded_is_refused(url: str) -> None:
    """The message has the encoding to use, and no part of the password."""
    with pytest.raises(StoreError, match=ENCODED) as caught:
        location.resolve_url(url)
    for part in ("MARK", "half", "123456", "99999"):
        assert part not in str(caught.value)


@libpq()
@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("postgresql://h/d?prepare_threshold=0", 'the option "prepare_threshold"'),
        ("postgresql://h/d?prepare_threshold=None", 'the option "prepare_threshold"'),
        ("postgresql://h/d?row_factory=dict_row", 'the option "row_factory"'),
        ("postgresql://h/d?autocommit=true", 'the option "autocommit"'),
        ("postgresql://h/d?cursor_factory=x", 'the option "cursor_factory"'),
        ("postgresql://h/d?context=x", 'the option "context"'),
        ("postgresql://h/d?conninfo=password%3DMARK", 'the option "conninfo"'),
        ("postgresql://127.0.0.1:1/d?connect_timeout=MARK", "connect_timeout"),
        ("postgresql://127.0.0.1:1/d?keepalives=x", "keepalives"),
        ("postgresql://127.0.0.1:1/d?sslmode=x", "sslmode"),
        ("postgresql://127.0.0.1:1/d?target_session_attrs=x", "target_session_attrs"),
        ("postgresql://h/d?sslmod=x", 'similar to "sslmode"'),
        ("postgresql://h/d?password=a&MARK=b", "not an option of this system's libpq"),
        ("postgresql://h/d?password=a&MARK", "NAME=VALUE"),
        ("postgresql://h/d?sslmode=a&sslmode=b", 'the option "sslmode" of the store\'s URL occurs twice'),
        ("postgresql://h/d?port=x", "a port is a number"),
        ("postgresql://h:0/d", "a port is a number"),
        ("postgresql:///d?host=a,b&port=1,2,3", "numbers of hosts and ports"),
        ("postgresql:///?service=none", "none"),
        ("postgresql://u@/d?host=/nowhere&passfile=/nowhere", "/nowhere"),
        ("postgresql://h%00/d", "null character"),
        ("MARK", "sqlite:///FILE or postgresql://USER@HOST/DATABASE"),
        ("host=h password=MARK", "sqlite:///FILE or postgresql://USER@HOST/DATABASE"),
        ("jdbc:postgresql://h/d?password=MARK", "sqlite:///FILE or postgresql://USER@HOST/DATABASE"),
        ("MARK://h/d", "not in another kind of database"),
        ("postgresql://h/" + "x" * 5_000, "longer than"),
    ],
)
def test_unusable_options_are_named(url: str, why: str) -> None:
    """The error is raised at the opening or the first use, without a traceback of a driver's."""
    with pytest.raises(StoreError) as caught, Store(url) as store:
        store.count()
    assert why in str(caught.value)
    assert "MARK" not in str(caught.value) or "connect_timeout" in url


@libpq()
def test_every_exception_of_a_driver_is_a_store_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of the wrong type is not the only way in which drivers fail when they connect."""
    for kind in (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ZeroDivisionError):
        with Store("postgresql://u:MARK@h/d") as store:

            def connect(*_args: object, kind: type[Exception] = kind) -> None:
                raise kind("MARK is not supported")

            monkeypatch.setattr(store._engine, "connect", connect)
            with pytest.raises(StoreError, match=kind.__name__) as caught:
                store.count()
        assert "MARK" not in str(caught.value)


@libpq()
def test_several_hosts_that_fail_are_all_named() -> None:
    """The message has each host, and not only their number."""
    with pytest.raises(StoreError) as caught, Store("postgresql://u@127.0.0.1:1,127.0.0.1:2/d") as store:
        store.count()
    assert "127.0.0.1" in str(caught.value).partition(": ")[2]


@postgresql()
def test_records_are_utf8_whatever_the_url_says(postgres: Cluster) -> None:
    """The store sets the encoding of its connections, not the URL or the environment."""
    with Store(f"{postgres.new_database()}&client_encoding=LATIN1") as store:
        store.add(record("名"))
        assert store.get("名").name == "名"


@postgresql()
def test_text_that_a_database_refuses_is_an_error(postgres: Cluster) -> None:
    """The error has no traceback of a driver's."""
    with Store(postgres.new_database()) as store:
        for text in ("\ud800", "a\0b"):
            with pytest.raises(StoreError):
                store.add(record("a")._replace(key_id=text))
        with store._engine.begin() as connection:
            assert not sqlalchemy.inspect(connection).has_table("keyferry_records")


# --- no error shows a password ----------------------------------------------------------------------------------------

FIRST, LAST = "xqFIRSTqx", "xqLASTqx"
_CHARACTERS = st.sampled_from([*"@:/%#?&= []\\'\"+,;\n\t\0\udcff\ud800é", *string.ascii_letters[:4], "//", "%4", "%zz"])
_TRICKY = st.lists(_CHARACTERS, max_size=6).map("".join)
_FORMS = st.sampled_from(
    [
        "postgresql://app:{}@127.0.0.1:1/db",
        "postgres://app:{}@127.0.0.1:1/db?sslmode=disable",
        "postgresql+psycopg://:{}@127.0.0.1:1",
        "postgresql://app:{}@127.0.0.1:1,127.0.0.1:2/db",
        "postgresql://app:{}@[::1]:1/db",
        "postgresql://app:{}@/db?host=/nowhere",
        "postgresql://app:{}@127.0.0.1:1/db?row_factory=x",
        "postgresql://app:{}@127.0.0.1:1/db?connect_timeout=x",
        "postgresql://app:{}@127.0.0.1:port/db",
        "postgresql://app:{}@127.0.0.1:1/d@b",
        "postgresql+none://app:{}@127.0.0.1:1/db",
        "postgresql+psycopg2://app:{}@127.0.0.1:1/db",
        "mysql://app:{}@127.0.0.1:1/db",
        "sqlite://app:{}@127.0.0.1:1/db",
        "postgresql://app@127.0.0.1:1/db?password={}",
        "postgresql://127.0.0.1:1/db?password={}&sslmode=x",
        "postgresql:///db?host=/nowhere&sslpassword={}",
        "postgresql:/app:{}@127.0.0.1:1/db",
        "app:{}@127.0.0.1:1/db",
    ]
)


def everything_about(url: str) -> str:
    """Return every visible trace of an unusable store: in Python, in logs, and from a shell."""
    seen = io.StringIO()
    handler = logging.StreamHandler(seen)
    logging.getLogger().addHandler(handler)
    try:
        with redirect_stderr(seen), redirect_stdout(seen):
            try:
                with Store(url) as store:
                    print(repr(store), store._engine, store._engine.url)
                    list(store)
            except StoreError as error:
                print(str(error), repr(error), "".join(traceback.format_exception(error)))
            assert command.main(["records", "list", "--store", url]) == 1
    finally:
        logging.getLogger().removeHandler(handler)
    return seen.getvalue()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(form=_FORMS, tricky=_TRICKY)
@example(form="postgresql://app:{}@127.0.0.1:1/db", tricky="@")
@example(form="postgresql://app:{}@127.0.0.1:1/db", tricky="\udcff")
@example(form="postgresql://app@127.0.0.1:1/db?password={}", tricky="&")
def test_no_error_shows_a_password_or_a_part_of_it(form: str, tricky: str) -> None:
    """The password may have any characters, and the URL further faults."""
    seen = everything_about(form.format(FIRST + tricky + LAST))
    assert FIRST not in seen
    assert LAST not in seen
    assert "a password on the command line" in seen or "://" not in form or form.startswith("sqlite:")
