"""The figures that should be flat: the first third of the time that one agent served, against the last."""

from collections.abc import Sequence
from math import inf
from statistics import median, quantiles
from typing import Any, NamedTuple

__all__ = ["Figure", "Sample", "compare", "not_flat", "table"]

_MEMORY_GROWS = 4 * 2**20
"""Bytes, and a twentieth, that memory may have grown by: versions that rotations made, and how an allocator scatters."""
_DESCRIPTORS_GROW = 2
_LATENCY_GROWS = 2.0
"""Times: other programs share the host."""


class Sample(NamedTuple):
    """One sample. `latency`: seconds of the calls since the previous sample, fast and slow ones apart."""

    at: float
    resident: float
    descriptors: float
    connections: float
    fast: tuple[float, ...] = ()
    slow: tuple[float, ...] = ()


class Figure(NamedTuple):
    """One quantity in the first and in the last third."""

    name: str
    unit: str
    first: float
    last: float
    most: float
    """The limit on the last third."""

    @property
    def flat(self) -> bool:
        """Whether it has stayed."""
        return self.last <= self.most


def compare(samples: Sequence[Sample]) -> list[Figure]:
    """Medians of the first and the last third of samples."""
    third = max(1, len(samples) // 3)
    first, last = samples[:third], samples[-third:]
    figures = []

    def figure(name: str, unit: str, value: Any, most: Any, scale: float = 1) -> None:
        early, late = (median(map(value, part)) * scale for part in (first, last))
        figures.append(Figure(name, unit, early, late, most(early)))

    mib = 2**-20
    figure("resident memory", "MiB", lambda s: s.resident, lambda v: v * 1.05 + _MEMORY_GROWS * mib, mib)
    figure("descriptors", "", lambda s: s.descriptors, lambda v: v + _DESCRIPTORS_GROW)
    figure("connections", "", lambda s: s.connections, lambda v: v + _DESCRIPTORS_GROW)
    for name in ("fast", "slow"):
        early, late = ([call for each in part for call in getattr(each, name)] for part in (first, last))
        for percent in (50, 99):
            before, after = (_quantile(calls, percent) * 1_000 for calls in (early, late))
            most = (
                before * _LATENCY_GROWS if percent == 50 else inf
            )  # the slowest calls tell of the host's other programs
            figures.append(Figure(f"{name} calls, {percent} %", "ms", before, after, most))
    return figures


def _quantile(values: Sequence[float], percent: int) -> float:
    return quantiles(values, n=100)[percent - 1] if len(values) > 1 else 0.0


def not_flat(figures: Sequence[Figure]) -> list[str]:
    """Return a line for each figure that is not flat."""
    return [
        f"{figure.name}: {figure.last:.2f} {figure.unit} in the last third, {figure.first:.2f} in the first"
        for figure in figures
        if not figure.flat
    ]


def table(figures: Sequence[Figure]) -> str:
    """All of them, for people, as a page can hold it."""
    lines = ["| | first third | last third |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {f.name} | {f.first:.2f} {f.unit} | {f.last:.2f} {f.unit} |" for f in figures)])
