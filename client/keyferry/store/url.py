"""Parses the text of a store's URL strictly. No error repeats any part of the text, because it may hold a password.

SQLAlchemy's own parser ends a password at its first "@" and takes the characters after it for the host, and hosts appear in
messages. Here, "@" may occur once, and text that two parsers could read in two ways is refused.
"""

import difflib
import ipaddress
import re
from typing import Final, TypeAlias
from urllib.parse import unquote_to_bytes

from sqlalchemy.engine import URL

from .record import StoreError

__all__ = ["MAX_URL", "PYTHON_OPTIONS", "SECRET_OPTIONS", "describe_option", "parse"]

MAX_URL: Final = 4_096
"""Most characters in a URL."""
SECRET_OPTIONS: Final = frozenset(
    {"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"}
)
"""Options of libpq whose values are secrets."""

_DRIVERS: Final = {
    "sqlite": "sqlite+pysqlite",
    "postgresql": "postgresql+psycopg",  # not the default of SQLAlchemy 2.0, psycopg2
    "postgres": "postgresql+psycopg",  # as libpq and many hosting services write it
}
_OTHER_DATABASES: Final = ("mysql", "mariadb", "oracle", "mssql")
"""Names of databases that a message may repeat."""
PYTHON_OPTIONS: Final = frozenset(
    {"autocommit", "conninfo", "context", "cursor_factory", "prepare_threshold", "row_factory"}
)
"""Parameters of psycopg.connect that text cannot express, or that would change how the store works."""
_NAMES: Final = """
application_name channel_binding client_encoding connect_timeout dbname fallback_application_name gssdelegation gssencmode
gsslib host hostaddr keepalives keepalives_count keepalives_idle keepalives_interval krbsrvname load_balance_hosts
max_protocol_version min_protocol_version oauth_client_id oauth_issuer oauth_scope options passfile port replication
require_auth requirepeer service ssl ssl_max_protocol_version ssl_min_protocol_version sslcert sslcertmode sslcompression
sslcrl sslcrldir sslkey sslkeylogfile sslmode sslnegotiation sslrootcert sslsni target_session_attrs tcp_user_timeout user
cache immutable mode nolock psow timeout uri vfs
cached_statements check_same_thread detect_types isolation_level
"""
"""Options of libpq 18, SQLite's URIs and Python's sqlite3."""
_KNOWN_OPTIONS: Final = sorted({*_NAMES.split(), *PYTHON_OPTIONS, *SECRET_OPTIONS})
_SCHEME: Final = re.compile(r"([a-z][a-z0-9]*)(\+[a-z0-9_]*)?", re.ASCII)
_INCOMPLETE_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_UNSAFE: Final = re.compile(r"[\x00-\x1f\x7f]")
_MAX_PORT: Final = 65_535

_FORMS: Final = "sqlite:///FILE or postgresql://USER@HOST/DATABASE"
_ENCODE: Final = (
    'the user name and the password must be percent-encoded: "@" is %40, ":" %3A, "/" %2F, "?" %3F, "#" %23, "%" %25, '
    "a space %20"
)
_SLASHES: Final = "SQLite needs three slashes for a relative path (sqlite:///FILE), four for an absolute path (sqlite:////FOLDER/FILE)"


def parse(text: str) -> URL:
    """Parse the URL of an SQLite file or a PostgreSQL database; the result names a driver. Raises `StoreError`."""
    if len(text) > MAX_URL:
        raise _unreadable(f"it is longer than {MAX_URL} characters")
    scheme, separator, location = text.partition("://")
    if not separator:
        if text.lower().startswith("sqlite:"):
            raise _unreadable(_SLASHES)
        raise _unreadable(f"expected {_FORMS}")
    name = _SCHEME.fullmatch(scheme.lower())
    if name is None:
        raise _unreadable(f"expected {_FORMS}")
    database, driver = name.group(1), name.group(2)
    if database not in _DRIVERS:
        database_kind = database if database in _OTHER_DATABASES else "another kind of database"
        raise StoreError(f"a store is in sqlite or postgresql, not in {database_kind}: {_FORMS}")
    drivername = _DRIVERS[database]
    if driver:
        drivername = drivername.partition("+")[0] + driver
    return _sqlite(drivername, location) if database == "sqlite" else _postgresql(drivername, location)


def _unreadable(why: str) -> StoreError:
    return StoreError(f"the store's URL cannot be read: {why}")


# --- SQLite: a path, and options ----------------------------------------------------------------------------------------


def _sqlite(drivername: str, location: str) -> URL:
    """Parse a location as SQLAlchemy does: the path is not percent-encoded, unless it is one of SQLite's own URIs."""
    path, question, query = location.partition("?")
    if path and path[0] != "/":
        raise _unreadable("a store in memory is lost when the command ends" if path == ":memory:" else _SLASHES)
    if "\0" in location:
        raise _unreadable("a path cannot hold a null character")
    return URL.create(drivername, database=path[1:], query=_options(query) if question else {})


# --- PostgreSQL: user, hosts, database, and options -----------------------------------------------------------------------


def _postgresql(drivername: str, location: str) -> URL:
    if _UNSAFE.search(location) or any("\ud800" <= character <= "\udfff" for character in location):
        raise _unreadable(f"it holds control characters, or bytes that are not text; {_ENCODE}")
    end = min(index for index in (location.find("/"), location.find("?"), len(location)) if index >= 0)
    authority, remainder = location[:end], location[end:]
    if location.count("@") > 1 or "@" in remainder:
        raise _unreadable(f'"@" may occur once, before the host; {_ENCODE}')
    user, _, address = authority.rpartition("@")
    username, colon, password = user.partition(":")
    path, question, query = remainder.partition("?")
    options = _options(query) if question else {}
    for option in sorted(PYTHON_OPTIONS & options.keys()):
        raise StoreError(f"{describe_option(option)} belongs to psycopg, not to libpq; remove it")
    if options.get("ssl") == "true":  # JDBC's form; libpq maps it to sslmode=require
        del options["ssl"]
        options.setdefault("sslmode", "require")
    host, port = _addresses(address, options)
    for name, value in options.items():
        if not isinstance(value, str):
            raise _unreadable(f"{describe_option(name)} occurs twice")
    url = URL.create(
        drivername,
        username=_decoded(username) or None,
        password=_decoded(password) if colon else None,
        database=_decoded(path[1:]) or None,
        query=options,
    )
    host_options = {"host": host, "port": port} if "," in host + port or host.startswith(("/", "@")) else {}
    if host_options:
        return url.update_query_dict({name: value for name, value in host_options.items() if value})
    return url.set(host=host or None, port=int(port) if port else None)


def _addresses(address: str, options: "_Options") -> tuple[str, str]:
    """Remove hosts and ports from the options; return them, else the authority's, separated by commas as libpq writes them."""
    pairs = [_address(part) for part in address.split(",")]
    hosts, ports = [_decoded(host) for host, _ in pairs], [port for _, port in pairs]
    host_option, port_option = options.pop("host", ""), options.pop("port", "")
    if host_option:  # an option wins over the authority, as with SQLAlchemy
        texts = ",".join([host_option] if isinstance(host_option, str) else host_option).split(",")
        pairs = [(text, "") if text.startswith(("/", "@")) or _is_ipv6(text) else _address(text) for text in texts]
        hosts = [host for host, _ in pairs]
        if any(port for _, port in pairs):
            ports = [port for _, port in pairs]
    if port_option:
        ports = ",".join([port_option] if isinstance(port_option, str) else port_option).split(",")
    if not all(map(_is_port, ports)):
        raise _unreadable(f"a port is a number from 1 to {_MAX_PORT}; {_ENCODE}")
    if len(ports) not in (1, len(hosts)):
        raise _unreadable("the numbers of hosts and ports differ")
    return ",".join(hosts), ",".join(ports).strip(",") and ",".join(ports)


def _address(text: str) -> tuple[str, str]:
    """Split an address into host and port, either of which may be empty. Raises `StoreError`."""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if bracket and _is_ipv6(host) and port[:1] in ("", ":"):
            return host, port[1:]
    elif text.count(":") <= 1:
        host, _, port = text.partition(":")
        return host, port
    raise _unreadable(f"an IPv6 address stands in brackets: [::1]; {_ENCODE}")


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _is_port(text: str) -> bool:
    return not text or (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= _MAX_PORT)


def _decoded(text: str) -> str:
    """Decode percent-encoded text. Raises `StoreError` for an encoding that is incomplete or is not UTF-8."""
    if _INCOMPLETE_ESCAPE.search(text):
        raise _unreadable(f'"%" begins the two hexadecimal digits of a character; {_ENCODE}')
    try:
        plain_text = unquote_to_bytes(text).decode()
    except UnicodeError:
        raise _unreadable(f"percent-encoded bytes must be UTF-8 text; {_ENCODE}") from None
    if "\0" in plain_text:
        raise _unreadable("it holds a null character")
    return plain_text


# --- options ----------------------------------------------------------------------------------------------------------

_Options: TypeAlias = dict[str, str | tuple[str, ...]]


def _options(query: str) -> _Options:
    """Parse the options after the question mark. A name that occurs twice has a tuple. "+" is a space, as in SQLAlchemy."""
    options: _Options = {}
    for pair in filter(None, query.split("&")):
        name, equals, value = (_decoded(part.replace("+", " ")) for part in pair.partition("="))
        if not equals:
            raise _unreadable('options behind "?" have the form NAME=VALUE; "&" in a value is %26, and "?" is %3F')
        if value:  # for SQLAlchemy and for libpq, an empty value means an absent option
            values = options.get(name, ())
            options[name] = (*((values,) if isinstance(values, str) else values), value) if values else value
    return options


def describe_option(option: str) -> str:
    """Return an option's name for a message. An unknown name can be the end of a password, so it is never repeated."""
    if option in _KNOWN_OPTIONS:
        return f'the option "{option}" of the store\'s URL'
    matches = difflib.get_close_matches(option, _KNOWN_OPTIONS, 1)
    return "an option of the store's URL" + (f' (similar to "{matches[0]}")' if matches else "")
