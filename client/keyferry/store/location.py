"""Where the store is: an URL that was given, in `$KEYFERRY_STORE` or in a file, else an SQLite file of this user's.

An URL may hold a database's password: no error, repr or log shows one, and it may stay out of the command line.
"""

import os
from pathlib import Path
from typing import Final

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from .record import StoreError

__all__ = ["find", "make_room", "secrets_of", "shown"]

_DRIVERS: Final = {
    "sqlite": "sqlite+pysqlite",
    "postgresql": "postgresql+psycopg",  # not what SQLAlchemy 2.0 takes, psycopg2
    "postgres": "postgresql+psycopg",  # as libpq and many hosts write it
}
_LONGEST: Final = 4_096


def find(given: str | None = None) -> URL:
    """The URL of the store: `given`, else `$KEYFERRY_STORE`, else the default. `@FILE` reads it from a file's first line.

    Raises `StoreError`.
    """
    text = given or os.environ.get("KEYFERRY_STORE")
    if not text:
        return _default()
    if text.startswith("@"):
        text = _from_file(text[1:])
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # a port that is no number is the latter, and its text may show a password
        raise StoreError("the store's URL cannot be read: sqlite:///FILE or postgresql://USER@HOST/DATABASE") from None
    url = url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(f"a store is in sqlite or postgresql, not in {url.get_backend_name()}")
    if url.get_backend_name() == "sqlite" and (not url.database or url.database == ":memory:"):
        raise StoreError("a store in memory would be forgotten at once: sqlite:///FILE")
    return url


def shown(url: URL) -> str:
    """A store as a person may read it: kind, place and name; no user's secrets, not even in the query."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    where = url.host or url.query.get("host") or "the local server"
    return f"PostgreSQL database {url.database or '(the default)'} at {where}"


def secrets_of(url: URL) -> list[str]:
    """Return the passwords that a URL holds, also those in its query."""
    found = [url.password, *(url.query.get(name) for name in ("password", "sslpassword"))]
    return [str(secret) for secret in found if secret]


def _default() -> URL:
    home = os.environ.get("XDG_DATA_HOME") or ""
    if not os.path.isabs(home):  # the XDG specification: relative ones are to be ignored
        home = os.path.expanduser("~/.local/share")
    return URL.create(_DRIVERS["sqlite"], database=os.path.join(home, "keyferry", "records.sqlite"))


def _from_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            line = file.readline(_LONGEST).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"the store's URL in {path}: {getattr(error, 'strerror', None) or 'not text'}") from None
    if not line or line.startswith("@"):
        raise StoreError(f"{path}: the store's URL is expected in its first line")
    return line


def make_room(url: URL) -> None:
    """Make the directory of an SQLite file that is to be created, for this user only. Raises `StoreError`."""
    if url.get_backend_name() == "sqlite":
        folder = Path(str(url.database)).parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder}: {error.strerror}") from None
