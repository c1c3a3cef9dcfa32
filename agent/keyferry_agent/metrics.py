"""Metrics for Prometheus, on a socket or a loopback port of their own: off by default, and a thread apart from requests.

Names of operations, codes and counts; nothing of keys, callers or contexts.
"""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final

from keyferry.operations import OPERATIONS

from . import listening
from .agent import Agent
from .audit import AuditLog
from .settings import Listener, Settings

__all__ = ["Metrics", "MetricsError", "of"]

_BUCKETS: Final = (0.000_05, 0.000_1, 0.000_2, 0.000_4, 0.000_8, 0.001_6, 0.003_2, 0.006_4, 0.025, 0.1, 1.0)
"""Seconds: an RSA call takes a tenth of a millisecond, an SM2 call one."""
_SCRAPE: Final = 5.0
"""Seconds that one scrape may take: the next one waits for it."""


class MetricsError(Exception):
    """Metrics cannot be had as the configuration says. The message says why, and what to do."""


class Metrics:
    """What is counted while requests are served, and what is looked at when somebody asks."""

    def __init__(self, agent: Agent, audit: AuditLog) -> None:
        """Raises `MetricsError` where the library is missing."""
        try:
            import prometheus_client as prometheus  # noqa: PLC0415 - an extra
        except ImportError:
            raise MetricsError(
                "metrics need the package prometheus-client: pip install 'keyferry-agent[metrics]', or leave [metrics] out"
            ) from None
        self._handler = prometheus.MetricsHandler
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self._requests = prometheus.Counter(
            "keyferry_requests", "Requests answered", ["operation", "outcome"], registry=registry
        )
        self._seconds = prometheus.Histogram(
            "keyferry_request_seconds",
            "Seconds from a request's decision to its record",
            ["operation"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._known: dict[tuple[str, str], tuple[Any, Any]] = {}

        def gauge(name: str, text: str, value: Any) -> None:
            prometheus.Gauge(f"keyferry_{name}", text, registry=registry).set_function(value)

        gauge("connections", "Connections open now", lambda: agent.counters.connections)
        gauge("keys", "Master keys in the keyring", lambda: len(agent.keyring.keys))
        gauge("keyring_loaded_timestamp_seconds", "When the keyring was loaded", lambda: agent.keyring.loaded_timestamp)
        gauge("audit_lag_seconds", "How long the last record took, or the one under way has taken", lambda: audit.lag)
        gauge("draining", "1 while the agent is about to stop", lambda: int(agent.draining))

    def observe(self, operation: str, outcome: str, seconds: float) -> None:
        """Count one request. What a client calls an operation may be anything; it is counted as one."""
        key = operation if operation in OPERATIONS else "unknown", outcome
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._requests.labels(*key), self._seconds.labels(key[0])
        known[0].inc()
        known[1].observe(seconds)

    def serve(self, address: str) -> "_Served":
        """Answer scrapes at a socket's path, or at ADDRESS:PORT. Raises `MetricsError`."""
        handler = type("Handler", (self._handler.factory(self.registry),), {"timeout": _SCRAPE})
        if address.startswith("/"):
            try:
                (made,) = listening.open_all([Listener("metrics", Path(address))], [])
            except listening.ListeningError as error:
                raise MetricsError(f"metrics: {error}") from None
            return _Served(_UnixServer(made, handler), made)
        host, _, port = address.rpartition(":")
        try:
            return _Served(HTTPServer((host.strip("[]"), int(port)), handler), None)
        except OSError as error:
            raise MetricsError(f"metrics: {address}: {error.strerror}") from None


class _UnixServer(HTTPServer):
    def __init__(self, made: listening.Listening, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("", 0), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = made.socket

    def get_request(self) -> tuple[Any, Any]:
        connection, _ = self.socket.accept()
        return connection, ("", 0)


class _Served:
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


def of(agent: Agent, audit: AuditLog, settings: Settings) -> tuple[Metrics, _Served] | None:
    """The metrics that the configuration asks for, being served; None where it does not. Raises `MetricsError`."""
    if not settings.metrics:
        return None
    metrics = Metrics(agent, audit)
    return metrics, metrics.serve(settings.metrics)
