"""`keyferry encrypt-file`, `decrypt-file` and `reencrypt-file`."""

import argparse
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from ..client import Client
from ..guard import reason
from ..stdout import DONE
from .common import Failed, extra, progress, socket_option, usage, warn
from .modules import add_module_options, check_module_options, open_module
from .records import add_store_option, open_store

if TYPE_CHECKING:
    from ..module.interface import CryptographicModule, DataKey

__all__ = ["add_parsers"]

_PRIVATE_MODE: Final = 0o600
_DEFAULT_MODE: Final = 0o666
"""Mode of a new encrypted file, before the umask."""
_PROBE: Final = b"keyferry reencrypt-file"


def add_parsers(commands: Any) -> None:
    """Add `encrypt-file`, `decrypt-file` and `reencrypt-file`."""
    encrypt = commands.add_parser(
        "encrypt-file",
        help="encrypt a file with a record's data key",
        description="Encrypt IN to OUT in a module, with the data key of a record. OUT appears when it is complete.",
        parents=[socket_option()],
        allow_abbrev=False,
    )
    _add_places(encrypt, "standard output")
    encrypt.add_argument("--record", metavar="NAME", required=True, help="the record in the store")
    add_store_option(encrypt)
    encrypt.set_defaults(run=_encrypt)
    decrypt = commands.add_parser(
        "decrypt-file",
        help="decrypt a file of encrypt-file; needs no store",
        description="Decrypt IN to OUT. The file itself holds its record. OUT appears only when all of IN was authentic.",
        parents=[socket_option()],
        allow_abbrev=False,
    )
    _add_places(decrypt, "standard output, which gets nothing before all of IN was authentic")
    decrypt.set_defaults(run=_decrypt)
    reencrypt = commands.add_parser(
        "reencrypt-file",
        help="move an encrypted file to the data key of a record",
        description="Decrypt IN in memory and encrypt it with the data key of a record, to OUT or in the place of IN. The new "
        "file is read back before it appears: it must decrypt to the same content.",
        parents=[socket_option()],
        allow_abbrev=False,
    )
    _add_places(reencrypt, "standard output, which gets nothing before all of IN was authentic", in_place=True)
    reencrypt.add_argument("--record", metavar="NAME", required=True, help="the record in the store")
    add_store_option(reencrypt)
    reencrypt.set_defaults(run=_reencrypt)
    for parser in (encrypt, decrypt, reencrypt):
        add_module_options(parser)


def _add_places(parser: argparse.ArgumentParser, output: str, *, in_place: bool = False) -> None:
    parser.add_argument("source", metavar="IN", help="the file to read; -: standard input")
    target_help = f"the result; a file of that name is replaced; -: {output}" + (
        "; without it, IN is replaced" * in_place
    )
    parser.add_argument("target", metavar="OUT", nargs="?" if in_place else None, help=target_help)
    parser.add_argument(
        "--preserve",
        action="store_true",
        help="OUT gets IN's mode and times, and its owner and group where that is permitted; "
        "without it, OUT keeps the mode, owner and group of a file that it replaces",
    )


def _encrypt(arguments: argparse.Namespace) -> int:
    check_module_options(arguments)
    with extra("store"):
        from .. import files  # noqa: PLC0415
    from .places import Target, source  # noqa: PLC0415

    with _translating_errors(arguments):
        target = Target(arguments.target, preserve=arguments.preserve)
        if target.is_terminal():
            usage("an encrypted file is not written to a terminal; name a file, or a pipe")
        with source(arguments.source) as plaintext:
            with open_store(arguments) as store:
                record = store.get(arguments.record)
            module = open_module(arguments)
            with Client(arguments.socket) as kms:
                key = module.recover_data_key(kms, record.data_key_record())
            with (
                target.open(plaintext, mode=_DEFAULT_MODE, after_all=False) as out,
                progress("encrypting", "B", scale=True, total=_size(plaintext)) as bar,
            ):
                files.encrypt(
                    plaintext, out, module, key, record.data_key_record(), name=record.name, advanced=bar.update
                )
    return DONE


def _decrypt(arguments: argparse.Namespace) -> int:
    check_module_options(arguments)
    with extra("module"):
        from .. import files  # noqa: PLC0415
    from .places import Target, source  # noqa: PLC0415

    with _translating_errors(arguments):
        target = Target(arguments.target, preserve=arguments.preserve)
        with source(arguments.source) as ciphertext:
            with _naming_source(arguments.source):
                header = files.read_header(ciphertext)
            module = open_module(arguments)
            with Client(arguments.socket) as kms:
                key = module.recover_data_key(kms, header.record)
            with (
                target.open(ciphertext, mode=_PRIVATE_MODE, after_all=True) as out,
                progress("decrypting", "B", scale=True, total=_size(ciphertext)) as bar,
                _naming_source(arguments.source),
            ):
                files.decrypt(ciphertext, out, module, key, header, advanced=bar.update)
    return DONE


def _reencrypt(arguments: argparse.Namespace) -> int:
    check_module_options(arguments)
    with extra("store"):
        from .. import files  # noqa: PLC0415
        from ..files.sparse import SparseWriter  # noqa: PLC0415
    from .places import Target, in_place, source  # noqa: PLC0415

    with _translating_errors(arguments):
        target = None if arguments.target is None else Target(arguments.target, preserve=arguments.preserve)
        if target is not None and target.is_terminal():
            usage("an encrypted file is not written to a terminal; name a file, or a pipe")
        with source(arguments.source) as ciphertext:
            with _naming_source(arguments.source):
                header = files.read_header(ciphertext)
            with open_store(arguments) as store:
                record = store.get(arguments.record)
            module = open_module(arguments)
            with Client(arguments.socket) as kms:
                key = module.recover_data_key(kms, header.record)
                new_key = module.recover_data_key(kms, record.data_key_record())
            if target is None and _are_same_key(module, key, new_key):
                warn(
                    f"{arguments.source}: already encrypted with this record's data key, and left unchanged; "
                    "`keyferry records renew` gives a record a new data key"
                )
                return DONE
            place: AbstractContextManager[BinaryIO]
            if target is None:
                place = in_place(arguments.source, ciphertext, preserve=arguments.preserve)
            else:
                place = target.open(ciphertext, mode=_DEFAULT_MODE, after_all=True)
            with (
                place as out,
                progress("encrypting", "B", scale=True, total=_size(ciphertext)) as bar,
                _naming_source(arguments.source),
            ):
                assert isinstance(out, SparseWriter)
                key_record = record.data_key_record()
                digest = files.reencrypt(
                    ciphertext, out, module, key, header, new_key, key_record, name=record.name, advanced=bar.update
                )
                with out.reading_back() as result:
                    if files.plaintext_hash(result, module, new_key) != digest:
                        raise files.FileError("the new file does not decrypt to the same content, and was removed")
    return DONE


def _are_same_key(module: "CryptographicModule", key: "DataKey", other_key: "DataKey") -> bool:
    """Return True if both handles hold the same data key. CiphertextBlobs are not compared: a rewrap changes them."""
    from ..module import ModuleError  # noqa: PLC0415

    try:
        module.decrypt(other_key, module.encrypt(key, _PROBE))
    except ModuleError:
        return False
    return True


@contextmanager
def _translating_errors(arguments: argparse.Namespace) -> Iterator[None]:
    """Turn errors of the system, such as a full disk, into `Failed`. A reader that closed its pipe stays a BrokenPipeError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        location = "" if error.filename else f"{arguments.source} to {arguments.target or arguments.source}: "
        raise Failed(f"{location}{reason(error)}") from None


@contextmanager
def _naming_source(source: str) -> Iterator[None]:
    """Add the path of the source to a `FileError`."""
    from ..files import FileError  # noqa: PLC0415

    try:
        yield
    except FileError as error:
        raise FileError(f"{source}: {error}") from None


def _size(file: BinaryIO) -> int | None:
    """Return the size of a regular file in bytes, for the progress bar; None for other files."""
    status = os.fstat(file.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None
