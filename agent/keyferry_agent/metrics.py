"""Metrics for Prometheus, on a socket or a port of their own: off by default, and a thread apart from requests.

Names of operations, codes and counts; nothing of keys, callers or contexts.
"""

from typing import Any, Final

import structlog

from keyferry.operations import OPERATIONS

from .agent import Agent
from .audit import AuditLog

__all__ = ["MISSING_LIBRARY", "Metrics", "MetricsError"]

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")

_BUCKETS: Final = (0.000_05, 0.000_1, 0.000_2, 0.000_4, 0.000_8, 0.001_6, 0.003_2, 0.006_4, 0.025, 0.1, 1.0)
"""Seconds: an RSA call takes a tenth of a millisecond, an SM2 call one."""


MISSING_LIBRARY: Final = (
    'metrics: the package prometheus-client is missing; install the extra "metrics" of keyferry-agent (docs/installing.md), '
    "or remove [metrics]"
)


class MetricsError(Exception):
    """Metrics cannot be had as the configuration says. The message says why, and what to do."""


class Metrics:
    """What is counted while requests are served, and what is looked at when somebody asks."""

    def __init__(self, agent: Agent, audit: AuditLog) -> None:
        """Raises `MetricsError` where the library is missing."""
        try:
            import prometheus_client as prometheus  # noqa: PLC0415 - an extra
        except ImportError:
            raise MetricsError(MISSING_LIBRARY) from None
        self.handler = prometheus.MetricsHandler
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
        self._notifications = prometheus.Counter(
            "keyferry_notifications", "Notifications received, which have no effect", registry=registry
        )
        self._failed = False
        self._known: dict[tuple[str, str], tuple[Any, Any]] = {}

        def gauge(name: str, text: str, value: Any) -> None:
            prometheus.Gauge(f"keyferry_{name}", text, registry=registry).set_function(value)

        gauge("connections", "Connections open now", lambda: agent.counters.connections)
        gauge("keys", "Master keys in the keyring", lambda: len(agent.keyring.keys))
        gauge("keyring_loaded_timestamp_seconds", "When the keyring was loaded", lambda: agent.keyring.loaded_timestamp)
        gauge("audit_lag_seconds", "How long the last record took, or the one under way has taken", lambda: audit.lag)
        gauge("draining", "1 while the agent is about to stop", lambda: int(agent.draining))

    def notified(self, count: int) -> None:
        """Count notifications."""
        self._notifications.inc(count)

    def observe(self, operation: str, outcome: str, seconds: float) -> None:
        """Count one request. Operations that the protocol does not have are counted together. Never raises."""
        try:
            self._observe(operation, outcome, seconds)
        except Exception as error:
            if not self._failed:  # logged once, not for each request
                log.error("metrics.failed", exc_info=error)
            self._failed = True

    def _observe(self, operation: str, outcome: str, seconds: float) -> None:
        key = operation if operation in OPERATIONS else "unknown", outcome
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._requests.labels(*key), self._seconds.labels(key[0])
        known[0].inc()
        known[1].observe(seconds)
