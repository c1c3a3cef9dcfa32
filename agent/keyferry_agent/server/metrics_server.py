"""Answers scrapes of metrics over HTTP, on a Unix socket or a port. Runs a few scrapes at a time, each in a thread.

Every local user can connect to a loopback port. So a whole scrape has one deadline, the number of scrapes is bounded, and the
threads are daemons. Neither another scrape nor the agent's exit waits for a slow client.
"""

import errno
import io
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

import structlog

from ..audit import AuditLog
from ..config.settings import Listener
from ..state import ServerState
from ..telemetry.metrics import Metrics, MetricsError
from . import unix_sockets

__all__ = ["Server", "of"]

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")

SCRAPE_SECONDS: Final = 5.0
"""Deadline of one scrape, from accept(2) to the last byte of the answer."""
MAX_SCRAPES: Final = 8
"""Scrapes at a time. To admit one more, the server ends the oldest."""
MAX_REQUEST: Final = 131_072
"""Bytes of one request. http.server limits a line to 64 KiB, but would read 100 such lines."""
BACKLOG: Final = 16
RETRY_SECONDS: Final = 0.1
"""Pause after accept(2) has failed, as it does without a free descriptor."""


class _Stream(io.RawIOBase):
    """A connection's bytes in both directions, until a deadline. Raises TimeoutError after it, OSError for a long request."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline
        self._left = MAX_REQUEST

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._limit()
        count = self._connection.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise OSError("the request is too long")
        return count

    def write(self, data: Any) -> int:
        self._limit()
        self._connection.sendall(data)  # the socket's timeout covers the whole write
        return len(data)

    def _limit(self) -> None:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._connection.settimeout(remaining)


def _handler(metrics: Metrics) -> Callable[[socket.socket, float], object]:
    """Return a callable that answers one request on a connection before a deadline."""
    base: type[BaseHTTPRequestHandler] = metrics.handler.factory(metrics.registry)

    class Handler(base):  # type: ignore[misc, valid-type]
        def __init__(self, connection: socket.socket, deadline: float) -> None:
            self._deadline = deadline
            super().__init__(connection, ("", 0), None)

        def setup(self) -> None:
            stream = _Stream(self.request, self._deadline)
            self.connection = self.request
            self.rfile = io.BufferedReader(stream)
            self.wfile = stream

        def do_GET(self) -> None:  # noqa: N802 - http.server's name
            try:
                super().do_GET()
            except OSError:
                raise
            except Exception as error:
                log.error("metrics.failed", exc_info=error)
                self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)

    return Handler


class Server:
    """Accepts scrapes in a thread, and answers each in its own, until the server is closed."""

    def __init__(
        self,
        listener: socket.socket,
        listening_socket: unix_sockets.ListeningSocket | None,
        answer: Callable[[socket.socket, float], object],
    ) -> None:
        self._listener = listener
        self._made = listening_socket
        self._answer = answer
        self._scrapes: dict[socket.socket, None] = {}  # the oldest first
        self._changing = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, name="keyferry-metrics", daemon=True).start()

    def close(self) -> None:
        """Accept no more scrapes. Does not wait for those that are being answered."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(2)
        self._listener.close()
        if self._made is not None:
            self._made.remove()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # no descriptor, or the server is closed
                if not self._closed:
                    time.sleep(RETRY_SECONDS)
                continue
            self._make_room(connection)
            try:
                threading.Thread(target=self._scrape, args=(connection,), name="keyferry-scrape", daemon=True).start()
            except RuntimeError:  # the host, or the pod, has no thread left
                self._end(connection)

    def _make_room(self, connection: socket.socket) -> None:
        """Add a connection, and end the oldest if there are too many. A scrape takes milliseconds unless its client is slow."""
        with self._changing:
            self._scrapes[connection] = None
            oldest_scrape = next(iter(self._scrapes)) if len(self._scrapes) > MAX_SCRAPES else None
            if oldest_scrape is not None:
                del self._scrapes[oldest_scrape]
                with suppress(OSError):
                    oldest_scrape.shutdown(socket.SHUT_RDWR)  # its thread closes it

    def _end(self, connection: socket.socket) -> None:
        with self._changing:
            self._scrapes.pop(connection, None)
        connection.close()

    def _scrape(self, connection: socket.socket) -> None:
        try:
            self._answer(connection, time.monotonic() + SCRAPE_SECONDS)
        except OSError:
            pass  # the client was slow, or closed the connection
        except Exception as error:
            log.error("metrics.failed", exc_info=error)
        finally:
            self._end(connection)


def _serve(metrics: Metrics, address: str) -> Server:
    """Answer scrapes at a socket's path, or at ADDRESS:PORT. Raises `MetricsError`, `ListeningError` or OSError."""
    answer = _handler(metrics)
    if address.startswith("/"):
        (listening_socket,) = unix_sockets.open_listeners([Listener("metrics", Path(address))], [])
        return Server(listening_socket.socket, listening_socket, answer)
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return Server(socket.create_server((host.strip("[]"), int(port)), family=family, backlog=BACKLOG), None, answer)


def _reason(error: OSError) -> str:
    """Return the reason why the agent cannot listen on a port, and a remedy."""
    if error.errno == errno.EAFNOSUPPORT:
        return (
            f"{error.strerror}: the service allows no network sockets; install the drop-in "
            "systemd/examples/metrics-tcp.conf, or set listen to the path of a socket"
        )
    return error.strerror or str(error)


def of(agent: ServerState, audit: AuditLog, address: str) -> tuple[Metrics, Server]:
    """Return the metrics of an agent, and the server that answers scrapes of them at an address. Raises `MetricsError`."""
    metrics = Metrics(agent, audit)
    try:
        return metrics, _serve(metrics, address)
    except unix_sockets.ListeningError as error:
        raise MetricsError(f"metrics: listen: {error}") from None
    except OSError as error:
        raise MetricsError(f'metrics: listen = "{address}": {_reason(error)}') from None
