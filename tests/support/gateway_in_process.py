"""A gateway's server in this process, on real sockets, and clients that send it bytes. Made for trio's mock clock."""

import os
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlencode

import trio

from keyferry.secret import SecretMemory
from keyferry_agent.audit import Appended
from keyferry_agent.audit.entry import AuditedRequest
from keyferry_agent.authz.grants import Grant
from keyferry_agent.config.gateways import Gateway, certificate_context
from keyferry_agent.config.settings import Limits, Settings
from keyferry_agent.gateway.server import GatewayServer
from keyferry_agent.gateway.sockets import open_gateways
from keyferry_agent.keyring.description import (
    AccessKeyDescription,
    KeyDescription,
    KeyringDescription,
    VersionDescription,
)
from keyferry_agent.keyring.document import new_id, now
from keyferry_agent.keyring.keyring import Keyring, build_keyring, required_bytes
from keyferry_agent.server.server import Server
from keyferry_agent.state import ServerState

from .gateway import Credentials, v1_parameters

CREDENTIALS: Final = Credentials("LTAIofTheTests", "a-secret-of-24-characters")
MINUTE: Final = 60


class EntriesInMemory:
    """An audit log in memory: its requests, and its counts of requests without an entry."""

    def __init__(self) -> None:
        self.requests: list[AuditedRequest] = []
        self.omitted: list[tuple[str, int]] = []

    def record(self, requests: Sequence[AuditedRequest]) -> Appended:
        """Keep the requests."""
        self.requests += requests
        return Appended(len(requests))

    def unauthenticated(self, listener: str, count: int) -> None:
        """Keep a count."""
        self.omitted.append((listener, count))


def keyring_with_access_key(*, enabled: bool = True, secret: str = CREDENTIALS.secret) -> Keyring:
    """Return a keyring with the key alias/a, and with the access key `CREDENTIALS`."""
    version = VersionDescription(new_id(), now())
    key = KeyDescription(new_id(), "Aliyun_AES_256", now(), version.version_id, (version,), ("alias/a",))
    access_key = AccessKeyDescription(CREDENTIALS.access_key_id, now(), enabled, "", len(secret), 0)
    content = KeyringDescription((key,), (access_key,))
    pieces = iter([os.urandom(32), f"{secret}&".encode()])

    def fill(view: memoryview) -> None:
        view[:] = next(pieces)

    return build_keyring(content, fill, SecretMemory(required_bytes(content), backing="auto", require=False))


def new_state(**limits: Any) -> ServerState:
    """Return the state of an agent that grants everything to the access key. `limits`: values of [limits]."""
    grant = Grant("all", {"access_key": CREDENTIALS.access_key_id}, ("kms:*",), ("*",))
    settings = Settings(memory="prefer", grants=(grant,), limits=Limits(**limits))
    return ServerState(settings, keyring_with_access_key())


@dataclass
class Served:
    """A server, and the address of its only gateway."""

    server: GatewayServer
    gateway: Gateway
    audit: EntriesInMemory

    async def connect(self, tls: ssl.SSLContext | None = None) -> "HttpClient":
        """Return a connected client, which closes its connection at the end of the block."""
        if self.gateway.is_unix:
            return HttpClient(await trio.open_unix_socket(self.gateway.listen))
        stream = await trio.open_tcp_stream(*self.gateway.address)
        if tls is None:
            return HttpClient(stream)
        return HttpClient(trio.SSLStream(stream, tls, server_hostname="127.0.0.1", https_compatible=True))


class HttpClient:
    """A connection to a gateway, for bytes that an HTTP library would not send."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._received = b""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + MINUTE):
            await trio.aclose_forcefully(self.stream)

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        await self.stream.send_all(data)

    async def answer(self) -> tuple[int, bytes, bytes]:
        """Return the status, the head and the body of the next answer."""
        while b"\r\n\r\n" not in self._received:
            await self._receive()
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        sizes = [int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        size = sizes[0] if sizes else 0
        while len(self._received) < size:
            await self._receive()
        body, self._received = self._received[:size], self._received[size:]
        return int(head.split(b" ", 2)[1]), head, body

    async def is_closed(self) -> bool:
        """Wait until the server closes the connection. Return False if it sends something before."""
        try:
            return not self._received and not await self.stream.receive_some(1)
        except trio.BrokenResourceError:
            return True

    async def call(self, action: str = "ListKeys", credentials: Credentials = CREDENTIALS, **parameters: str) -> int:
        """Send a signed request, and return the status of its answer."""
        await self.send(request_of(action, credentials, **parameters))
        return (await self.answer())[0]

    async def _receive(self) -> None:
        data = await self.stream.receive_some(65_536)
        assert data, f"the server closed the connection after {self._received!r}"
        self._received += data


def request_of(action: str = "ListKeys", credentials: Credentials = CREDENTIALS, **parameters: str) -> bytes:
    """Return the bytes of a signed request."""
    query = urlencode(v1_parameters(credentials, action, parameters))
    return f"GET /?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def free_address() -> str:
    """Return an address of this host that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"127.0.0.1:{sock.getsockname()[1]}"


@asynccontextmanager
async def gateway_served(
    agent: ServerState, *, tls: Path | None = None, listen: str = "", hosts: tuple[str, ...] = ()
) -> AsyncIterator[Served]:
    """A server with one gateway, for the time of a block. `tls`: the folder of a certificate."""
    gateway = Gateway("gateway", listen or free_address(), hosts=hosts)
    if tls is not None:
        gateway = replace(gateway, certificate=tls / "tls.pem", private_key=tls / "tls.key")
    audit: Any = EntriesInMemory()
    (opened,) = open_gateways([gateway], {})
    server = GatewayServer(Server(agent, audit), audit, [opened], {gateway.name: certificate_context(gateway)})
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            yield Served(server, gateway, audit)
            server.drain(grace=1)
    finally:
        opened.close()
