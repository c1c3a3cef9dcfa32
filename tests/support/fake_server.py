"""A peer that plays a script instead of being an agent."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from keyferry import Client
from keyferry.protocol import wire

from .agent import PATIENCE

Part: TypeAlias = Callable[[socket.socket], None]


@contextmanager
def scripted(path: Path, *script: Part) -> Iterator[None]:
    """Listen, and play one part of the script for each connection, once its first bytes have come.

    Raises AssertionError at the end of the block where the client did not make as many connections.
    """
    played = 0
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def play() -> None:
            nonlocal played
            for part in script:
                try:
                    connection, _ = listening.accept()
                except OSError:  # the block is over
                    return
                with connection:
                    connection.settimeout(PATIENCE)
                    part(connection)
                played += 1

        thread = threading.Thread(target=play)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)  # `accept` takes what is in the queue, and then fails
            thread.join(PATIENCE)
        assert not thread.is_alive(), f"the peer did not finish part {played} of its script in {PATIENCE} s"
        assert played == len(script), f"the client made {played} connections of {len(script)}"


@contextmanager
def client_of(path: Path, *script: Part) -> Iterator[Client]:
    """A client of such a peer."""
    with scripted(path, *script), Client(path, timeout=5) as client:
        yield client


def says(data: bytes) -> Part:
    """A part that answers the first bytes with some bytes, and hangs up."""

    def part(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(data)

    return part


def answers(count: int) -> Part:
    """A part that answers `count` requests each with its method's name as RequestId, the last one first, and hangs up."""

    def part(connection: socket.socket) -> None:
        decoder, requests = wire.Decoder(), list[wire.Request]()
        while len(requests) < count:
            decoder.feed(connection.recv(65_536))
            requests += [message for message in decoder.messages() if isinstance(message, wire.Request)]
        for request in reversed(requests[:count]):
            connection.sendall(wire.encode_response(request.msgid, None, {"RequestId": request.method}))

    return part


def outcomes(*codes: str) -> Part:
    """A part that answers one request after another: with an error of this code, or a result where that is empty."""

    def part(connection: socket.socket) -> None:
        decoder, remaining = wire.Decoder(), list(codes)
        while remaining:
            data = connection.recv(65_536)
            if not data:
                return
            decoder.feed(data)
            for message in decoder.messages():
                assert isinstance(message, wire.Request)
                code = remaining.pop(0)
                error = {"Code": code, "Message": "m", "RequestId": "r"} if code else None
                result = None if code else {"RequestId": message.method}
                connection.sendall(wire.encode_response(message.msgid, error, result))

    return part
