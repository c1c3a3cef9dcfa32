"""The `keyferry` command: its arguments, what it prints, and its exit codes."""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from . import __version__
from .client import Client
from .declaration import Operation
from .errors import AgentUnavailable, KmsError, ProtocolError
from .exchange import DEFAULT_SOCKET, pem_to_der
from .operations import OPERATIONS
from .output import show
from .parameters import PUBLIC_KEY_BLOB, Parameter, encode_base64

REFUSED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3

_WAIT_STEP: Final = 0.1
"""Seconds between two attempts of `status --wait`."""

_PROBE: Final = 5.0
"""Seconds that an agent that is there has to answer a probe."""

_EPILOG: Final = """exit codes: 0 done; 1 the agent refused (its error is on stderr, as JSON); 2 usage;
3 the agent cannot be reached; 74 standard output could not be written"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keyferry",
        description="Ask the key agent of this host.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"keyferry {__version__}")
    socket = argparse.ArgumentParser(add_help=False)
    socket.add_argument(
        "--socket", metavar="PATH", help=f"the agent's socket (default: $KEYFERRY_SOCKET, else {DEFAULT_SOCKET})"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    call = commands.add_parser(
        "call", help="one operation, by the API's own names", description="Call one operation.", allow_abbrev=False
    )
    operations = call.add_subparsers(dest="operation", required=True, metavar="OPERATION")
    for operation in OPERATIONS.values():
        _add_operation(operations.add_parser, operation, socket)
    status = commands.add_parser(
        "status",
        help="the agent's health, as JSON",
        description="Ask the agent for its health. For probes.",
        parents=[socket],
        allow_abbrev=False,
    )
    status.add_argument(
        "--wait",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="how long to wait for an agent that is not there yet",
    )
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < math.inf:
        raise ValueError
    return seconds


class _Once(argparse.Action):
    """A parameter that is given twice is a mistake, not a correction."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, values)


def _add_operation(add_parser: Any, operation: Operation[..., Any], socket: argparse.ArgumentParser) -> None:
    parser = add_parser(
        operation.name, help=operation.doc, description=operation.doc, parents=[socket], allow_abbrev=False
    )
    for name, parameter in operation.parameters.items():
        needed = " (required)" if name in operation.required else ""
        file = " @FILE reads a PEM or DER file." if parameter is PUBLIC_KEY_BLOB else ""
        parser.add_argument(
            f"--{name}", action=_Once, metavar="VALUE", help=f"{parameter.doc}{file}{needed}".replace("%", "%%")
        )


def _value(parameter: Parameter[Any], text: str) -> Any:
    if parameter is PUBLIC_KEY_BLOB and text.startswith("@"):
        try:
            with open(text[1:], "rb") as file:
                return encode_base64(pem_to_der(file.read()))
        except (OSError, ValueError) as error:
            _usage(f"--{parameter.name} {text}: {error}")
    if parameter.integer:
        try:
            return int(text)
        except ValueError:
            _usage(f"--{parameter.name}: an integer is expected, not {text!r}")
    return text


def _usage(message: str) -> NoReturn:
    print(f"keyferry: {message}", file=sys.stderr)
    raise SystemExit(USAGE)


def _call(arguments: argparse.Namespace) -> dict[str, Any]:
    operation = OPERATIONS[arguments.operation]
    given = {name: getattr(arguments, name) for name in operation.parameters}
    params = {name: _value(operation.parameters[name], text) for name, text in given.items() if text is not None}
    with Client(arguments.socket) as kms:
        return kms.call(operation.name, params)


def _status(arguments: argparse.Namespace) -> dict[str, Any]:
    deadline = time.monotonic() + arguments.wait
    with Client(arguments.socket, timeout=max(arguments.wait, _PROBE)) as kms:
        while True:
            try:
                return kms.call("GetAgentStatus", {})
            except AgentUnavailable:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_WAIT_STEP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own arguments) and give its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        result = _call(arguments) if arguments.command == "call" else _status(arguments)
    except KmsError as error:
        refusal = {"Code": error.code, "Message": error.message, "RequestId": error.request_id}
        print(json.dumps(refusal, indent=2, ensure_ascii=False), file=sys.stderr)
        return REFUSED
    except (AgentUnavailable, ProtocolError) as error:
        print(f"keyferry: {error}", file=sys.stderr)
        return UNREACHABLE
    return show("keyferry", json.dumps(result, indent=2, ensure_ascii=False))
