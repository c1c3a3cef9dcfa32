"""What a client is answered: by an agent, or by something else that listens on its socket."""

from typing import Any

from keyferry.errors import KmsError, ProtocolError
from keyferry.exchange import Call, Exchange
from keyferry.operations import OPERATIONS

from ..frugal import frugal

CALLS = [Call(operation.name, {}, operation.result) for operation in OPERATIONS.values()]


def answers(data: bytes) -> None:
    """To one request of each operation, whose msgids are 1, 2, and so on: results, errors, or the end of the connection."""
    frugal(lambda: _received(data), len(data), times=256)


def _received(data: bytes) -> None:
    exchange = Exchange()
    asked = {pending.msgid: call for pending, call in ((exchange.ask(call)[0], call) for call in CALLS)}
    try:
        answered = exchange.receive(data)
    except (ProtocolError, KmsError) as error:
        assert str(error)
        return
    for pending in answered:
        assert pending.response is not None
        _taken(asked[pending.msgid], pending.response)


def _taken(call: Call, response: Any) -> None:
    try:
        outcome = call.outcome(response)
    except ProtocolError as error:
        assert str(error)
        return
    if isinstance(outcome, KmsError):
        assert outcome.code == response.error["Code"]
        return
    assert call.result is not None
    assert isinstance(outcome, call.result)
    assert isinstance(repr(outcome), str)
