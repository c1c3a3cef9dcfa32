"""`keyferry module`: cryptographic modules in files; and how other commands open one."""

import argparse
import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .. import private_files
from ..parameters import decode_base64
from .common import Failed, extra, show_json, usage

if TYPE_CHECKING:
    from ..module.interface import CryptographicModule

__all__ = ["add_module_options", "add_parsers", "open_module"]

_LONGEST_PASSPHRASE: Final = 65_536


def add_parsers(commands: Any) -> None:
    """Add `module` and its verb."""
    module = commands.add_parser("module", help="cryptographic modules in files", allow_abbrev=False)
    verbs = module.add_subparsers(dest="verb", required=True, metavar="VERB")
    text = (
        "Make a software module: a key pair in a new file, sealed with a passphrase. Prints its public key and its pin."
    )
    init = verbs.add_parser("init", help="make a software module in a new file", description=text, allow_abbrev=False)
    init.add_argument("file", metavar="FILE", help="the new file")
    _add_passphrase(init, required=True)
    init.add_argument("--key-spec", choices=("RSA_2048", "EC_SM2"), default="RSA_2048", help="default: RSA_2048")
    init.set_defaults(run=_init)


def add_module_options(parser: argparse.ArgumentParser, *, required: bool = True, why: str = "") -> None:
    """Add the options that name a module."""
    parser.add_argument(
        "--module", metavar="FILE", required=required, help=f"a software module that `keyferry module init` made{why}"
    )
    _add_passphrase(parser, required=required)


def _add_passphrase(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--passphrase-file", metavar="F", required=required, help="a file whose first line is the module's passphrase"
    )


def open_module(arguments: argparse.Namespace) -> "CryptographicModule":
    """The module that the options name. Raises `KeyferryError`."""
    if not arguments.passphrase_file:
        usage("--module needs --passphrase-file")
    with extra("module"):
        from ..module import SoftwareModule  # noqa: PLC0415
    passphrase = _passphrase(arguments.passphrase_file, private_files.owner_of(arguments.module))
    try:
        return SoftwareModule.load(arguments.module, passphrase)
    except OSError as error:
        raise Failed(f"{arguments.module}: {error.strerror}") from None


def _init(arguments: argparse.Namespace) -> int:
    with extra("module"):
        from ..module import SoftwareModule  # noqa: PLC0415
    passphrase = _passphrase(arguments.passphrase_file)
    module = SoftwareModule.generate(arguments.key_spec)
    try:
        module.save(arguments.file, passphrase)
    except FileExistsError:
        raise Failed(f"{arguments.file} exists; a module is never overwritten") from None
    except OSError as error:
        raise Failed(f"{arguments.file}: {error.strerror}") from None
    pin = hashlib.sha256(decode_base64(module.public_key_blob)).hexdigest()
    return show_json(
        {
            "PublicKeyBlob": module.public_key_blob,
            "WrappingKeySpec": module.wrapping_key_spec,
            "WrappingAlgorithm": module.wrapping_algorithm,
            "Recipient": f"sha256:{pin}",
        }
    )


def _passphrase(path: str, owners: Collection[int] = ()) -> str:
    """The first line of a file, which may be a pipe. `owners`: further users that root accepts. Raises `Failed`."""
    try:
        with Path(path).open("rb") as file:
            private_files.check(file.fileno(), path, secret=True, owners=owners)
            line = file.readline(_LONGEST_PASSPHRASE).decode().rstrip("\r\n")
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from None
    except private_files.PrivateFileError as error:
        raise Failed(str(error)) from None
    except UnicodeDecodeError:
        raise Failed(f"{path}: not text; a passphrase is expected in the first line") from None
    if not line:
        raise Failed(f"{path}: the first line is empty; a passphrase is expected there")
    return line
