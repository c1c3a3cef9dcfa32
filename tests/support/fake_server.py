"""A server that runs a script in place of an agent."""

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
def scripted_server(path: Path, *script: Part) -> Iterator[None]:
    """Listen, and run one part of the script for each connection after its first bytes.

    Raises AssertionError at the end of the block if the client made fewer connections.
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
            listening.shutdown(socket.SHUT_RDWR)  # `accept` returns queued connections, and then fails
            thread.join(PATIENCE)
        assert not thread.is_alive(), f"the peer did not finish part {played} of its script in {PATIENCE} s"
        assert played == len(script), f"the client made {played} connections of {len(script)}"


@contextmanager
def client_of(path: Path, *script: Part) -> Iterator[Client]:
    """Yield a client of a scripted server."""
    with scripted_server(path, *script), Client(path, timeout=5) as client:
        yield client


def send_bytes(data: bytes) -> Part:
    """Return a part that answers the first bytes with `data`, and closes the connection."""

    def part(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(data)

    return part


def respond_in_reverse(count: int) -> Part:
    """Return a part that answers `count` requests, the last one first, with the method as RequestId, and closes."""

    def part(connection: socket.socket) -> None:
        decoder, requests = wire.Decoder(), list[wire.Request]()
        while len(requests) < count:
            decoder.feed(connection.recv(65_536))
            requests += [message for message in decoder.messages() if isinstance(message, wire.Request)]
        for request in reversed(requests[:count]):
            connection.sendall(wire.encode_response(request.msgid, None, {"RequestId": request.method}))

    return part


def respond_with(*codes: str) -> Part:
    """Return a part that answers requests in order: with an error of each code, or a result for an empty code."""

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
