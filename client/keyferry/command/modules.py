"""`keyferry module`: cryptographic modules in files; and how other commands open one."""

import argparse
import hashlib
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import passphrase, private_files
from ..content import resemblance
from ..parameters import decode_base64
from .common import Failed, extra, show_json, usage

if TYPE_CHECKING:
    from ..module.interface import CryptographicModule

__all__ = ["add_module_options", "add_parsers", "open_module"]


def add_parsers(commands: Any) -> None:
    """Add `module` and its verb."""
    module = commands.add_parser("module", help="cryptographic modules in files", allow_abbrev=False)
    verbs = module.add_subparsers(dest="verb", required=True, metavar="VERB")
    text = (
        "Make a software module: a key pair in a new file, sealed with a passphrase. Prints its public key and its pin."
    )
    init = verbs.add_parser("init", help="make a software module in a new file", description=text, allow_abbrev=False)
    init.add_argument("file", metavar="FILE", help="the new file")
    _add_passphrase(init, required=False)
    init.add_argument(
        "--generate-passphrase",
        action="store_true",
        help="make a strong passphrase, and print it; with --passphrase-file, write it to that new file instead",
    )
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
        from .. import age_passphrase  # noqa: PLC0415
        from ..module import ModuleError, SoftwareModule  # noqa: PLC0415
    content = _read(arguments.passphrase_file, private_files.owner_of(arguments.module))
    phrase = _first_line(arguments.passphrase_file, content)
    try:
        module = SoftwareModule.load(arguments.module, phrase)
        factor = age_passphrase.work_factor(Path(arguments.module).read_bytes())
    except OSError as error:
        raise Failed(f"{arguments.module}: {error.strerror}") from None
    except ModuleError as error:
        raise ModuleError(f"{error}{passphrase.taken_for(arguments.passphrase_file, content)}") from None
    if found := resemblance(content):
        _warn(
            f"{arguments.passphrase_file}: looks like {found}; others may know its first line, which is the passphrase"
        )
    if factor is not None and factor < age_passphrase.MIN_STRONG_WORK_FACTOR:
        _warn(
            f"{arguments.module}: its passphrase is sealed with work factor {factor}, which is low; "
            "SoftwareModule.save to a new file raises it"
        )
    return module


def _init(arguments: argparse.Namespace) -> int:
    with extra("module"):
        from ..module import ModuleError, SoftwareModule  # noqa: PLC0415
    module = SoftwareModule.generate(arguments.key_spec)
    phrase, new_file = _passphrase_to_seal(arguments)
    try:
        module.save(arguments.file, phrase)
    except (OSError, ModuleError) as error:
        if new_file is not None:
            with suppress(OSError):
                new_file.unlink()  # it opens nothing, and would be in the way of the next try
        if isinstance(error, FileExistsError):
            raise Failed(f"{arguments.file} exists; a module is never overwritten") from None
        raise Failed(f"{arguments.file}: {error.strerror if isinstance(error, OSError) else error}") from None
    pin = hashlib.sha256(decode_base64(module.public_key_blob)).hexdigest()
    shown = {
        "PublicKeyBlob": module.public_key_blob,
        "WrappingKeySpec": module.wrapping_key_spec,
        "WrappingAlgorithm": module.wrapping_algorithm,
        "Recipient": f"sha256:{pin}",
    }
    if arguments.generate_passphrase and new_file is None:
        shown["Passphrase"] = phrase
    return show_json(shown)


def _passphrase_to_seal(arguments: argparse.Namespace) -> tuple[str, Path | None]:
    """Return the passphrase of a new module, and the new file that it was written to, if any. Raises `Failed`."""
    if not arguments.generate_passphrase:
        if not arguments.passphrase_file:
            usage("--passphrase-file or --generate-passphrase is required")
        phrase = _new_passphrase(arguments.passphrase_file)
        if weakness := passphrase.weakness(phrase):
            _warn(f"{arguments.passphrase_file}: {weakness}")
        return phrase, None
    phrase = passphrase.generate()
    if not arguments.passphrase_file:
        return phrase, None
    try:
        passphrase.write_new_file(arguments.passphrase_file, phrase)
    except FileExistsError:
        raise Failed(f"{arguments.passphrase_file} exists; a generated passphrase needs a new file") from None
    except OSError as error:
        raise Failed(f"{arguments.passphrase_file}: {error.strerror}") from None
    return phrase, Path(arguments.passphrase_file)


def _warn(message: str) -> None:
    print(f"keyferry: warning: {message}", file=sys.stderr)


def _first_line(path: str, content: bytes) -> str:
    """Return the passphrase that opens a module. Raises `Failed`."""
    try:
        line = content[: passphrase.MAX_FILE_BYTES].split(b"\n", 1)[0].decode().rstrip("\r")
    except UnicodeDecodeError:
        raise Failed(f"{path}: not text; a passphrase is expected in the first line") from None
    if not line:
        raise Failed(f"{path}: the first line is empty; a passphrase is expected there")
    return line


def _new_passphrase(path: str) -> str:
    """The passphrase in a file, to seal with. Raises `Failed` for a file that looks like anything else."""
    try:
        return passphrase.of_new_file(_read(path))
    except ValueError as error:
        raise Failed(f"{path}: {error}") from None


def _read(path: str, owners: Collection[int] = ()) -> bytes:
    """Return the content of a passphrase file, which may be a pipe: at most one byte more than such a file has.

    `owners`: further users that root accepts. Raises `Failed`.
    """
    try:
        with Path(path).open("rb") as file:
            private_files.check(file.fileno(), path, secret=True, owners=owners)
            return file.read(passphrase.MAX_FILE_BYTES + 1)
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from None
    except private_files.PrivateFileError as error:
        raise Failed(str(error)) from None
