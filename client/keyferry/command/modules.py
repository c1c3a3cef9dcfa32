"""`keyferry module`: cryptographic modules in files; and how other commands open one."""

import argparse
import hashlib
import os
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import descriptors, new_files, passphrase, private_files
from ..content import resemblance
from ..descriptors import open_to_read
from ..output import DONE
from ..parameters import decode_base64
from .common import Failed, extra, show_json, usage, warn

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
        # Not of a pipe: its content was read already.
        regular = stat.S_ISREG(os.stat(arguments.module).st_mode)
        factor = age_passphrase.work_factor(Path(arguments.module).read_bytes()) if regular else None
    except OSError as error:
        raise Failed(f"{arguments.module}: {error.strerror}") from None
    except ModuleError as error:
        raise ModuleError(f"{error}{passphrase.taken_for(arguments.passphrase_file, content)}") from None
    if found := resemblance(content):
        warn(
            f"{arguments.passphrase_file}: looks like {found}; others may know its first line, which is the passphrase"
        )
    if factor is not None and factor < age_passphrase.MIN_STRONG_WORK_FACTOR:
        warn(
            f"{arguments.module}: its passphrase is sealed with work factor {factor}, which is low; "
            "SoftwareModule.save to a new file raises it"
        )
    return module


def _init(arguments: argparse.Namespace) -> int:
    with extra("module"):
        from ..module import ModuleError, SoftwareModule  # noqa: PLC0415
    if os.path.lexists(arguments.file):
        raise _exists(arguments)
    module = SoftwareModule.generate(arguments.key_spec)
    phrase = _passphrase_to_seal(arguments)
    prints_passphrase = arguments.generate_passphrase and not arguments.passphrase_file
    code = DONE
    new_file: Path | None = None
    try:
        sealed = module.sealed(phrase)
        with new_files.creating(arguments.file) as file:
            file.write(sealed)
            file.flush()
            os.fsync(file.fileno())
            # Only what cannot fail any more comes after the passphrase: a module whose passphrase is lost is of no use.
            if prints_passphrase:
                code = show_json({**_shown(module), "Passphrase": phrase})
                if code != DONE:
                    raise Failed(f"{arguments.file}: no module was made, because the passphrase could not be printed")
            elif arguments.generate_passphrase:
                new_file = _write_passphrase(arguments.passphrase_file, phrase)
    except BaseException as error:
        if new_file is not None:
            with suppress(OSError):
                new_file.unlink()  # it opens nothing, and would be in the way of the next attempt
        if not isinstance(error, (OSError, ModuleError)):
            raise
        if isinstance(error, FileExistsError):
            raise _exists(arguments) from None
        raise Failed(f"{arguments.file}: {error.strerror if isinstance(error, OSError) else error}") from None
    return code if prints_passphrase else show_json(_shown(module))


def _exists(arguments: argparse.Namespace) -> Failed:
    return Failed(f"{arguments.file} exists; a module is never overwritten")


def _shown(module: "CryptographicModule") -> dict[str, str]:
    """Return what is printed about a new module."""
    pin = hashlib.sha256(decode_base64(module.public_key_blob)).hexdigest()
    return {
        "PublicKeyBlob": module.public_key_blob,
        "WrappingKeySpec": module.wrapping_key_spec,
        "WrappingAlgorithm": module.wrapping_algorithm,
        "Recipient": f"sha256:{pin}",
    }


def _passphrase_to_seal(arguments: argparse.Namespace) -> str:
    """Return the passphrase of a new module. Raises `Failed`."""
    if not arguments.generate_passphrase:
        if not arguments.passphrase_file:
            usage("--passphrase-file or --generate-passphrase is required")
        phrase = _new_passphrase(arguments.passphrase_file)
        if weakness := passphrase.weakness(phrase):
            warn(f"{arguments.passphrase_file}: {weakness}")
        return phrase
    return passphrase.generate()


def _write_passphrase(path: str, phrase: str) -> Path:
    try:
        passphrase.write_new_file(path, phrase)
    except FileExistsError:
        raise Failed(f"{path} exists; a generated passphrase needs a new file") from None
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from None
    return Path(path)


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

    Of an open descriptor only the first line: what follows it is another reader's. `owners`: further users that root accepts.
    Raises `Failed`.
    """
    limit = passphrase.MAX_FILE_BYTES + 1
    try:
        with open_to_read(path, buffering=0) as file:  # unbuffered, for the same reason
            private_files.check(file.fileno(), path, secret=True, owners=owners)
            if descriptors.find(path) is not None:
                return file.readline(limit)
            content = b""
            while len(content) < limit and (read := file.read(limit - len(content))):
                content += read
            return content
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from None
    except private_files.PrivateFileError as error:
        raise Failed(str(error)) from None
