"""The context of all measurements: duration, rounds, and the bare loop beside each of them."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from .cpu import Interference
from .figures import Curve, Figure, Target
from .worker import Worker

__all__ = ["DISTURBED", "Bare", "Measured", "Session", "Way"]

DISTURBED: Final = 0.05
"""The share of a measurement's time that other programs may take."""
_TRIES: Final = 3

Way: TypeAlias = Callable[[float], float]
"""Ask for so many seconds; give the answers each second."""


class Bare(NamedTuple):
    """Which bare loop a figure is a ratio to. With `threads`, on as many cores."""

    loop: str = "bare RSA_2048"
    size: int = 32
    threads: int = 1

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return f"{self.loop}, {self.size} bytes{threads}"


_BARE: Final = Bare()


class Measured(NamedTuple):
    """The rounds of one measurement: its own values, and each over the bare loop's around it."""

    values: list[float]
    ratios: list[float]
    bare: list[float]

    @property
    def absolute(self) -> str:
        """The value of the middle round, as a rate."""
        return f"{statistics.median(self.values):,.0f}/s"


@dataclass
class Session:
    """One run of the benchmark. `alone` runs loops on the agent's core, `everywhere` on all."""

    quick: bool
    alone: Worker
    everywhere: Worker
    figures: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    bare_rates: dict[Bare, list[float]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """How often each thing is measured."""
        return 3 if self.quick else 7

    @property
    def seconds(self) -> float:
        """How long each thing is measured each time."""
        return 0.2 if self.quick else 0.5

    def places(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The places of a curve to measure: where there is little time, the ends."""
        return (whole[0], whole[-1]) if self.quick else whole

    def bare(self, bare: Bare) -> float:
        """Turns of a bare loop each second, now."""
        worker = self.everywhere if bare.threads > 1 else self.alone
        rate = worker.rate(bare.loop, self.seconds / 2, size=bare.size, threads=bare.threads)
        self.bare_rates.setdefault(bare, []).append(rate)
        return rate

    def beside(
        self, measures: Mapping[str, Way], bare: Bare | Mapping[str, Bare] = _BARE, watched: Iterable[int] = ()
    ) -> dict[str, Measured]:
        """Measure things in turn, round after round, with the bare loop before and after each.

        A value is over the mean of the two, so that a machine that becomes slower or faster on the way moves both. Where other
        programs kept the `watched` processes from their cores, it is done again, a few times, and the least disturbed counts.
        """
        made = {name: Measured([], [], []) for name in measures}
        for _ in range(self.rounds):
            for name, way in measures.items():
                kind = bare if isinstance(bare, Bare) else bare[name]
                self._once(made[name], way, kind, tuple(watched))
        return made

    def _once(self, made: "Measured", way: Way, kind: Bare, watched: tuple[int, ...]) -> None:
        tries = []
        for _ in range(1 if self.quick or not watched else _TRIES):
            watch = Interference(self.alone.pid, os.getpid(), *watched) if watched else None
            before, value, after = self.bare(kind), way(self.seconds), self.bare(kind)
            tries.append((watch.share() if watch else 0.0, value, (before + after) / 2))
            if tries[-1][0] <= DISTURBED:
                break
        disturbed, value, base = min(tries)
        if watched:
            self.disturbed.append(disturbed)
        made.values.append(value)
        made.bare.append(base)
        made.ratios.append(value / base)

    def add(
        self,
        part: str,
        name: str,
        samples: list[float],
        *,
        unit: str = "× bare",
        absolute: str = "",
        target: Target | None = None,
        note: str = "",
    ) -> None:
        """Add a line to the table."""
        self.figures.append(Figure(part, name, samples, unit, absolute, target, note))

    def say(self, what: str) -> None:
        """Report progress on standard error."""
        print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
