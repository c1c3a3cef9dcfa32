"""Resolves a URL to an SQLite file by its absolute path, in every form of the URL, and opens the file.

SQLite opens every file through a URI with a mode that never creates it. So reading a store does not create a file, and the
check for the file and the opening of it always mean the same path.
"""

import os
import pwd
import sqlite3
import stat
from typing import Final, NamedTuple
from urllib.parse import quote, unquote_to_bytes

from sqlalchemy.engine import URL

from .record import StoreError, printable
from .url import describe_option

__all__ = ["SqliteFile", "home", "sqlite_file"]

_LOCK_TIMEOUT_SECONDS: Final = 60.0
"""Seconds to wait for another writer of a file, unless the URL has a timeout."""
_MAX_TIMEOUT_SECONDS: Final = 1_000_000
"""Seconds that SQLite can count in milliseconds."""
_URI: Final = "file:"
_URI_OPTIONS: Final = frozenset({"cache", "immutable", "mode", "nolock", "psow", "vfs"})
_MODES: Final = ("ro", "rw", "rwc")
_TRUE: Final = frozenset({"true", "1", "yes", "on", "t", "y"})
_FALSE: Final = frozenset({"false", "0", "no", "off", "f", "n"})
_IN_MEMORY: Final = "a store in memory is lost when the command ends; name a file: sqlite:///FILE"
_WRITE_AHEAD: Final = 2
"""Value of bytes 18 and 19 of a file in WAL mode: https://www.sqlite.org/fileformat.html."""


class SqliteFile(NamedTuple):
    """An SQLite file, by its absolute path. All methods raise `StoreError`."""

    path: str
    options: dict[str, str]
    """Options of SQLite's own URIs. They always include a mode: "ro", "rw" or "rwc"."""
    timeout: float

    def __str__(self) -> str:
        return printable(self.path)

    def connect(self) -> sqlite3.Connection:
        """Open the file, which must exist. Raises the errors of sqlite3, which SQLAlchemy, the caller, translates."""
        mode = "ro" if self.options["mode"] == "ro" else "rw"  # never "rwc": only `create` creates a file
        options = "&".join(f"{name}={quote(value, safe='')}" for name, value in {**self.options, "mode": mode}.items())
        uri = f"file://{quote(os.fsencode(self.path))}?{options}"
        return sqlite3.connect(uri, uri=True, timeout=self.timeout, check_same_thread=False)

    def exists(self) -> bool:
        """Return True if the file exists. Raises `StoreError` for a folder, a device, or a path without search permission."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(f"{self}: {error.strerror}") from None
        if stat.S_ISDIR(status.st_mode):
            raise StoreError(f"{self}: a folder, not a file; name a file in it, such as {self}/records.sqlite")
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{self}: not a regular file; name a file of SQLite's")
        return True

    def create(self) -> None:
        """Create an empty file if it does not exist, and its folder with mode 0700."""
        if self.exists():
            return
        if self.options["mode"] != "rwc":
            raise StoreError(f"{self} does not exist, and mode={self.options['mode']} in the store's URL keeps it so")
        folder = os.path.dirname(self.path)
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as error:
            raise StoreError(f"{printable(str(error.filename or self.path))}: {error.strerror}") from None

    def advice(self) -> str:
        """Return advice about a file that SQLite cannot use, or an empty text if its header and modes do not explain it."""
        try:
            with open(self.path, "rb") as file:
                header = file.read(20)
        except OSError as error:
            return f" ({error.strerror})"
        folder = os.path.dirname(self.path)
        is_writable = os.access(folder, os.W_OK, effective_ids=True) and os.access(
            self.path, os.W_OK, effective_ids=True
        )
        if header[18:20] != bytes([_WRITE_AHEAD] * 2) or is_writable:
            return ""
        return (
            f" (the file is in WAL mode, in which also readers write to it and to {printable(folder)}. "
            "While no process writes to the store, immutable=1 in its URL opens it)"
        )


def sqlite_file(url: URL) -> SqliteFile:
    """Return the file that an SQLite URL names. Raises `StoreError`."""
    options = {name: value if isinstance(value, str) else value[-1] for name, value in url.query.items()}
    uri, timeout = _flag("uri", options.pop("uri", "false")), _timeout(options.pop("timeout", None))
    for name in options:
        if name not in _URI_OPTIONS:
            raise StoreError(f"{describe_option(name)} has no meaning for an SQLite store: remove it")
    path = url.database or ""
    if path.startswith(_URI):
        if not uri:
            raise StoreError(
                "the store's URL cannot be read: add uri=true to open a file by SQLite's own URI, "
                "as in sqlite:///file:PATH?mode=ro&uri=true"
            )
        path = _path_of_uri(path)
    if path in ("", ":memory:") or options.get("mode") == "memory" or options.get("vfs") == "memdb":
        raise StoreError(_IN_MEMORY)
    if options.setdefault("mode", "rwc") not in _MODES:
        raise StoreError(f"{describe_option('mode')} is one of {', '.join(_MODES)}")
    try:
        return SqliteFile(os.path.abspath(_expanded(path)), options, timeout)
    except OSError:  # of getcwd(2)
        raise StoreError(f"{printable(path)}: the working directory does not exist") from None


def home() -> str:
    """Return the absolute path of this user's home folder. Raises `StoreError`."""
    folder = os.environ.get("HOME") or ""
    if not os.path.isabs(folder):
        try:
            folder = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            folder = ""
    if not os.path.isabs(folder):
        raise StoreError(
            "this user has no home folder: set $KEYFERRY_STORE, as in sqlite:////FOLDER/FILE, or set $HOME"
        )
    return folder


def _expanded(path: str) -> str:
    """Expand a leading tilde in a path. A shell does not expand the tilde in the middle of a URL."""
    if path == "~" or path.startswith("~/"):
        return home() + path[1:]
    if path.startswith("~"):
        full_path = os.path.expanduser(path)
        if full_path == path:
            raise StoreError(f"{printable(path)}: there is no such user; a file of this name is ./{printable(path)}")
        return full_path
    return path


def _path_of_uri(uri: str) -> str:
    """Return the path of an SQLite URI without its percent-encoding: https://www.sqlite.org/uri.html."""
    path = uri.removeprefix(_URI).partition("#")[0]
    if path.startswith("//"):
        authority, slash, remainder = path[2:].partition("/")
        if authority not in ("", "localhost"):
            raise StoreError("the store's URL cannot be read: a file's URI begins with file:/ or file:///")
        path = slash + remainder
    decoded_path = unquote_to_bytes(os.fsencode(path))
    if b"\0" in decoded_path:
        raise StoreError("the store's URL cannot be read: a path cannot hold a null character")
    return os.fsdecode(decoded_path)


def _flag(name: str, value: str) -> bool:
    if value.lower() not in _TRUE | _FALSE:
        raise StoreError(f"{describe_option(name)} is true or false")
    return value.lower() in _TRUE


def _timeout(value: str | None) -> float:
    if value is None:
        return _LOCK_TIMEOUT_SECONDS
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MAX_TIMEOUT_SECONDS:
        raise StoreError(f"{describe_option('timeout')} is a number of seconds")
    return seconds
