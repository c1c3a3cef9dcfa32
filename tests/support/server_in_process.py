"""A server in this process, on a real socket, and clients that send bytes to it."""

import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import trio.testing

from keyferry.protocol import wire
from keyferry_agent.audit import Appended
from keyferry_agent.audit.entry import AuditedRequest
from keyferry_agent.authz.grants import Grant
from keyferry_agent.config.settings import Limits, Settings
from keyferry_agent.keyring.keyring import development_keyring
from keyferry_agent.server.server import Server
from keyferry_agent.state import ServerState

STATUS = "GetAgentStatus"


class Batches:
    """An audit log in memory, which keeps its batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def record(self, requests: Sequence[AuditedRequest]) -> Appended:
        """Note the operations."""
        self.batches.append([request.entry.operation for request in requests])
        return Appended(len(requests))


@asynccontextmanager
async def served(agent: ServerState, path: Path, audit: Any) -> AsyncIterator[Server]:
    """A server of this agent, on a real socket, for the time of a block."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    server = Server(agent, audit)
    async with trio.open_nursery() as nursery:
        listeners = [("default", trio.SocketListener(trio.socket.from_stdlib_socket(listening)))]
        await nursery.start(server.serve, listeners)
        yield server
        server.drain(grace=5)


@asynccontextmanager
async def connected(path: Path, count: int) -> AsyncIterator[list[socket.socket]]:
    """So many connections that the server serves."""
    made = []
    try:
        for _ in range(count):
            made.append(socket.socket(socket.AF_UNIX))
            made[-1].connect(str(path))
            made[-1].setblocking(False)
        await trio.testing.wait_all_tasks_blocked()
        yield made
    finally:
        for each in made:
            each.close()


async def answers(sock: socket.socket, count: int) -> list[int | None]:
    """The message IDs of the next answers."""
    decoder = wire.Decoder()
    msgids: list[int | None] = []
    with trio.fail_after(30):
        while len(msgids) < count:
            await trio.lowlevel.wait_readable(sock)
            received = sock.recv(65_536)
            assert received
            decoder.feed(received)
            msgids += [message.msgid for message in decoder.messages() if isinstance(message, wire.Response)]
    return msgids


def asked(method: str, count: int = 1) -> bytes:
    """Return the bytes of some requests."""
    return b"".join(wire.encode_request(number, method, {"KeyId": "alias/dev"}) for number in range(count))


def granting_all() -> ServerState:
    """An agent's state, in this process, that grants everything to this user."""
    everything = Grant("all", {"uid": os.geteuid()}, ("kms:*",), ("*",))
    settings = Settings(memory="prefer", grants=(everything,), limits=Limits(request_timeout=0.2))
    return ServerState(settings, development_keyring(backing="auto", require=False))
