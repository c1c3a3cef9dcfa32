"""What a client is answered: by an agent, or by something else that listens on its socket."""

from typing import Any

from keyferry.errors import KmsError, ProtocolError
from keyferry.exchange import Call, Exchange, Pending
from keyferry.operations import OPERATIONS

from ..frugal import frugal

CALLS = [Call(operation.name, {}, operation.result) for operation in OPERATIONS.values()]


def answers(data: bytes) -> None:
    """To one request of each operation, whose msgids are 1, 2, and so on: results, errors, or the end of the connection."""
    frugal(lambda: _received(data), len(data), times=256)


def _received(data: bytes) -> None:
    exchange = Exchange()
    for call in CALLS:
        exchange.ask(Pending(call))
    try:
        answered = exchange.receive(data)
    except (ProtocolError, KmsError) as error:
        assert str(error)
        return
    for pending in answered:
        _taken(pending, pending.response)


def _taken(pending: Pending, response: Any) -> None:
    call = pending.call
    try:
        outcome = pending.outcome()
    except ProtocolError as error:
        assert str(error)
        return
    if isinstance(outcome, KmsError):
        assert outcome.code == response.error["Code"]
        return
    assert call.result is not None
    assert isinstance(outcome, call.result)
    assert isinstance(repr(outcome), str)
