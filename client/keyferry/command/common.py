"""Code that several commands share: exit codes, arguments, optional extras, and progress on a terminal."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn, TextIO

from .. import stdout, streams
from ..arguments import socket, whole_number
from ..declaration import Operation
from ..descriptors import open_to_read
from ..errors import KeyferryError
from ..parameters import (
    CIPHERTEXT_BLOB,
    DESTINATION_ENCRYPTION_CONTEXT,
    ENCRYPTION_CONTEXT,
    PLAINTEXT,
    PUBLIC_KEY_BLOB,
    SOURCE_ENCRYPTION_CONTEXT,
    Parameter,
    decode_base64,
    encode_base64,
)
from ..protocol.rpc import DEFAULT_SOCKET, pem_to_der

__all__ = [
    "PROGRAM",
    "REFUSED",
    "UNREACHABLE",
    "USAGE",
    "Failed",
    "add_parameters",
    "extra",
    "progress",
    "read_parameters",
    "show_json",
    "socket_option",
    "usage",
    "warn",
]

PROGRAM: Final = "keyferry"
REFUSED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3

_EXTRAS: Final = {
    "module": {"cryptography"},
    "pkcs11": {"cryptography", "pkcs11"},
    "store": {"cryptography", "sqlalchemy", "psycopg", "tqdm"},
}
"""Packages that an extra brings (client/pyproject.toml)."""


class Failed(KeyferryError):
    """A command failed for a reason other than the agent or the store."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Guard imports of an extra's packages. Raises `Failed` if one is not installed, or does not work with this OpenSSL."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRAS[name] or error.path is not None:  # the package is installed, but broken
            raise
        raise Failed(
            f'this needs {package}, which is not installed; install the extra "{name}" of keyferry (docs/installing.md)'
        ) from None
    except Exception as error:
        from ..openssl_configuration import cryptography_failure  # noqa: PLC0415 - few commands need OpenSSL

        if failure := cryptography_failure(error):
            raise Failed(failure) from None
        raise


def usage(message: str) -> NoReturn:
    """Print an error in the arguments on standard error, and exit with code 2."""
    stdout.complain(PROGRAM, message)
    raise SystemExit(USAGE)


def warn(message: str) -> None:
    """Print a warning on standard error."""
    stdout.complain(PROGRAM, f"warning: {message}")


def show_json(result: Any) -> int:
    """Print a result as JSON; return the exit code."""
    return stdout.show_json(PROGRAM, result)


def socket_option() -> argparse.ArgumentParser:
    """Return a parent parser with --socket, for every command that calls an agent."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--socket",
        type=socket,
        metavar="PATH",
        help=f"the agent's socket (default: $KEYFERRY_SOCKET, else {DEFAULT_SOCKET})",
    )
    return parser


# --- an operation's parameters, by the API's own names ----------------------------------------------------------------

_STANDARD_INPUT: Final = "-"
_MAX_FILE_BYTES: Final = 1 << 20
"""Most bytes read from a parameter's file: far more than the agent accepts. The limit also stops at endless devices."""


def _public_key(content: bytes) -> str:
    return encode_base64(pem_to_der(content))


def _ciphertext(content: bytes) -> str:
    """Return Base64 text without its white space. Other content is the ciphertext itself, and is encoded."""
    try:
        text = "".join(content.decode("ascii").split())
        decode_base64(text)
    except ValueError:
        return encode_base64(content)
    return text


def _text(content: bytes) -> str:
    return content.decode().strip()


_FROM_FILES: Final[dict[Parameter[Any], tuple[Callable[[bytes], str], str]]] = {
    PUBLIC_KEY_BLOB: (_public_key, "PEM, DER or Base64"),
    PLAINTEXT: (encode_base64, "the plaintext itself, not its Base64,"),
    CIPHERTEXT_BLOB: (_ciphertext, "Base64 text or the bytes themselves"),
    ENCRYPTION_CONTEXT: (_text, "JSON text"),
    SOURCE_ENCRYPTION_CONTEXT: (_text, "JSON text"),
    DESTINATION_ENCRYPTION_CONTEXT: (_text, "JSON text"),
}
"""Parameters whose value may come from a file: a function from its content to the value, and a description for --help."""


class _Once(argparse.Action):
    """Stores an option's value, and rejects an option that occurs twice: that is a mistake, not a correction."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string}: given twice; give it once")
        setattr(namespace, self.dest, values)


def add_parameters(
    parser: argparse.ArgumentParser,
    operation: Operation[..., Any],
    *,
    excluded_names: Iterable[str] = (),
    enforce: bool = False,
) -> None:
    """Add an operation's parameters as options. With `enforce`, the parser also requires those that the agent requires."""
    for name, parameter in operation.parameters.items():
        if name in excluded_names:
            continue
        required = name in operation.required
        _, content = _FROM_FILES.get(parameter, (None, ""))
        file = f" @FILE reads {content} from a file, - from standard input." if content else ""
        help_text = f"{parameter.doc}{file}{' (required)' if required else ''}".replace("%", "%%")
        parser.add_argument(f"--{name}", action=_Once, metavar="VALUE", required=enforce and required, help=help_text)


def read_parameters(arguments: argparse.Namespace, operation: Operation[..., Any]) -> dict[str, Any]:
    """Return the parameters on the command line in the form of a request. Exits with code 2 if a value is not valid."""
    texts = {name: getattr(arguments, name, None) for name in operation.parameters}
    input_names = [
        f"--{name}" for name, text in texts.items() if text == _STANDARD_INPUT and _from_file(operation, name)
    ]
    if len(input_names) > 1:
        usage(f"{' and '.join(input_names)}: only one parameter can be read from standard input")
    return {name: _value(operation.parameters[name], text) for name, text in texts.items() if text is not None}


def _from_file(operation: Operation[..., Any], name: str) -> bool:
    return operation.parameters[name] in _FROM_FILES


def _value(parameter: Parameter[Any], text: str) -> Any:
    if parameter in _FROM_FILES and (text == _STANDARD_INPUT or text.startswith("@")):
        convert, _ = _FROM_FILES[parameter]
        try:
            return convert(_content(text))
        except OSError as error:
            usage(f"--{parameter.name} {text}: {error.strerror}")
        except ValueError as error:
            usage(f"--{parameter.name} {text}: {error}")
    if parameter is PLAINTEXT:
        stdout.complain(PROGRAM, "other users can see --Plaintext in the process list; use --Plaintext @FILE or -")
    if parameter.integer:
        try:
            return whole_number(text)
        except argparse.ArgumentTypeError as error:
            usage(f"--{parameter.name}: {error}")
    return text


def _content(text: str) -> bytes:
    """Return the content of @FILE, or of standard input. Raises OSError, or ValueError for a file that is too long."""
    with streams.reader(0) if text == _STANDARD_INPUT else open_to_read(text[1:]) as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError(f"longer than {_MAX_FILE_BYTES} bytes, the limit of a parameter")
    return content


# --- progress ---------------------------------------------------------------------------------------------------------


class _NoBar:
    """Replaces tqdm's progress bar where tqdm is not installed."""

    def update(self, _count: int) -> None:
        pass

    def reset(self, _total: int) -> None:
        pass

    def write(self, text: str, file: TextIO) -> None:
        print(text, file=file)


@contextmanager
def progress(label: str, unit: str, *, scale: bool = False, total: int | None = None) -> Iterator[Any]:
    """Lend a progress bar, which tqdm shows on a terminal only. Without tqdm, no progress bar is shown."""
    try:
        from tqdm import tqdm  # noqa: PLC0415
    except ModuleNotFoundError:
        yield _NoBar()
        return
    with tqdm(
        desc=label,
        unit=unit,
        unit_scale=scale,
        unit_divisor=1024,
        total=total,
        disable=None,
        file=sys.stderr,
        leave=False,
    ) as bar:
        yield bar
