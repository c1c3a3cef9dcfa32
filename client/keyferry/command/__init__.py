"""The `keyferry` command: its argument parser and exit codes. Each group of commands has a file of its own.

    operations.py  call, status
    records.py     records add, list, show, recover, renew, rewrap, copy, schema
    files.py       encrypt-file, decrypt-file, reencrypt-file
    modules.py     module init, show

Packages other than the standard library and msgpack are imported only when a command that needs them runs.
"""

import argparse
from collections.abc import Sequence

from .. import __version__, guard
from ..errors import AgentUnavailable, KeyferryError, KmsError, ProtocolError
from ..stdout import complain, complain_json
from . import files, modules, operations, records
from .common import PROGRAM, REFUSED, UNREACHABLE

__all__ = ["main"]

_EPILOG = """exit codes: 0 done; 1 the agent refused (its error is on stderr, as JSON), or the command failed
(the reason is on stderr); 2 usage; 3 the agent cannot be reached; 74 standard output could not be written"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keyferry",
        description="Ask the key agent of this host.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"keyferry {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (operations, records, files, modules):
        group.add_parsers(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own arguments) and return its exit code."""
    return guard.guarded(PROGRAM, lambda: _run(guard.parse(PROGRAM, _parser(), argv)))


def _run(arguments: argparse.Namespace) -> int:
    try:
        code: int = arguments.run(arguments)
    except KmsError as error:
        complain_json({"Code": error.code, "Message": error.message, "RequestId": error.request_id})
        return REFUSED
    except KeyferryError as error:
        complain(PROGRAM, str(error))
        return UNREACHABLE if isinstance(error, (AgentUnavailable, ProtocolError)) else REFUSED
    return code
