"""Finds the store: the URL that the caller passes, `$KEYFERRY_STORE`, or by default an SQLite file of this user.

`@FILE` reads the URL from a file, which keeps a database's password out of the command line. No error, repr or log line
contains a password of a URL.
"""

import os
from typing import Final

from sqlalchemy.engine import URL

from .record import StoreError, printable
from .sqlite import home, sqlite_file
from .url import MAX_URL, SECRET_OPTIONS, parse

__all__ = ["find", "secrets", "shown"]

_SQLITE: Final = "sqlite"


def find(given: str | None = None) -> URL:
    """Return the URL of the store: `given`, else `$KEYFERRY_STORE`, else the default.

    `@FILE` reads the URL from a file's first line. Raises `StoreError`.
    """
    text = given or os.environ.get("KEYFERRY_STORE")
    if not text:
        return _default()
    if text.startswith("@"):
        text = _from_file(text[1:])
    url = parse(text)
    if url.get_backend_name() == _SQLITE:
        sqlite_file(url)  # raises for URLs that do not name a file
    return url


def shown(url: URL) -> str:
    """Return a description of the store for messages: its kind, name and host. It contains no secrets, not even the query's."""
    if url.get_backend_name() == _SQLITE:
        return str(sqlite_file(url))
    query = url.query
    name = query.get("dbname") or url.database or "(the default)"
    where = url.host or query.get("host") or query.get("hostaddr")
    if not where:
        where = f"the service {query['service']}" if "service" in query else "the default server"
    return printable(f"PostgreSQL database {name} at {where}")


def secrets(url: URL) -> list[str]:
    """Return the secrets in a URL."""
    found = [url.password, *(url.query.get(name) for name in sorted(SECRET_OPTIONS))]
    return [str(secret) for secret in found if secret]


def _default() -> URL:
    folder = os.environ.get("XDG_DATA_HOME") or ""
    if not os.path.isabs(folder):  # the XDG specification requires that relative paths are ignored
        folder = os.path.join(home(), ".local", "share")
    return URL.create("sqlite+pysqlite", database=os.path.join(folder, "keyferry", "records.sqlite"))


def _from_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            line = file.readline(MAX_URL + 1).strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or ("not text" if isinstance(error, UnicodeError) else "not a file name")
        raise StoreError(f"the store's URL in {printable(path)}: {why}") from None
    if not line or line.startswith("@"):
        raise StoreError(f"{printable(path)}: the store's URL is expected in its first line")
    return line
