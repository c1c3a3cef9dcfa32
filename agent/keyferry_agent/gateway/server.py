"""The server of all gateways: accepts connections, limits them, drains them, and renews certificates."""

import errno
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import structlog
import trio

from ..audit import AuditLog
from ..config.gateways import CertificateError, Gateway, certificate_context
from ..peer import Peer, Process, evidence
from ..server.connection import LINGER
from ..server.dispatch import Dispatcher
from ..server.server import DRAIN_READ_SECONDS, GRACE, Server
from .client import Client
from .connection import HeldBytes, HttpConnection, HttpStream
from .endpoint import Endpoint
from .nonces import Nonces
from .sampling import Sample
from .sockets import GatewaySocket

__all__ = ["GatewayServer"]

_ACCEPT_RETRY_SECONDS: Final = 0.1
_PEER_IS_GONE: Final = (errno.ENOTCONN, errno.EINVAL, errno.ESRCH)
_SAMPLE_SECONDS: Final = 1.0
"""Seconds between two audit entries that count the omitted ones."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class GatewayServer:
    """Serves the gateways of an agent until `drain` is called. `contexts`: the TLS contexts of gateways by name."""

    def __init__(
        self,
        server: Server,
        audit: AuditLog,
        sockets: Sequence[GatewaySocket],
        contexts: dict[str, ssl.SSLContext | None],
    ) -> None:
        self._agent = agent = server.agent
        self._audit = audit
        self._inspector = server.inspector
        self._sockets = sockets
        self._contexts = contexts
        limits = agent.settings.limits
        dispatcher = Dispatcher(server.context)
        nonces = Nonces(time.time(), limits.gateway_clock_skew, limits.gateway_nonces)
        self._samples = {entry.gateway.name: Sample() for entry in sockets}
        self._endpoints = {
            entry.gateway.name: Endpoint(
                agent, dispatcher, server.pool, nonces, self._samples[entry.gateway.name], entry.gateway.hosts
            )
            for entry in sockets
        }
        self._held = HeldBytes()
        self._clients: set[Client] = set()
        self._idle: set[trio.CancelScope] = set()
        self._accepting = trio.CancelScope()
        self._all = trio.CancelScope()
        self._renewal_wanted = trio.Event()
        agent.on_adopt.append(self._want_renewal)

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept and serve connections until `drain`. Returns after the last answer, or when the grace period is over."""
        with self._all:
            async with trio.open_nursery() as background:
                background.start_soon(self._renew_certificates)
                background.start_soon(self._count_omitted)
                async with trio.open_nursery() as connections:
                    with self._accepting:
                        async with trio.open_nursery() as accepting:
                            for entry in self._sockets:
                                accepting.start_soon(self._accept, entry, connections)
                            task_status.started()
                background.cancel_scope.cancel()
        self._settle_samples()

    def drain(self, grace: float = GRACE) -> None:
        """Stop accepting, answer all received requests, and close the connections, at the latest after `grace` seconds."""
        now = trio.current_time()
        for scope in self._idle:
            scope.deadline = min(scope.deadline, now + DRAIN_READ_SECONDS)
        self._all.deadline = min(self._all.deadline, now + grace)
        self._accepting.cancel()

    async def _accept(self, entry: GatewaySocket, connections: trio.Nursery) -> None:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(entry.socket))
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:  # out of descriptors or memory: log the error, and retry after a pause
                    log.error("accept.failed", listener=entry.gateway.name, error=error.strerror)
                    await trio.sleep(_ACCEPT_RETRY_SECONDS)
                    continue
                self._agent.counters.connections_total += 1
                if self._has_room():
                    self._admit(entry.gateway, stream, connections)
                else:
                    self._agent.counters.connections_refused += 1
                    stream.socket.close()

    def _has_room(self) -> bool:
        """Return whether there is room for a client that has proved nothing yet: half of all connections at most."""
        limit = self._agent.settings.limits.gateway_connections
        unproven = sum(not client.proven for client in self._clients)
        return len(self._clients) < limit and unproven < limit // 2

    def _admit(self, gateway: Gateway, stream: trio.SocketStream, connections: trio.Nursery) -> None:
        try:
            peer, process = _evidence(gateway, stream)
            remote = "" if gateway.is_unix else _remote(stream)
        except OSError as error:
            if error.errno not in _PEER_IS_GONE:
                log.error("accept.failed", listener=gateway.name, error=error.strerror or str(error))
            stream.socket.close()
            return
        is_tls = gateway.certificate is not None
        client = Client(self._agent, self._inspector, peer, process, remote=remote, tls=is_tls)
        self._clients.add(client)
        self._agent.counters.gateway_connections = len(self._clients)
        connections.start_soon(self._connection, gateway, stream, client)

    async def _connection(self, gateway: Gateway, stream: trio.SocketStream, client: Client) -> None:
        """Serve one connection from its first byte to its last. Its errors do not affect other connections."""
        try:
            await self._serve(gateway, stream, client)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer has closed the connection, or does not speak TLS
        except* Exception as errors:
            log.error("connection.failed", listener=gateway.name, exc_info=errors)
        finally:
            stream.socket.close()
            self._clients.discard(client)
            self._agent.counters.gateway_connections = len(self._clients)
            if client.process is not None:
                client.process.close()

    async def _serve(self, gateway: Gateway, stream: trio.SocketStream, client: Client) -> None:
        http_stream: HttpStream = stream
        if (context := self._contexts[gateway.name]) is not None:
            http_stream = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
            with trio.move_on_after(self._agent.settings.limits.request_timeout) as scope:
                await http_stream.do_handshake()
            if scope.cancelled_caught:
                return
        connection = HttpConnection(
            self._agent, self._endpoints[gateway.name], http_stream, client, self._held, self._idle
        )
        async with trio.open_nursery() as nursery:
            if client.process is not None:
                nursery.start_soon(_until_process_ends, client.process, nursery.cancel_scope)
            await connection.run()
            nursery.cancel_scope.cancel()
        with trio.move_on_after(LINGER, shield=True), suppress(trio.BrokenResourceError):
            await http_stream.aclose()

    def _want_renewal(self) -> None:
        self._renewal_wanted.set()

    async def _renew_certificates(self) -> None:
        """Read certificates again after each reload. New connections then have the new ones."""
        while True:
            await self._renewal_wanted.wait()
            self._renewal_wanted = trio.Event()
            for entry in self._sockets:
                if entry.gateway.certificate is None:
                    continue
                try:
                    self._contexts[entry.gateway.name] = await trio.to_thread.run_sync(
                        certificate_context, entry.gateway, abandon_on_cancel=True
                    )
                except (CertificateError, RuntimeError) as error:  # RuntimeError: no thread can be started
                    log.error("gateway.certificate_failed", gateway=entry.gateway.name, why=str(error))

    async def _count_omitted(self) -> None:
        while True:
            await trio.sleep(_SAMPLE_SECONDS)
            self._settle_samples()

    def _settle_samples(self) -> None:
        for name, sample in self._samples.items():
            if omitted := sample.settle():
                self._audit.unauthenticated(name, omitted)


async def _until_process_ends(process: Process, scope: trio.CancelScope) -> None:
    # The socket may now belong to another process, such as a child, whose credentials were never checked.
    await trio.lowlevel.wait_readable(process.fd)
    scope.cancel()


def _evidence(gateway: Gateway, stream: trio.SocketStream) -> tuple[Peer, Process | None]:
    """Return the kernel's evidence about a client on a Unix socket; none about one on TCP. Raises OSError."""
    if gateway.is_unix:
        return evidence(stream.socket, gateway.name)
    return Peer(uid=None, gids=frozenset(), pid=None, listener=gateway.name), None


def _remote(stream: trio.SocketStream) -> str:
    address, port, *_ = stream.socket.getpeername()
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
