"""Stores data-key records in one table, through SQLAlchemy Core. No lock is held during a call to an agent.

Columns are text in the API's form: identical in both databases, and readable in the shell of either. A column never changes
its meaning. A new column is added with a default.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Self
from urllib.parse import quote

import sqlalchemy as sql
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql, sqlite

from .engine import make_engine
from .location import display_url, resolve_url, url_secrets
from .record import MAX_NAME_CHARACTERS, VERSION_PREFIX, Record, StoreError, check_name, now, printable, version_prefix
from .sqlite import sqlite_file

__all__ = ["Store", "schema"]

_PAGE_RECORDS: Final = 500
"""Records in memory at a time."""

_records: Final = sql.Table(
    "keyferry_records",
    sql.MetaData(),
    # Pages are ordered by this number, because its order does not depend on a database's collation of the names.
    # An identity, not a serial: with a serial, a role that inserts rows would also need a grant on the sequence.
    sql.Column("row_id", sql.BigInteger().with_variant(sql.Integer(), "sqlite"), sql.Identity(), primary_key=True),
    # Collation C: an index over text in a language's order breaks when an update of the C library changes that order.
    sql.Column(
        "name",
        sql.String(MAX_NAME_CHARACTERS).with_variant(sql.String(MAX_NAME_CHARACTERS, collation="C"), "postgresql"),
        nullable=False,
        unique=True,
    ),
    sql.Column("key_id", sql.Text, nullable=False),
    sql.Column("key_version_id", sql.Text, nullable=False),
    sql.Column("ciphertext_blob", sql.Text, nullable=False),
    sql.Column("encryption_context", sql.Text, nullable=False),
    sql.Column("created", sql.Text, nullable=False),
    sql.Column("rewrapped", sql.Text),
    sqlite_autoincrement=True,
)
_c: Final = _records.c
_SELECT: Final = sql.select(
    _c.name,
    _c.key_id,
    _c.key_version_id,
    _c.ciphertext_blob,
    _c.encryption_context,
    _c.created,
    _c.rewrapped,
    _c.row_id,
)
# Compare and swap: a row that another process has changed since it was read does not match, and stays as it is.
_REPLACE: Final = (
    sql.update(_records)
    .where(
        _c.row_id == sql.bindparam("of_row"),
        _c.ciphertext_blob == sql.bindparam("old_blob"),
        _c.key_id == sql.bindparam("of_key"),
        _c.encryption_context == sql.bindparam("of_context"),
    )
    .values(
        ciphertext_blob=sql.bindparam("new_blob"),
        key_version_id=sql.bindparam("new_version"),
        rewrapped=sql.bindparam("at"),
    )
)


_DIALECTS: Final = {"sqlite": sqlite, "postgresql": postgresql}
_NOT_PERMITTED: Final = "42501"
"""PostgreSQL's SQLSTATE insufficient_privilege."""


def schema(url: str | None = None) -> str:
    """Return the statement that creates the table, in the dialect of the store's URL, without connecting to the store.

    Raises `StoreError`.
    """
    dialect = _DIALECTS[resolve_url(url).get_backend_name()].dialect()
    lines = str(_create_table().compile(dialect=dialect)).strip().splitlines()
    return "\n".join(line.rstrip() for line in lines) + ";"


def _create_table() -> sql.schema.CreateTable:
    return sql.schema.CreateTable(_records, if_not_exists=True)


class Store:
    """A database of records. Safe to use from several processes at once.

    `url` is an SQLAlchemy URL of SQLite or PostgreSQL, or `@FILE` with such a URL in its first line. None means
    `$KEYFERRY_STORE`, else an SQLite file under `$XDG_DATA_HOME/keyferry`.

    `add` creates a missing store (the file, its folder, the table), unless `create=False`. All other methods
    raise `StoreError` for a missing store and do not treat it as an empty one, except `named` and `check_free`, which prepare
    an `add`. All methods raise `StoreError`.
    """

    def __init__(self, url: str | None = None, *, create: bool = True) -> None:
        self._url = resolve_url(url)
        self._place = display_url(self._url)
        self._create = create
        self._file = sqlite_file(self._url) if self._url.get_backend_name() == "sqlite" else None
        self._engine = make_engine(self._url, self._place, self._file)
        self._process = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self._place!r})"

    def __reduce__(self) -> str:
        raise TypeError("a Store cannot be pickled, because its URL may hold a password: open one in each process")

    def close(self) -> None:
        """Close the connections to the database."""
        self._engine.dispose()

    def add(self, *records: Record) -> None:
        """Add all records in one transaction. Raises `StoreError`, and adds none of them, if a name is taken."""
        for record in records:
            check_name(record.name)
        rows = [_row(record) for record in records]
        if not self._create:
            self._require()
        elif self._file is not None:
            self._file.create()
        try:
            with self._transaction() as connection:
                if self._create:
                    self._create_missing_table(connection)
                connection.execute(sql.insert(_records), rows)
        except exc.IntegrityError:
            names = records[0].name if len(records) == 1 else "one of these names"
            raise _taken(names) from None

    def renew(self, old_record: Record, added_record: Record, old_name: str) -> None:
        """Rename `old_record` to `old_name`, and add `added_record` under its former name. A failure changes neither.

        One transaction does both. `added_record` has the name that `old_record` has in the database.
        """
        check_name(old_name)
        self._require()
        rename = (
            sql.update(_records).where(_c.row_id == old_record.row_id, _c.name == old_record.name).values(name=old_name)
        )
        try:
            with self._transaction() as connection:
                if connection.execute(rename).rowcount != 1:
                    raise StoreError(
                        f"{printable(old_record.name)}: another process renamed it meanwhile; nothing was changed"
                    )
                connection.execute(sql.insert(_records), [_row(added_record)])
        except exc.IntegrityError:
            raise _taken(printable(old_name)) from None

    def check_free(self, name: str) -> None:
        """Raise `StoreError` for a name that is invalid or taken. Callers check it before they have a data key generated."""
        check_name(name)
        if not self._create:
            self._require()
        if self._exists() and self._one(name) is not None:
            raise _taken(name)

    def get(self, name: str) -> Record:
        """Return the record with this name. Raises `StoreError` if the name is unknown."""
        self._require(f"there is no record {printable(name)} in {self._place}, because it does not exist")
        record = self._one(name)
        if record is None:
            raise StoreError(f"there is no record {printable(name)} in {self._place}")
        return record

    def named(self, names: Iterable[str]) -> dict[str, Record]:
        """Return the records with these names, by name. Empty if the store does not exist yet."""
        rows = self._rows(_SELECT.where(_c.name.in_(list(names)))) if self._exists() else []
        return {record.name: record for record in (Record(*row) for row in rows)}

    def __iter__(self) -> Iterator[Record]:
        """Yield all records in the order in which they were added, with one page of them in memory at a time."""
        yield from self._pages()

    def count(self, key_id: str | None = None, *, not_under: str | None = None) -> int:
        """Return the number of records; with `key_id`, of one master key; with `not_under`, of those under other versions."""
        query = sql.select(sql.func.count()).select_from(_records).where(*_matching(key_id, not_under))
        self._require()
        return int(self._rows(query)[0][0])

    def key_ids(self) -> list[str]:
        """Return the IDs of all master keys that have records."""
        self._require()
        return [row[0] for row in self._rows(sql.select(_c.key_id).distinct().order_by(_c.key_id))]

    def not_under(self, key_id: str, key_version_id: str) -> Iterator[list[Record]]:
        """Yield pages of a master key's records under other versions than this. Callers may replace records between pages."""
        last_id = 0
        while page := self._page(last_id, _matching(key_id, key_version_id)):
            yield page
            last_id = page[-1].row_id

    def replace(self, changes: Iterable[tuple[Record, str, str]]) -> int:
        """Give records a new CiphertextBlob and KeyVersionId, in one transaction; return the number of replaced records.

        A record that has changed in the database since it was read stays as it is. Pass records in the order of their pages.
        """
        at = now()
        rows = [
            {
                "of_row": record.row_id,
                "of_key": record.key_id,
                "of_context": record.context_text,
                "old_blob": record.ciphertext_blob,
                "new_blob": blob,
                "new_version": version,
                "at": at,
            }
            for record, blob, version in changes
        ]
        if not rows:
            return 0
        with self._transaction() as connection:
            # Every process updates rows in the same order, so two that replace the same rows cannot deadlock.
            return connection.execute(_REPLACE, rows).rowcount

    def _one(self, name: str) -> Record | None:
        rows = self._rows(_SELECT.where(_c.name == name)) if name.isprintable() else []
        return Record(*rows[0]) if rows else None

    def _pages(self) -> Iterator[Record]:
        self._require()
        last_id = 0
        while page := self._page(last_id, []):
            yield from page
            last_id = page[-1].row_id

    def _page(self, last_id: int, conditions: list[Any]) -> list[Record]:
        query = _SELECT.where(_c.row_id > last_id, *conditions).order_by(_c.row_id).limit(_PAGE_RECORDS)
        return [Record(*row) for row in self._rows(query)]

    def _rows(self, query: Any) -> list[Any]:
        with self._transaction() as connection:
            return list(connection.execute(query))

    def _exists(self) -> bool:
        """Return True if the table exists. The check does not create a file."""
        if self._file is not None and not self._file.exists():
            return False
        with self._transaction() as connection:
            return sql.inspect(connection).has_table(_records.name)

    def _require(self, why: str = "") -> None:
        """Raise `StoreError` if the store does not exist, instead of treating it as empty: its URL may be wrong."""
        if not self._exists():
            why = why or f"there is no store in {self._place}"
            raise StoreError(
                f"{why}: name another with --store or $KEYFERRY_STORE, or make it with 'keyferry records add'"
            )

    def _create_missing_table(self, connection: sql.Connection) -> None:
        if not sql.inspect(connection).has_table(_records.name):
            if connection.dialect.name == "postgresql":  # IF NOT EXISTS alone fails if two create the table at once
                connection.execute(sql.text("SELECT pg_advisory_xact_lock(hashtext('keyferry_records'))"))
            connection.execute(_create_table())

    @contextmanager
    def _transaction(self) -> Iterator[sql.Connection]:
        """Lend a connection for one transaction. Turns the driver's errors into `StoreError`, except `IntegrityError`."""
        with self._connected() as connection:
            try:
                with connection.begin():
                    yield connection
            except exc.IntegrityError:
                raise
            except (exc.SQLAlchemyError, OSError, TypeError, ValueError) as error:
                raise StoreError(f"{self._place}: {self._reason(error)}") from None

    @contextmanager
    def _connected(self) -> Iterator[sql.Connection]:
        """Lend a connection that belongs to this process. A driver may raise any exception for a URL's options."""
        if self._process != os.getpid():  # after a fork, the connections in the pool belong to the parent
            self._inherited = self._engine.pool  # referenced, because drivers warn of connections that are not closed
            self._engine.dispose(close=False)
            self._process = os.getpid()
        try:
            connection = self._engine.connect()
        except Exception as error:
            raise StoreError(f"{self._place}: {self._reason(error)}") from None
        with connection:
            yield connection

    def _reason(self, error: Exception) -> str:
        """Return the first line of the driver's message, without SQLAlchemy's statement and never with a password."""
        cause = getattr(error, "orig", None) or error
        lines = [line.strip() for line in str(cause).strip().splitlines()] or [type(cause).__name__]
        why = " ".join(lines) if lines[0].endswith(":") else lines[0]  # with several hosts, each has a line
        if any(form in why for secret in url_secrets(self._url) for form in _forms(secret)):
            why = type(cause).__name__
        if getattr(cause, "sqlstate", None) == _NOT_PERMITTED:
            why += ". Have a role that may do so run what `keyferry records schema` prints, and grant SELECT, INSERT, UPDATE"
        return why + (self._file.advice() if self._file is not None else "")


def _taken(name: str) -> StoreError:
    return StoreError(f"{name} is taken: a record is never overwritten; choose another name")


def _matching(key_id: str | None, not_under: str | None) -> list[Any]:
    conditions: list[Any] = []
    if key_id is not None:
        conditions.append(_c.key_id == key_id)
    if not_under is not None:  # the blob decides, because the column next to it may be wrong
        prefix = sql.func.substr(_c.ciphertext_blob, 1, VERSION_PREFIX)
        conditions.append(sql.or_(_c.key_version_id != not_under, prefix != version_prefix(not_under)))
    return conditions


def _row(record: Record) -> dict[str, Any]:
    row = record._asdict()
    row["encryption_context"] = row.pop("context_text")
    del row["row_id"]
    return row


def _forms(secret: str) -> tuple[str, ...]:
    """Return a secret as it is, and as Python, a URL or libpq would quote it."""
    return secret, repr(secret)[1:-1], quote(secret, safe=""), secret.replace("\\", "\\\\").replace("'", "\\'")
