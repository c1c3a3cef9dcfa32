"""The table of records, over SQLAlchemy Core. Every method is one short transaction: no lock is held while an agent is asked.

Columns are text, as the API gives things: the same in both databases, and readable in either's shell. A column is never given
another meaning; a later one is added with a default.
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
from .location import find, secrets, shown
from .record import LONGEST_NAME, VERSION_PREFIX, Record, StoreError, check_name, now, printable, version_prefix
from .sqlite import sqlite_file

__all__ = ["Store", "schema"]

_PAGE: Final = 500
"""Records to have in memory at a time."""

_records: Final = sql.Table(
    "keyferry_records",
    sql.MetaData(),
    # Pages go by this number: it is the same order in every database, whatever the names are and however they collate.
    # An identity, not a serial: who may insert needs no grant on a sequence besides.
    sql.Column("row_id", sql.BigInteger().with_variant(sql.Integer(), "sqlite"), sql.Identity(), primary_key=True),
    # Collation C: an index over text in a language's order breaks when an update of the C library changes that order.
    sql.Column(
        "name",
        sql.String(LONGEST_NAME).with_variant(sql.String(LONGEST_NAME, collation="C"), "postgresql"),
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
# Compare and swap: a row that somebody else has changed in the meantime is not the one that was read, and stays as it is.
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
    """Return the statement that makes the table, in the dialect of the store's URL, without looking for the store.

    Raises `StoreError`.
    """
    dialect = _DIALECTS[find(url).get_backend_name()].dialect()
    lines = str(_create_table().compile(dialect=dialect)).strip().splitlines()
    return "\n".join(line.rstrip() for line in lines) + ";"


def _create_table() -> sql.schema.CreateTable:
    return sql.schema.CreateTable(_records, if_not_exists=True)


class Store:
    """A database of records. Safe to use from several processes at once.

    `url` is an SQLAlchemy URL of SQLite or PostgreSQL, `@FILE` with one in it, or None: `$KEYFERRY_STORE`, else an SQLite file
    under `$XDG_DATA_HOME/keyferry`.

    `add` makes a store that does not exist: the file, its folder, the table. With `create=False` it does not. All other methods
    raise `StoreError` for a store that does not exist: it is never taken for an empty one. All methods raise `StoreError`.
    """

    def __init__(self, url: str | None = None, *, create: bool = True) -> None:
        self._url = find(url)
        self._place = shown(self._url)
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
        """Add records, all or none. A name that is taken is refused."""
        for record in records:
            check_name(record.name)
        rows = [_row(record) for record in records]
        if not self._create:
            self._require()
        elif self._file is not None:
            self._file.make()
        try:
            with self._doing() as connection:
                if self._create:
                    self._make_table(connection)
                connection.execute(sql.insert(_records), rows)
        except exc.IntegrityError:
            names = records[0].name if len(records) == 1 else "one of these names"
            raise StoreError(f"{names} is taken: a record is never overwritten") from None

    def renew(self, old: Record, new: Record, old_name: str) -> None:
        """Rename a record, and add one that takes its name, in one transaction. Neither is changed where that fails.

        `new` has the name that `old` has in the database.
        """
        check_name(old_name)
        self._require()
        rename = sql.update(_records).where(_c.row_id == old.row_id, _c.name == old.name).values(name=old_name)
        try:
            with self._doing() as connection:
                if connection.execute(rename).rowcount != 1:
                    raise StoreError(
                        f"{printable(old.name)}: another process renamed it meanwhile; nothing was changed"
                    )
                connection.execute(sql.insert(_records), [_row(new)])
        except exc.IntegrityError:
            raise StoreError(f"{printable(old_name)} is taken: a record is never overwritten") from None

    def check_free(self, name: str) -> None:
        """Refuse a name that is no good or taken, before a data key is made in vain."""
        check_name(name)
        if not self._create:
            self._require()
        if self._exists() and self._one(name) is not None:
            raise StoreError(f"{name} is taken: a record is never overwritten")

    def get(self, name: str) -> Record:
        """The record of this name."""
        self._require(f"there is no record {printable(name)} in {self._place}, because it does not exist")
        record = self._one(name)
        if record is None:
            raise StoreError(f"there is no record {printable(name)} in {self._place}")
        return record

    def named(self, names: Iterable[str]) -> dict[str, Record]:
        """The records of these names, by name; none where the store does not exist yet."""
        rows = self._rows(_SELECT.where(_c.name.in_(list(names)))) if self._exists() else []
        return {record.name: record for record in (Record(*row) for row in rows)}

    def __iter__(self) -> Iterator[Record]:
        """All records in the order in which they were added, however many."""
        yield from self._pages()

    def count(self, key_id: str | None = None, *, not_under: str | None = None) -> int:
        """How many records there are; of a master key only; and of those, only the ones under another version than this."""
        asked = sql.select(sql.func.count()).select_from(_records).where(*_matching(key_id, not_under))
        self._require()
        return int(self._rows(asked)[0][0])

    def key_ids(self) -> list[str]:
        """The master keys that there are records of."""
        self._require()
        return [row[0] for row in self._rows(sql.select(_c.key_id).distinct().order_by(_c.key_id))]

    def not_under(self, key_id: str, key_version_id: str) -> Iterator[list[Record]]:
        """The records of a master key that are under another version than this, in pages. They may be replaced meanwhile."""
        after = 0
        while page := self._page(after, _matching(key_id, key_version_id)):
            yield page
            after = page[-1].row_id

    def replace(self, changes: Iterable[tuple[Record, str, str]]) -> int:
        """Give records a new CiphertextBlob and KeyVersionId, in one transaction: those that in the database are still as they
        were read, and the number of these. To be called with records in the order of their pages.
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
        with self._doing() as connection:
            # In one order everywhere: two that replace the same rows wait for each other, and never both ways.
            return connection.execute(_REPLACE, rows).rowcount

    def _one(self, name: str) -> Record | None:
        rows = self._rows(_SELECT.where(_c.name == name)) if name.isprintable() else []
        return Record(*rows[0]) if rows else None

    def _pages(self) -> Iterator[Record]:
        self._require()
        after = 0
        while page := self._page(after, []):
            yield from page
            after = page[-1].row_id

    def _page(self, after: int, conditions: list[Any]) -> list[Record]:
        asked = _SELECT.where(_c.row_id > after, *conditions).order_by(_c.row_id).limit(_PAGE)
        return [Record(*row) for row in self._rows(asked)]

    def _rows(self, asked: Any) -> list[Any]:
        with self._doing() as connection:
            return list(connection.execute(asked))

    def _exists(self) -> bool:
        """Whether there is a table yet. Looking for it makes no file."""
        if self._file is not None and not self._file.exists():
            return False
        with self._doing() as connection:
            return sql.inspect(connection).has_table(_records.name)

    def _require(self, why: str = "") -> None:
        """Refuse to take a store that does not exist for an empty one: its URL may be wrong."""
        if not self._exists():
            why = why or f"there is no store in {self._place}"
            raise StoreError(
                f"{why}: name another with --store or $KEYFERRY_STORE, or make it with 'keyferry records add'"
            )

    def _make_table(self, connection: sql.Connection) -> None:
        if not sql.inspect(connection).has_table(_records.name):
            if connection.dialect.name == "postgresql":  # IF NOT EXISTS alone fails where two make it at once
                connection.execute(sql.text("SELECT pg_advisory_xact_lock(hashtext('keyferry_records'))"))
            connection.execute(_create_table())

    @contextmanager
    def _doing(self) -> Iterator[sql.Connection]:
        """A transaction, whose failures are told in this package's words."""
        with self._connected() as connection:
            try:
                with connection.begin():
                    yield connection
            except exc.IntegrityError:
                raise
            except (exc.SQLAlchemyError, OSError, TypeError, ValueError) as error:
                raise StoreError(f"{self._place}: {self._why(error)}") from None

    @contextmanager
    def _connected(self) -> Iterator[sql.Connection]:
        """A connection of this process's own. What a driver makes of a URL's options may raise any exception."""
        if self._process != os.getpid():  # after a fork, the pool's connections are the parent's
            self._inherited = self._engine.pool  # kept: the driver warns of connections that are not closed
            self._engine.dispose(close=False)
            self._process = os.getpid()
        try:
            connection = self._engine.connect()
        except Exception as error:
            raise StoreError(f"{self._place}: {self._why(error)}") from None
        with connection:
            yield connection

    def _why(self, error: Exception) -> str:
        """The driver's own first line, without the statement that SQLAlchemy adds; and never a password."""
        cause = getattr(error, "orig", None) or error
        lines = [line.strip() for line in str(cause).strip().splitlines()] or [type(cause).__name__]
        why = " ".join(lines) if lines[0].endswith(":") else lines[0]  # of several hosts, each has a line
        if any(form in why for secret in secrets(self._url) for form in _forms(secret)):
            why = type(cause).__name__
        if getattr(cause, "sqlstate", None) == _NOT_PERMITTED:
            why += ". Have a role that may do so run what `keyferry records schema` prints, and grant SELECT, INSERT, UPDATE"
        return why + (self._file.advice() if self._file is not None else "")


def _matching(key_id: str | None, not_under: str | None) -> list[Any]:
    conditions: list[Any] = []
    if key_id is not None:
        conditions.append(_c.key_id == key_id)
    if not_under is not None:  # the blob is what counts; the column beside it may be wrong
        begins = sql.func.substr(_c.ciphertext_blob, 1, VERSION_PREFIX)
        conditions.append(sql.or_(_c.key_version_id != not_under, begins != version_prefix(not_under)))
    return conditions


def _row(record: Record) -> dict[str, Any]:
    row = record._asdict()
    row["encryption_context"] = row.pop("context_text")
    del row["row_id"]
    return row


def _forms(secret: str) -> tuple[str, ...]:
    """A secret as it is, and as Python, a URL or libpq would quote it."""
    return secret, repr(secret)[1:-1], quote(secret, safe=""), secret.replace("\\", "\\\\").replace("'", "\\'")
