"""`keyferry call`, for a single operation, and `keyferry status`, for the agent's health."""

import argparse
import time
from collections.abc import Mapping
from typing import Any, Final

from ..arguments import seconds
from ..client import Client
from ..errors import AgentUnavailable, KmsError
from ..operations import OPERATIONS
from ..stdout import DONE
from .common import REFUSED, add_parameters, read_parameters, show_json, socket_option

__all__ = ["add_parsers"]

_RETRY_SECONDS: Final = 0.1
"""Seconds between two attempts of `status --wait`."""

_PROBE_TIMEOUT_SECONDS: Final = 5.0
"""Seconds within which a running agent must answer `status`; a longer --wait extends them."""


def add_parsers(commands: Any) -> None:
    """Add `call`, with every operation, and `status`."""
    socket = socket_option()
    call = commands.add_parser(
        "call", help="one operation, by the API's own names", description="Call one operation.", allow_abbrev=False
    )
    operations = call.add_subparsers(dest="operation", required=True, metavar="OPERATION")
    for operation in OPERATIONS.values():
        parser = operations.add_parser(
            operation.name, help=operation.doc, description=operation.doc, parents=[socket], allow_abbrev=False
        )
        add_parameters(parser, operation)
        parser.set_defaults(run=_call)
    status = commands.add_parser(
        "status",
        help="the agent's health, as JSON",
        description="Ask the agent for its health. For probes.",
        parents=[socket],
        allow_abbrev=False,
    )
    status.add_argument(
        "--wait",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="how long to wait for an agent that does not answer yet; with --ready, also for one that is not ready",
    )
    probe = status.add_mutually_exclusive_group()
    probe.add_argument(
        "--live",
        action="store_true",
        help="fail only where the agent does not answer, so that a restart may help; no audit entry",
    )
    probe.add_argument(
        "--ready", action="store_true", help="fail (exit code 1) also while the agent refuses calls; no audit entry"
    )
    status.set_defaults(run=_status)


def _call(arguments: argparse.Namespace) -> int:
    operation = OPERATIONS[arguments.operation]
    params = read_parameters(arguments, operation)
    with Client(arguments.socket) as kms:
        return show_json(kms.call(operation.name, params))


def _status(arguments: argparse.Namespace) -> int:
    deadline = time.monotonic() + arguments.wait
    with Client(arguments.socket, timeout=max(arguments.wait, _PROBE_TIMEOUT_SECONDS)) as kms:
        while True:
            try:
                answer = _answer(kms, arguments)
                if not arguments.ready or answer["Ready"] or time.monotonic() >= deadline:
                    return show_json(answer) or (REFUSED if arguments.ready and not answer["Ready"] else DONE)
            except AgentUnavailable:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_RETRY_SECONDS)


def _answer(kms: Client, arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Return the agent's status, or its health for a probe. For `--live`, a refusal also counts as an answer."""
    if not arguments.live and not arguments.ready:
        return kms.call("GetAgentStatus", {})
    try:
        return kms.call("GetAgentHealth", {})
    except KmsError as error:
        if not arguments.live:
            raise
        return {"Code": error.code, "Message": error.message, "RequestId": error.request_id}
