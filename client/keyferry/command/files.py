"""`keyferry encrypt-file` and `keyferry decrypt-file`."""

import argparse
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final

from ..client import Client
from ..guard import reason
from ..output import DONE
from .common import Failed, extra, progress, socket_option, usage
from .modules import add_module_options, check_module_options, open_module
from .records import add_store_option, open_store

__all__ = ["add_parsers"]

_OF_THIS_USER: Final = 0o600
_AS_THE_UMASK_LETS: Final = 0o666
"""Of a new file that is encrypted."""


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
    parser.add_argument(
        "--preserve",
        action="store_true",
        help="OUT gets IN's mode and times, and its owner and group where that is permitted; "
        "without it, OUT keeps those of the file that it replaces, but for the times",
    )


def _encrypt(arguments: argparse.Namespace) -> int:
    check_module_options(arguments)
    with extra("store"):
        from .. import files  # noqa: PLC0415
    from .places import Target, source  # noqa: PLC0415

    with _failing(arguments):
        target = Target(arguments.target, preserve=arguments.preserve)
        if target.is_terminal():
            usage("an encrypted file is nothing for a terminal: name a file, or a pipe")
        with source(arguments.source) as plain:
            with open_store(arguments) as store:
                record = store.get(arguments.record)
            module = open_module(arguments)
            with Client(arguments.socket) as kms:
                key = module.recover_data_key(kms, record.data_key_record())
            with (
                target.open(plain, mode=_AS_THE_UMASK_LETS, after_all=False) as out,
                progress("encrypting", "B", scale=True, total=_size(plain)) as bar,
            ):
                files.encrypt(plain, out, module, key, record.data_key_record(), name=record.name, advanced=bar.update)
    return DONE


def _decrypt(arguments: argparse.Namespace) -> int:
    check_module_options(arguments)
    with extra("module"):
        from .. import files  # noqa: PLC0415
    from .places import Target, source  # noqa: PLC0415

    with _failing(arguments):
        target = Target(arguments.target, preserve=arguments.preserve)
        with source(arguments.source) as sealed:
            with _naming(arguments.source):
                header = files.read_header(sealed)
            module = open_module(arguments)
            with Client(arguments.socket) as kms:
                key = module.recover_data_key(kms, header.record)
            with (
                target.open(sealed, mode=_OF_THIS_USER, after_all=True) as out,
                progress("decrypting", "B", scale=True, total=_size(sealed)) as bar,
                _naming(arguments.source),
            ):
                files.decrypt(sealed, out, module, key, header, advanced=bar.update)
    return DONE


@contextmanager
def _failing(arguments: argparse.Namespace) -> Iterator[None]:
    """For what the system refuses, such as a full disk. A reader that has seen enough is no error of its own."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        where = "" if error.filename else f"{arguments.source} to {arguments.target}: "
        raise Failed(f"{where}{reason(error)}") from None


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Say of which file it is that something is wrong with it."""
    from ..files import FileError  # noqa: PLC0415

    try:
        yield
    except FileError as error:
        raise FileError(f"{source}: {error}") from None


def _size(file: BinaryIO) -> int | None:
    """Return the size of a regular file, for the progress bar."""
    status = os.fstat(file.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None
