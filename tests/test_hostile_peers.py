"""Peers that mean harm, beside an honest client that has to be served all the while: slow ones, many, and those that vanish."""

import signal
import socket
from pathlib import Path

import pytest
from support.hostile import PING, besieged

from keyferry import wire


def test_a_request_that_comes_byte_by_byte_has_no_longer_than_any_other(tmp_path: Path) -> None:
    """Each byte in time does not make the whole of it so."""
    endless = b"\xda\xff\x00" + bytes(5_000)
    with besieged(tmp_path, "request_timeout = 0.3") as siege, siege.connect() as dribbling:

        def dribble() -> None:
            for byte in endless:
                dribbling.send(bytes([byte]))
                siege.honest.is_served(1)

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            dribble()
        siege.agent.wait_for("connection.slow_request")


def test_a_flood_of_notifications_lets_others_have_their_turns(tmp_path: Path) -> None:
    """Nobody is answered, so nothing else would make the agent look at others: the record tells who was first."""
    flood = wire.encode_notification("x", {}) * 8_000 + PING
    with besieged(tmp_path) as siege, siege.connect() as loud, siege.connect() as quiet:
        loud.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for _ in range(8):  # which of two that wait has the first turn is left to chance
            siege.agent.signal(signal.SIGSTOP)
            loud.send(flood)
            quiet.send(PING)
            siege.agent.signal(signal.SIGCONT)
            answers = quiet.response(), loud.response()
            ids = [answer.result["RequestId"] for answer in answers if answer and answer.result]
            text = siege.record.read_text()
            assert text.index(ids[0]) < text.index(ids[1])
