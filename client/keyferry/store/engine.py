"""Makes SQLAlchemy's engine for a store's URL. Its connections keep no state beyond a transaction.

A connection to PostgreSQL may lead to a pooler that runs each transaction in a different session (PgBouncer with
`pool_mode = transaction`). So the store prepares no statements, sets no session parameters, and takes only locks that end with
the transaction.
"""

import os
from typing import Any, Final

import sqlalchemy as sql
from sqlalchemy import event, exc
from sqlalchemy.engine import URL

from .record import StoreError
from .sqlite import SqliteFile
from .url import describe_option

__all__ = ["make_engine"]

_CONNECT_TIMEOUT_SECONDS: Final = 60
"""Seconds to wait for a PostgreSQL server to accept a connection, unless the URL or the environment says otherwise."""


def make_engine(url: URL, place: str, file: SqliteFile | None) -> sql.Engine:
    """Return an engine that connects at its first use. `place` is the store's name in messages. Raises `StoreError`."""
    try:
        return _sqlite(url, file) if file is not None else _postgresql(url)
    except (exc.ArgumentError, exc.NoSuchModuleError):
        raise StoreError(f"{place}: SQLAlchemy does not have the driver; leave it out of the URL") from None
    except ModuleNotFoundError as error:
        raise StoreError(f"{place}: its driver, {error.name}, is not installed") from None
    except ImportError:
        raise StoreError(
            f"{place}: its driver does not start. PostgreSQL's needs the system's libpq (Debian package libpq5)"
        ) from None


def _sqlite(url: URL, file: SqliteFile) -> sql.Engine:
    if url.get_driver_name() != "pysqlite":
        raise exc.NoSuchModuleError
    engine = sql.create_engine(
        URL.create(url.drivername, database=file.path),
        hide_parameters=True,
        creator=file.connect,
        poolclass=sql.NullPool,  # a pooled connection would keep using a file that has been replaced
    )
    event.listen(engine, "connect", _tolerate)
    return engine


def _postgresql(url: URL) -> sql.Engine:
    psycopg = url.get_driver_name() == "psycopg"
    options = _libpq_options(url) if psycopg else {}
    engine = sql.create_engine(
        URL.create(url.drivername) if psycopg else url,
        hide_parameters=True,
        pool_pre_ping=True,  # a restart of the server breaks the connections in the pool
        connect_args=options,
    )
    if psycopg:
        _check_options(url)
    return engine


def _libpq_options(url: URL) -> dict[str, Any]:
    """Return the parameters of psycopg.connect: libpq's options as text, and those that the store requires."""
    parts = {
        "host": url.host,
        "port": url.port,
        "user": url.username,
        "password": url.password,
        "dbname": url.database,
    }
    options: dict[str, Any] = {name: str(value) for name, value in parts.items() if value is not None}
    if "PGCONNECT_TIMEOUT" not in os.environ:
        options["connect_timeout"] = _CONNECT_TIMEOUT_SECONDS
    options.update(url.query)
    options["client_encoding"] = "utf8"  # the database's own encoding may lack characters of a name
    options["prepare_threshold"] = None  # a prepared statement belongs to one session, and a pooler has several
    return options


def _check_options(url: URL) -> None:
    """Raise `StoreError` for options that psycopg would reject without naming the URL, or would use as its own parameters."""
    from psycopg import pq  # noqa: PLC0415 - psycopg has started by now

    keywords = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    for name in url.query:
        if name not in keywords:
            raise StoreError(f'{describe_option(name)} is not an option of this system\'s libpq; "&" in a value is %26')


def _tolerate(connection: Any, _record: object) -> None:
    """Read bytes that are not UTF-8 as U+FFFD, so that they damage one record and not the whole page of records."""
    connection.text_factory = lambda text: text.decode(errors="replace")
