"""Metrics for Prometheus, off by default. A separate thread serves them on a socket or port of their own.

They contain names of operations, error codes and counts. They contain no names of keys or callers, and no EncryptionContext.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from importlib import metadata
from typing import Any, Final

import structlog

from keyferry.operations import OPERATIONS

from .. import __version__
from ..audit import AuditLog
from ..health import MESSAGES, is_ready
from ..keyring.document import STATES
from ..state import ServerState

__all__ = ["MISSING_LIBRARY", "Metrics", "MetricsError"]

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")

_BUCKETS: Final = (0.000_05, 0.000_1, 0.000_2, 0.000_4, 0.000_8, 0.001_6, 0.003_2, 0.006_4, 0.025, 0.1, 1.0)
"""Seconds. An RSA call takes a tenth of a millisecond, an SM2 call a millisecond."""


MISSING_LIBRARY: Final = (
    'metrics: the package prometheus-client is missing; install the extra "metrics" of keyferry-agent (docs/installing.md), '
    "or remove [metrics]"
)


class MetricsError(Exception):
    """The configured metrics cannot be served. The message contains the reason and a remedy."""


class _State:
    """Metrics that are read from the agent's state, once for each scrape."""

    def __init__(self, agent: ServerState, audit: AuditLog) -> None:
        self._agent = agent
        self._audit = audit
        self._build = [__version__, _commit()]

    def collect(self) -> Iterator[Any]:
        """Yield the metric families for prometheus-client."""
        from prometheus_client import core  # noqa: PLC0415 - an extra

        agent, counters = self._agent, self._agent.counters
        keyring, state, now = agent.keyring, agent.state, time.time()
        build = core.GaugeMetricFamily("keyferry_build_info", "Always 1", labels=["version", "commit"])
        build.add_metric(self._build, 1)
        yield build
        states = Counter(key.state() for key in keyring.keys.values())
        by_state = core.GaugeMetricFamily("keyferry_keys_by_state", "Master keys, by their state", labels=["state"])
        for name in (*STATES, "Deleted"):
            by_state.add_metric([name], states[name])
        yield by_state
        conditions = core.GaugeMetricFamily(
            "keyferry_condition", "1 while the condition of GetAgentHealth holds", labels=["condition"]
        )
        for name in MESSAGES:
            conditions.add_metric([name], int(name in agent.conditions))
        yield conditions
        primary = [datetime.fromisoformat(key.primary.created) for key in keyring.keys.values() if key.enabled()]
        dates = [datetime.fromisoformat(key.delete_date) for key in keyring.keys.values() if key.delete_date]
        for gauge, text, values in (
            ("connections", "Connections open now", [counters.connections]),
            ("keys", "Master keys in the keyring", [len(keyring.keys)]),
            ("keyring_loaded_timestamp_seconds", "When the keyring was loaded", [keyring.loaded_timestamp]),
            (
                "oldest_primary_version_age_seconds",
                "Age of the oldest version that is an enabled key's primary one; absent without such a key",
                [now - min(primary).timestamp()] if primary else [],
            ),
            (
                "next_deletion_seconds",
                "Seconds until the next key is deleted, negative after that; absent if no deletion is scheduled",
                [min(dates).timestamp() - now] if dates else [],
            ),
            ("audit_lag_seconds", "Duration of the last audit write, or of the one in progress", [self._audit.lag]),
            ("draining", "1 while the agent drains before it stops", [int(agent.draining)]),
            ("sealed", "1 while no keyring is open, and calls are refused", [int(keyring.is_sealed)]),
            ("ready", "1 while calls are answered", [int(is_ready(state))]),
        ):
            family = core.GaugeMetricFamily(f"keyferry_{gauge}", text)
            for value in values:
                family.add_metric([], value)
            yield family
        for counter, text, count in (
            ("reload_failures", "Reloads that failed, each attempt counted", counters.reloads_failed),
            ("audit_failures", "Requests whose audit entries could not be written", self._audit.failures),
            ("connections_refused", "Connections refused because of a limit", counters.connections_refused),
        ):
            yield core.CounterMetricFamily(f"keyferry_{counter}", text, value=count)


def _commit() -> str:
    """Return the commit that was installed, if pip recorded one, or else an empty string."""
    try:
        origin = json.loads(metadata.distribution("keyferry-agent").read_text("direct_url.json") or "{}")
        return str(origin["vcs_info"]["commit_id"])
    except (metadata.PackageNotFoundError, KeyError, TypeError, ValueError):
        return ""


class Metrics:
    """All metrics: those that are counted while requests are served, and those that are read for each scrape (`_State`)."""

    def __init__(self, agent: ServerState, audit: AuditLog) -> None:
        """Register all metrics. Raises `MetricsError` if prometheus-client is missing."""
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
            "Seconds from a request's decision to its audit entry",
            ["operation"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._notifications = prometheus.Counter(
            "keyferry_notifications", "Notifications received, which have no effect", registry=registry
        )
        self._failed = False
        registry.register(_State(agent, audit))

    def notified(self, count: int) -> None:
        """Count notifications."""
        self._notifications.inc(count)

    def observe(self, operation: str, outcome: str, seconds: float) -> None:
        """Count one request. Unknown operations are counted together, as "unknown". Never raises."""
        try:
            name = operation if operation in OPERATIONS else "unknown"
            self._requests.labels(name, outcome).inc()
            self._seconds.labels(name).observe(seconds)
        except Exception as error:
            if not self._failed:  # log once, not for each request
                log.error("metrics.failed", exc_info=error)
            self._failed = True
