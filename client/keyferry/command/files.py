"""`keyferry encrypt-file` and `keyferry decrypt-file`."""

import argparse
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Final

from ..client import Client
from ..output import DONE
from .common import Failed, extra, progress, socket_option, usage
from .modules import add_module_options, open_module
from .records import add_store_option, open_store

__all__ = ["add_parsers"]

_STANDARD: Final = "-"


def add_parsers(commands: Any) -> None:
    """Add both commands."""
    encrypt = commands.add_parser(
        "encrypt-file",
        help="encrypt a file with a record's data key",
        description="Encrypt IN to OUT, inside a module, with the data key of a record. OUT appears when it is complete.",
        parents=[socket_option()],
        allow_abbrev=False,
    )
    _add_places(encrypt, "standard output")
    encrypt.add_argument("--record", metavar="NAME", required=True, help="the record in the store")
    add_store_option(encrypt)
    encrypt.set_defaults(run=_encrypt)
    decrypt = commands.add_parser(
        "decrypt-file",
        help="decrypt what encrypt-file made; needs no store",
        description="Decrypt IN to OUT. The file itself holds its record. OUT appears only when all of IN was authentic.",
        parents=[socket_option()],
        allow_abbrev=False,
    )
    _add_places(decrypt, "standard output, which gets nothing before all of IN was authentic")
    decrypt.set_defaults(run=_decrypt)
    for parser in (encrypt, decrypt):
        add_module_options(parser)


def _add_places(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("source", metavar="IN", help="what to read; -: standard input")
    parser.add_argument("target", metavar="OUT", help=f"the result; a file of that name is replaced; -: {output}")


def _encrypt(arguments: argparse.Namespace) -> int:
    with extra("store"):
        from .. import files  # noqa: PLC0415
    if arguments.target == _STANDARD and sys.stdout.isatty():
        usage("an encrypted file is nothing for a terminal: name a file, or a pipe")
    with _failing(arguments), _source(arguments.source) as (source, size):
        with open_store(arguments) as store:
            record = store.get(arguments.record)
        module = open_module(arguments)
        with Client(arguments.socket) as kms:
            key = module.recover_data_key(kms, record.data_key_record())
        target = (
            _standard_output()
            if arguments.target == _STANDARD
            else files.replacing(
                arguments.target,
                source=source,
                mode=0o666,  # as the umask lets: it is encrypted
            )
        )
        with target as out, progress("encrypting", "B", scale=True, total=size) as bar:
            files.encrypt(source, out, module, key, record.data_key_record(), name=record.name, advanced=bar.update)
    return DONE


def _decrypt(arguments: argparse.Namespace) -> int:
    with extra("module"):
        from .. import files  # noqa: PLC0415
    with _failing(arguments), _source(arguments.source) as (source, size):
        with _naming(arguments.source):
            header = files.read_header(source)
        module = open_module(arguments)
        with Client(arguments.socket) as kms:
            key = module.recover_data_key(kms, header.record)
        target = _spooled() if arguments.target == _STANDARD else files.replacing(arguments.target, source=source)
        with target as out, progress("decrypting", "B", scale=True, total=size) as bar, _naming(arguments.source):
            files.decrypt(source, out, module, key, header, advanced=bar.update)
    return DONE


@contextmanager
def _failing(arguments: argparse.Namespace) -> Iterator[None]:
    """For what the system refuses: a full disk, a reader that left."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else f"{arguments.source} to {arguments.target}"
        raise Failed(f"{where}: {error.strerror}") from None


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Say of which file it is that something is wrong with it."""
    from ..files import FileError  # noqa: PLC0415

    try:
        yield
    except FileError as error:
        raise FileError(f"{source}: {error}") from None


@contextmanager
def _source(path: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """A file to read, and its size where it has one."""
    with open(0, "rb", closefd=False) if path == _STANDARD else open(path, "rb") as file:
        status = os.fstat(file.fileno())
        yield file, status.st_size if stat.S_ISREG(status.st_mode) else None


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    """With a buffer of its own: what was not taken is not tried again when Python ends."""
    file = open(1, "wb", closefd=False)  # noqa: SIM115
    try:
        yield file
        file.flush()
    finally:
        with suppress(OSError):
            file.close()


@contextmanager
def _spooled() -> Iterator[BinaryIO]:
    """Standard output, for what may not be seen before all of it is there: it waits in a file without a name ($TMPDIR)."""
    with tempfile.TemporaryFile() as spool:
        yield spool
        spool.seek(0)
        with _standard_output() as out:
            shutil.copyfileobj(spool, out)
