"""`keyferry module`, for cryptographic modules in files. Also the options by which other commands open a module."""

import argparse
import hashlib
import os
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .. import descriptors, new_files, passphrase, private_files
from ..content import first_line, resemblance
from ..descriptors import open_to_read
from ..parameters import decode_base64
from ..stdout import DONE
from .common import Failed, extra, show_json, usage, warn

if TYPE_CHECKING:
    from ..module.interface import CryptographicModule

__all__ = ["add_module_options", "add_parsers", "check_module_options", "open_module"]

_URI: Final = "pkcs11:"


def add_parsers(commands: Any) -> None:
    """Add `module` and its verbs."""
    module = commands.add_parser("module", help="cryptographic modules in files", allow_abbrev=False)
    verbs = module.add_subparsers(dest="verb", required=True, metavar="VERB")
    text = (
        "Make a software module: a new key pair in a new file, sealed with a passphrase. "
        "Prints its public key and its fingerprint."
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
    text = "Print a module's public key and its fingerprint, as `module init` did."
    show = verbs.add_parser("show", help="print a module's public key again", description=text, allow_abbrev=False)
    add_module_options(show, positional=True)
    show.set_defaults(run=_show)


def add_module_options(
    parser: argparse.ArgumentParser, *, required: bool = True, why: str = "", positional: bool = False
) -> None:
    """Add the options that name a module: a file, or a key pair in a token. `check_module_options` checks their combination."""
    group = parser.add_mutually_exclusive_group(required=required)
    text = f"a software module that `keyferry module init` made{why}"
    if positional:
        group.add_argument("module", metavar="FILE", nargs="?", help=text)
    else:
        group.add_argument("--module", metavar="FILE", help=text)
    group.add_argument("--pkcs11", metavar="LIBRARY", help="instead, a module in a token of this PKCS#11 library")
    _add_passphrase(parser, required=False)
    parser.add_argument(
        "--token", metavar="LABEL|URI", help="the token: its label, or a PKCS#11 URI (pkcs11:serial=...)"
    )
    parser.add_argument("--key-label", metavar="LABEL", help="the label of the key pair in the token")
    parser.add_argument(
        "--pin-file", metavar="F", help="a file whose first line is the token's PIN; credential:NAME is systemd's"
    )
    parser.add_argument(
        "--library-parameters", metavar="TEXT", help="parameters that the library needs to initialise, as NSS does"
    )


def check_module_options(arguments: argparse.Namespace) -> bool:
    """Return True if the options name a module. Exits with code 2 if they do not belong together."""
    token_options = {
        "--token": arguments.token,
        "--key-label": arguments.key_label,
        "--pin-file": arguments.pin_file,
        "--library-parameters": arguments.library_parameters,
    }
    if arguments.pkcs11 is None:
        if token_only := [option for option, value in token_options.items() if value is not None]:
            usage(f"{', '.join(token_only)}: only with --pkcs11")
        if arguments.module is not None and not arguments.passphrase_file:
            usage("a software module needs --passphrase-file")
        return arguments.module is not None
    if arguments.passphrase_file:
        usage("--passphrase-file is for software modules; a token's PIN comes from --pin-file")
    if missing_options := [option for option in ("--token", "--key-label") if not token_options[option]]:
        usage(f"--pkcs11 needs {' and '.join(missing_options)}")
    return True


def _add_passphrase(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--passphrase-file", metavar="F", required=required, help="a file whose first line is the module's passphrase"
    )


def open_module(arguments: argparse.Namespace) -> "CryptographicModule":
    """Open the module that the options name. Raises `KeyferryError`."""
    return _open_file(arguments) if arguments.module is not None else _open_token(arguments)


def _open_token(arguments: argparse.Namespace) -> "CryptographicModule":
    with extra("pkcs11"):
        from ..module import Pkcs11Module  # noqa: PLC0415
    token: str = arguments.token
    is_uri = token.startswith(_URI)
    try:
        return Pkcs11Module.open(
            arguments.pkcs11,
            token_label=None if is_uri else token,
            token_uri=token if is_uri else None,
            key_label=arguments.key_label,
            pin_file=arguments.pin_file,
            library_parameters=arguments.library_parameters,
        )
    except ValueError as error:  # the text is not a valid PKCS#11 URI
        usage(f"--token: {error}")


def _open_file(arguments: argparse.Namespace) -> "CryptographicModule":
    with extra("module"):
        from .. import age_passphrase  # noqa: PLC0415
        from ..module import ModuleError, SoftwareModule  # noqa: PLC0415
    content = _read(arguments.passphrase_file, private_files.owner_of(arguments.module))
    phrase = _passphrase_in(arguments.passphrase_file, content)
    try:
        module = SoftwareModule.load(arguments.module, phrase)
        # A pipe has no readable work factor: `load` has consumed its content.
        is_regular = stat.S_ISREG(os.stat(arguments.module).st_mode)
        factor = age_passphrase.work_factor(Path(arguments.module).read_bytes()) if is_regular else None
    except OSError as error:
        raise Failed(f"{arguments.module}: {error.strerror}") from None
    except ModuleError as error:
        raise ModuleError(f"{error}{passphrase.taken_for(arguments.passphrase_file, content)}") from None
    if kind := resemblance(content):
        warn(f"{arguments.passphrase_file}: looks like {kind}; others may know its first line, which is the passphrase")
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
        sealed_file = module.sealed(phrase)
        with new_files.creating(arguments.file) as file:
            file.write(sealed_file)
            file.flush()
            os.fsync(file.fileno())
            # Steps after the passphrase must not fail: a module without its passphrase is useless.
            if prints_passphrase:
                code = show_json({**_public_fields(module), "Passphrase": phrase})
                if code != DONE:
                    raise Failed(f"{arguments.file}: no module was made, because the passphrase could not be printed")
            elif arguments.generate_passphrase:
                new_file = _write_passphrase(arguments.passphrase_file, phrase)
    except BaseException as error:
        if new_file is not None:
            with suppress(OSError):
                new_file.unlink()  # this passphrase opens no module, and its file would block the next attempt
        if not isinstance(error, (OSError, ModuleError)):
            raise
        if isinstance(error, FileExistsError):
            raise _exists(arguments) from None
        raise Failed(f"{arguments.file}: {error.strerror if isinstance(error, OSError) else error}") from None
    return code if prints_passphrase else show_json(_public_fields(module))


def _show(arguments: argparse.Namespace) -> int:
    check_module_options(arguments)
    return show_json(_public_fields(open_module(arguments)))


def _exists(arguments: argparse.Namespace) -> Failed:
    return Failed(f"{arguments.file} exists; a module is never overwritten, so name a new file")


def _public_fields(module: "CryptographicModule") -> dict[str, str]:
    """Return the fields that `module init` and `module show` print."""
    fingerprint = hashlib.sha256(decode_base64(module.public_key_blob)).hexdigest()
    return {
        "PublicKeyBlob": module.public_key_blob,
        "WrappingKeySpec": module.wrapping_key_spec,
        "WrappingAlgorithm": module.wrapping_algorithm,
        "Recipient": f"sha256:{fingerprint}",
    }


def _passphrase_to_seal(arguments: argparse.Namespace) -> str:
    """Read or generate the passphrase of a new module. Raises `Failed`."""
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


def _passphrase_in(path: str, content: bytes) -> str:
    """Return the passphrase that opens a module. Raises `Failed`."""
    try:
        return first_line(content[: passphrase.MAX_FILE_BYTES], "a passphrase")
    except ValueError as error:
        raise Failed(f"{path}: {error}") from None


def _new_passphrase(path: str) -> str:
    """Return the passphrase in a file, for sealing a new module. Raises `Failed` if the file looks like another kind."""
    try:
        return passphrase.of_new_file(_read(path))
    except ValueError as error:
        raise Failed(f"{path}: {error}") from None


def _read(path: str, owners: Collection[int] = ()) -> bytes:
    """Return the content of a passphrase file, which may be a pipe: at most one byte more than the limit of such a file.

    From an open descriptor, only the first line is read, because later lines are for another reader. `owners` are further
    users whose files root accepts. Raises `Failed`.
    """
    limit = passphrase.MAX_FILE_BYTES + 1
    try:
        with open_to_read(path, buffering=0) as file:  # unbuffered, for the same reason
            private_files.check(file.fileno(), path, secret=True, owners=owners)
            if descriptors.find(path) is not None:
                return file.readline(limit)
            content = b""
            while len(content) < limit and (data := file.read(limit - len(content))):
                content += data
            return content
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from None
    except private_files.PrivateFileError as error:
        raise Failed(str(error)) from None
