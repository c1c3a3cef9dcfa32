"""Finds the store: the URL that the caller passes, `$KEYFERRY_STORE`, or by default an SQLite file of this user.

`@FILE` reads the URL from a file, which keeps a database's password out of the command line. No error, repr or log line
contains a password of a URL.
"""

import os
from typing import Final

from sqlalchemy.engine import URL

from ..content import first_line
from .record import StoreError, printable
from .sqlite import home, sqlite_file
from .url import MAX_URL, SECRET_OPTIONS, parse

__all__ = ["display_url", "resolve_url", "url_secrets"]

_SQLITE: Final = "sqlite"
_MAX_LINE_BYTES: Final = 4 * (MAX_URL + 1)
"""Holds a URL that is too long, so that `parse` refuses it: UTF-8 takes at most four bytes for a character."""


def resolve_url(argument: str | None = None) -> URL:
    """Return the URL of the store: `argument`, else `$KEYFERRY_STORE`, else the default.

    `@FILE` reads the URL from a file's first line. Raises `StoreError`.
    """
    text = argument or os.environ.get("KEYFERRY_STORE")
    if not text:
        return _default()
    if text.startswith("@"):
        text = _from_file(text[1:])
    url = parse(text)
    if url.get_backend_name() == _SQLITE:
        sqlite_file(url)  # raises for URLs that do not name a file
    return url


def display_url(url: URL) -> str:
    """Return a description of the store for messages: its kind, name and host. It contains no secrets, not even the query's."""
    if url.get_backend_name() == _SQLITE:
        return str(sqlite_file(url))
    query = url.query
    name = query.get("dbname") or url.database or "(the default)"
    server = url.host or query.get("host") or query.get("hostaddr")
    if not server:
        server = f"the service {query['service']}" if "service" in query else "the default server"
    return printable(f"PostgreSQL database {name} at {server}")


def url_secrets(url: URL) -> list[str]:
    """Return the secrets in a URL."""
    values = [url.password, *(url.query.get(name) for name in sorted(SECRET_OPTIONS))]
    return [str(value) for value in values if value]


def _default() -> URL:
    folder = os.environ.get("XDG_DATA_HOME") or ""
    if not os.path.isabs(folder):  # the XDG specification requires that relative paths are ignored
        folder = os.path.join(home(), ".local", "share")
    return URL.create("sqlite+pysqlite", database=os.path.join(folder, "keyferry", "records.sqlite"))


def _from_file(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.readline(_MAX_LINE_BYTES)
    except (OSError, ValueError) as error:
        raise StoreError(f"{printable(path)}: {getattr(error, 'strerror', None) or 'not a file name'}") from None
    try:
        line = first_line(data, "the store's URL").removeprefix("\ufeff").strip()
    except ValueError as error:
        raise StoreError(f"{printable(path)}: {error}") from None
    if not line or line.startswith("@"):
        raise StoreError(f"{printable(path)}: the first line is not a URL; the store's URL is expected there")
    return line
