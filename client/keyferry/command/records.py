"""`keyferry records`: data-key records in a database, by their names."""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from ..client import Client
from ..operations import OPERATIONS
from ..stdout import DONE, complain, show, show_lines
from .common import PROGRAM, REFUSED, add_parameters, extra, progress, read_parameters, show_json, socket_option, usage
from .modules import add_module_options, check_module_options, open_module

if TYPE_CHECKING:
    from ..store import Store

__all__ = ["add_parsers", "add_store_option", "open_store"]

_ADD = OPERATIONS["GenerateDataKeyWithoutPlaintext"]
_RECOVER = OPERATIONS["ExportDataKey"]
_COLUMNS: Final = ("Name", "KeyId", "KeyVersionId", "Created", "Rewrapped")
_RECORD_PARAMETERS = ("CiphertextBlob", "EncryptionContext")
_SECRET_OPTION: Final = re.compile(
    r"(?:^|&)(?:(?:ssl)?password|oauth_client_secret|scram_(?:client|server)_key)=[^&]", re.IGNORECASE
)
"""Copy of the store's `url.SECRET_OPTIONS`: the warning comes before the store is imported."""
_NO_PORT: Final = re.compile(r"\[[0-9A-Fa-f:.]*\]|:[0-9]*(?=[,/]|$)")
"""Colons in a URL that do not precede a password: those of IPv6 addresses and ports."""


def add_parsers(commands: Any) -> None:
    """Add `records` and its verbs."""
    records = commands.add_parser("records", help="data-key records in a database", allow_abbrev=False)
    verbs = records.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, text: str, run: Callable[[argparse.Namespace], int], *, agent: bool = True
    ) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = verbs.add_parser(
            name, help=text, description=text, parents=[socket_option()] if agent else [], allow_abbrev=False
        )
        add_store_option(parser)
        parser.set_defaults(run=run)
        return parser

    add = verb("add", "Generate a data key without plaintext, and store its record.", _add)
    add.add_argument("name", metavar="NAME", help="the record's name")
    add_parameters(add, _ADD, excluded_names=["DryRun"], enforce=True)

    listing = verb("list", "List all records, in the order in which they were added.", _list, agent=False)
    listing.add_argument(
        "--header",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="begin with a line that names the columns (default: on a terminal only)",
    )
    listing.add_argument("--json", action="store_true", help="print one JSON array, with all fields of each record")

    show = verb("show", "Show a record, as JSON.", _show, agent=False)
    show.add_argument("name", metavar="NAME")

    recover = verb("recover", "Export a record's data key to a module's public key (ExportDataKey).", _recover)
    recover.add_argument("name", metavar="NAME")
    add_parameters(recover, _RECOVER, excluded_names=_RECORD_PARAMETERS, enforce=False)

    renew = verb("renew", "Give a record a new data key. The old one stays, under another name.", _renew)
    renew.add_argument("name", metavar="NAME")
    renew.add_argument(
        "--old-name",
        metavar="NAME",
        help="the new name of the old record (default: NAME@ and the time at which it was added)",
    )

    rewrap = verb("rewrap", "Move every record under its master key's primary version (ReEncrypt).", _rewrap)
    rewrap.add_argument("--dry-run", action="store_true", help="change nothing; check whether each record can be moved")
    add_module_options(rewrap, required=False, why="; it then proves that each data key is the same as before")

    copy = verb("copy", "Copy all records to another store, and overwrite none there.", _copy, agent=False)
    copy.add_argument(
        "--to",
        metavar="URL",
        required=True,
        help="the other store: a URL or @FILE, in the form of --store; created if it does not exist",
    )

    verb("schema", "Print the statement that creates the store's table, for an administrator.", _schema, agent=False)


def add_store_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names a store."""
    parser.add_argument(
        "--store",
        metavar="URL",
        help="an SQLAlchemy URL of SQLite or PostgreSQL, or @FILE with one in it "
        "(default: $KEYFERRY_STORE, else an SQLite file under $XDG_DATA_HOME/keyferry)",
    )


def open_store(arguments: argparse.Namespace, *, create: bool = False) -> "Store":
    """Open the store that the options name. With `create`, `Store.add` creates a missing store. Raises `KeyferryError`."""
    return _open(arguments.store, create=create)


def _open(url: str | None, *, create: bool) -> "Store":
    _warn_of_password(url)
    with extra("store"):
        from ..store import Store  # noqa: PLC0415
    return Store(url, create=create)


def _warn_of_password(url: str | None) -> None:
    """Warn of a password in a URL, before any step can fail: the process list shows the password already."""
    if _may_hold_a_password(url or ""):
        complain(
            PROGRAM,
            "every user of this host can read a password on the command line; "
            "use @FILE, $KEYFERRY_STORE for --store, or PostgreSQL's own ~/.pgpass",
        )


def _may_hold_a_password(text: str) -> bool:
    """Return True if a store's URL, valid or not, seems to hold a password."""
    scheme, separator, location = text.partition("://")
    if not separator or text.startswith("@") or scheme.partition("+")[0].lower() == "sqlite":
        return False
    address, _, options = location.partition("?")
    user, at, _ = location.rpartition("@")
    return ":" in (user if at else _NO_PORT.sub("", address)) or _SECRET_OPTION.search(unquote(options)) is not None


def _add(arguments: argparse.Namespace) -> int:
    with open_store(arguments, create=True) as store, Client(arguments.socket) as kms:
        from ..store import new_record  # noqa: PLC0415

        store.check_free(arguments.name)
        params = read_parameters(arguments, _ADD)
        record = new_record(
            kms,
            arguments.name,
            key_id=params["KeyId"],
            encryption_context=params.get("EncryptionContext"),
            key_spec=params.get("KeySpec"),
            number_of_bytes=params.get("NumberOfBytes"),
        )
        store.add(record)
    return show_json(record.to_json())


def _list(arguments: argparse.Namespace) -> int:
    with open_store(arguments) as store:
        on_terminal = sys.stdout is not None and sys.stdout.isatty()
        header = on_terminal if arguments.header is None else arguments.header
        lines = _json_lines(store) if arguments.json else _lines(store, header=header)
        return show_lines(PROGRAM, lines, is_json=arguments.json)


def _lines(store: "Store", *, header: bool) -> Iterator[str]:
    from ..store.record import printable  # noqa: PLC0415

    records = iter(store)
    first_record = next(records, None)  # before the header: an unreadable store must not look like an empty list
    if header:
        yield "\t".join(_COLUMNS)
    for record in itertools.chain([first_record] if first_record else [], records):
        fields = (record.name, record.key_id, record.key_version_id, record.created, record.rewrapped or "-")
        yield "\t".join(map(printable, fields))


def _json_lines(store: "Store") -> Iterator[str]:
    """Yield the lines of a JSON array, one record per line, while the records are read."""
    records = iter(store)
    waiting_record = next(records, None)  # before the bracket: an unreadable store must not begin a list
    yield "["
    for record in records:
        if waiting_record:
            yield f"  {json.dumps(waiting_record.to_json(), ensure_ascii=False)},"
        waiting_record = record
    if waiting_record:
        yield f"  {json.dumps(waiting_record.to_json(), ensure_ascii=False)}"
    yield "]"


def _show(arguments: argparse.Namespace) -> int:
    with open_store(arguments) as store:
        return show_json(store.get(arguments.name).to_json())


def _recover(arguments: argparse.Namespace) -> int:
    params = read_parameters(arguments, _RECOVER)
    with open_store(arguments) as store:
        record = store.get(arguments.name).data_key_record()
    params.update({name: record[name] for name in _RECORD_PARAMETERS})  # type: ignore[literal-required]
    with Client(arguments.socket) as kms:
        return show_json(kms.call(_RECOVER.name, params))


def _copy(arguments: argparse.Namespace) -> int:
    if not arguments.to:
        usage("--to: empty; name a store by its URL or @FILE")
    with open_store(arguments) as source, _open(arguments.to, create=True) as target:
        from ..store import copy  # noqa: PLC0415

        with progress("copying", " records", total=source.count()) as bar:
            counts = copy(
                source,
                target,
                refused=lambda why: bar.write(f"keyferry: {why}", file=sys.stderr),
                advanced=bar.update,
            )
    code = show_json({name.capitalize(): count for name, count in counts._asdict().items()})
    return REFUSED if counts.refused and code == DONE else code


def _schema(arguments: argparse.Namespace) -> int:
    _warn_of_password(arguments.store)
    with extra("store"):
        from ..store import schema  # noqa: PLC0415
    return show(PROGRAM, schema(arguments.store))


def _renew(arguments: argparse.Namespace) -> int:
    with open_store(arguments) as store, Client(arguments.socket) as kms:
        from ..store import renew  # noqa: PLC0415

        new_record, old_record = renew(store, kms, arguments.name, old_name=arguments.old_name)
    return show_json({"New": new_record.to_json(), "Old": old_record.to_json()})


def _rewrap(arguments: argparse.Namespace) -> int:
    has_module = check_module_options(arguments)
    with open_store(arguments) as store, Client(arguments.socket) as kms:
        from ..store import rewrap  # noqa: PLC0415

        with progress("rewrapping", " records") as bar:

            def found(count: int) -> None:
                bar.reset(count)

            outcome = rewrap(
                store,
                kms,
                dry_run=arguments.dry_run,
                module=open_module(arguments) if has_module else None,
                failed=lambda why: bar.write(f"keyferry: {why}", file=sys.stderr),
                found=found,
                advanced=bar.update,
            )
    code = show_json(
        {
            "DryRun": arguments.dry_run,
            "Records": outcome.records,
            "Found": outcome.found,
            "Moved": outcome.moved,
            "Changed": outcome.changed,
            "Failed": outcome.failed,
        }
    )
    return REFUSED if outcome.failed and code == DONE else code
