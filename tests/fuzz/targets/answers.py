"""A client's answers: from an agent, or from another program on its socket."""

from typing import Any

from keyferry.errors import KmsError, ProtocolError
from keyferry.operations import OPERATIONS
from keyferry.protocol.rpc import Call, PendingCall, PendingResponse, RpcSession

from ..memory_bound import assert_memory_bounded

CALLS = [Call(operation.name, {}, operation.result) for operation in OPERATIONS.values()]


def answers(data: bytes) -> None:
    """To one request of each operation, whose msgids are 1, 2, and so on: results, errors, or the end of the connection."""
    assert_memory_bounded(lambda: _received(data), len(data), times=256)


def _received(data: bytes) -> None:
    exchange = RpcSession()
    calls: dict[PendingResponse, PendingCall] = {}
    for call in CALLS:
        exchange.encode(asked := PendingCall.of(call))
        calls[asked.pending] = asked
    try:
        answered = exchange.receive(data)
    except (ProtocolError, KmsError) as error:
        assert str(error)
        return
    for pending in answered:
        _taken(calls[pending], pending.response)


def _taken(asked: PendingCall, response: Any) -> None:
    call = asked.call
    try:
        outcome = asked.outcome()
    except ProtocolError as error:
        assert str(error)
        return
    if isinstance(outcome, KmsError):
        assert outcome.code == response.error["Code"]
        return
    assert call.result is not None
    assert isinstance(outcome, call.result)
    assert isinstance(repr(outcome), str)
