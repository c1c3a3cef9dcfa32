"""Answers scrapes of metrics: an HTTP server in a thread, on a socket or a loopback port."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final

from . import listening
from .agent import Agent
from .audit import AuditLog
from .metrics import Metrics, MetricsError
from .settings import Listener

__all__ = ["Served", "of"]

_SCRAPE: Final = 5.0
"""Seconds that one scrape may take: the next one waits for it."""


def _serve(metrics: Metrics, address: str) -> "Served":
    """Answer scrapes at a socket's path, or at ADDRESS:PORT. Raises `MetricsError`."""
    handler = type("Handler", (metrics.handler.factory(metrics.registry),), {"timeout": _SCRAPE})
    if address.startswith("/"):
        try:
            (made,) = listening.open_all([Listener("metrics", Path(address))], [])
        except listening.ListeningError as error:
            raise MetricsError(f"metrics: {error}") from None
        return Served(_UnixServer(made, handler), made)
    host, _, port = address.rpartition(":")
    kind = _Ipv6Server if ":" in host else HTTPServer
    try:
        return Served(kind((host.strip("[]"), int(port)), handler), None)
    except OSError as error:
        raise MetricsError(f"metrics: {address}: {error.strerror}") from None


class _Ipv6Server(HTTPServer):
    address_family = socket.AF_INET6


class _UnixServer(HTTPServer):
    def __init__(self, made: listening.Listening, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("", 0), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = made.socket

    def get_request(self) -> tuple[Any, Any]:
        connection, _ = self.socket.accept()
        return connection, ("", 0)


class Served:
    """An HTTP server in a thread, until it is closed."""

    def __init__(self, server: HTTPServer, made: listening.Listening | None) -> None:
        self._server = server
        self._made = made
        self._thread = threading.Thread(target=server.serve_forever, name="keyferry-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more scrapes."""
        self._server.shutdown()
        self._server.server_close()
        if self._made is not None:
            self._made.remove()


def of(agent: Agent, audit: AuditLog, address: str) -> tuple[Metrics, Served]:
    """The metrics of an agent, being served at an address. Raises `MetricsError`."""
    metrics = Metrics(agent, audit)
    return metrics, _serve(metrics, address)
