"""The world of one simulation: its seed, its time, its trace, and its violations."""

import errno
import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio
import trio.testing

from .faults import FaultPlan
from .fixtures import CONFIGURATIONS, EPOCH, RINGS, Grant, Ring
from .record import Record

if TYPE_CHECKING:
    from .clients import Client
    from .connection_trace import AgentConnection
    from .threads import StepwiseThreads

__all__ = ["Adopted", "World"]

MONOTONIC: Final = 1_000.0
"""The monotonic clock at the beginning."""
_TICK: Final = 0.001
"""Seconds: the resolution of the times in audit entries."""
_MAX_TRACE_LINES: Final = 20_000
"""Lines of a trace: an agent that does more than that turns in a circle."""


class Adopted(NamedTuple):
    """A keyring and a configuration, and the time from which the agent uses them."""

    since: float
    ring: int
    grants: int

    @property
    def state(self) -> tuple[Ring, tuple[Grant, ...]]:
        """The keyring and the grants."""
        return RINGS[self.ring], CONFIGURATIONS[self.grants]


@dataclass
class World:
    """Everything outside the agent, for one seed."""

    seed: int
    directory: Path
    trace: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    token: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}: what is asked")
        self.faults_rng = random.Random(f"{self.seed}: what happens")
        self.plan = FaultPlan(random.Random(f"{self.seed}: what fails"))
        self.clock = trio.testing.MockClock(autojump_threshold=0)
        self.record = Record(self.directory / "audit.jsonl", self.report_violation)
        self.lines: dict[int, AgentConnection] = {}
        self.all_connections: list[AgentConnection] = []
        self.clients: dict[bytes, Client] = {}
        self.stepwise_threads: StepwiseThreads
        self.adopted: list[Adopted] = []
        self.on_disk = (0, 0)
        """The keyring and the configuration that are in the files; -1 for one that is damaged."""
        self.loaded = self.read = 0
        """Which of them the agent has read last."""
        self.told: list[tuple[float, str]] = []
        self.logged: list[tuple[float, str]] = []
        self.starved = self.was_starved = False
        self.spare = 0
        self.stalled = 0.0
        """Seconds that the agent stood still, as it waited for something outside."""
        self.stops: list[float] = []
        """When it was told to stop."""
        self.grace_over = False
        self.serving = trio.Event()
        self.ended: float | None = None
        self.on_failure: str = self.rng.choice(("refuse", "refuse", "serve"))
        self.limits = self.rng.choice(((1024, 256), (1024, 256), (3, 2), (2, 2)))
        self.rate = self.rng.choice((0, 0, 0, 0, 5))
        self.watchdog = self.rng.choice((0, 0, 6))
        self.early = self.rng.random() < 0.5
        """Whether it is told to stop while it has work to do."""
        self.small_buffers = self.rng.random() < 0.5

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return self.clock.current_time()

    @property
    def wall(self) -> float:
        """Seconds since 1970."""
        return EPOCH + self.now

    def is_granted(self, uid: int, when: float) -> bool:
        """Whether a user has any grant in the configurations that the agent uses around this time."""
        return any(grant.uid == uid for adopted in self.in_force(when) for grant in adopted.state[1])

    def in_force(self, when: float) -> list[Adopted]:
        """Return the keyrings and configurations that the agent uses at a time with a precision of a millisecond."""
        following = [*self.adopted[1:], None]
        return [
            adopted
            for adopted, after in zip(self.adopted, following, strict=True)
            if adopted.since <= when + _TICK and (after is None or after.since >= when - _TICK)
        ]

    def add_event(self, what: str, *details: Any) -> None:
        """Add a line to the trace."""
        if len(self.trace) == _MAX_TRACE_LINES:
            self.trace.append("...")
            self.violations.append("the agent turns in a circle")
            signal.raise_signal(signal.SIGALRM)
        text = " ".join(str(detail) for detail in details).replace(str(self.directory), "~")
        self.trace.append(f"{self.now:10.6f} {what} {text}")

    def report_violation(self, what: str) -> None:
        """Record that a promise was broken."""
        self.add_event("VIOLATION", what)
        self.violations.append(what)

    def stall(self, seconds: float) -> None:
        """Let time pass while the agent waits for a system call."""
        if seconds:
            self.stalled += seconds
            self.clock.jump(seconds)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send the agent a signal to stop."""
        if self.serving.is_set() and self.ended is None:
            self.add_event("signal", number.name)
            self.stops.append(self.now)
            signal.raise_signal(number)

    def send_sighup(self) -> None:
        """Send the agent a SIGHUP to reload its files."""
        if self.ended is None:
            self.add_event("signal", "SIGHUP")
            signal.raise_signal(signal.SIGHUP)

    def inject_fault(self, point: str) -> None:
        """Raise the planned fault of a point at which no other fault can happen."""
        fault = self.plan.next_fault(point)
        if fault:
            self.add_event("fault", point, errno.errorcode.get(fault, fault))
            raise OSError(fault, os.strerror(fault))

    def allocate_descriptor(self) -> None:
        """Raise EMFILE if no descriptor is left."""
        if self.starved:
            if not self.spare:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self.spare -= 1

    def release_descriptor(self) -> None:
        """Count a closed descriptor."""
        if self.starved:
            self.spare += 1

    def record_adoption(self, *, keyring: bool) -> None:
        """Record that the agent uses its last configuration, and its last loaded keyring if `keyring` is set."""
        self.adopted.append(Adopted(self.now, self.loaded if keyring else self.adopted[-1].ring, self.read))

    def capture_log(self, _logger: Any, _method: str, event: dict[str, Any], drop: BaseException) -> Any:
        """Trace an event of the agent's log, and check it."""
        name = str(event.pop("event"))
        self.logged.append((self.now, name))
        details = [f"{key}={event[key]}" for key in sorted(event) if key not in ("exc_info", "libcrypto")]
        self.add_event("log", name, *details)
        if name == "agent.serving":
            self.adopted.append(Adopted(self.now, self.loaded, self.read))
            self.serving.set()
            self.plan.started = True
        elif name == "audit.failed":
            self.record.failed.update(event.get("request_ids", ()))
        elif name == "drain.grace_over":
            self.grace_over = True
            if len(self.stops) < 2:
                self._check_grace()
        elif name in ("connection.failed", "request.failed") and not self._excused(name):
            self.report_violation(f"{name}: {event.get('exc_info')!r}")
        raise drop

    def _check_grace(self) -> None:
        """Check that connections were open until the end of the grace period, and each for a reason."""
        until_then = [line for line in self.all_connections if line.closed == self.now]
        if not until_then:
            self.report_violation("the grace period ended without a connection to wait for")
        for line in until_then:
            if line.quiet and not (line.client.fault or line.fault or line.half_received):
                self.report_violation(f"{line} had nothing to wait for, and was there until the grace was over")

    def _excused(self, name: str) -> bool:
        return name == "request.failed" and bool(self.plan.injected["thread"])
