"""A figure: samples of several rounds, their median and spread, and their target."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, Self

__all__ = ["Curve", "Figure", "Point", "Target", "percentile", "ratios"]


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest of the values that at least `percent` of 100 are not above (nearest rank). Raises ValueError for none."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def ratios(values: Sequence[float], bases: Sequence[float]) -> list[float]:
    """Each round's value over the same round's base. Raises ValueError when the rounds do not pair."""
    return [value / base for value, base in zip(values, bases, strict=True)]


@dataclass(frozen=True)
class Target:
    """A figure is to be `at least` or `at most` a bound."""

    kind: Literal["at least", "at most"]
    bound: float

    def met(self, value: float) -> bool:
        """Whether a value is on the right side; the bound itself is."""
        return value >= self.bound if self.kind == "at least" else value <= self.bound


@dataclass(frozen=True)
class Figure:
    """One line of the table: a sample for each round, none for what could not be measured. `absolute` is the same before it
    was made a ratio, for information.
    """

    part: str
    name: str
    samples: list[float]
    unit: str = "× bare"
    absolute: str = ""
    target: Target | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest of the rounds."""
        return min(self.samples), max(self.samples)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        return self.target.met(self.median) if self.target and self.samples else None

    def to_json(self) -> dict[str, Any]:
        """Return the figure as it is kept, with the values that follow from its samples."""
        if not self.samples:
            return asdict(self)
        low, high = self.spread
        return {**asdict(self), "median": self.median, "low": low, "high": high, "met": self.met}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Self:
        """Return the figure of a `to_json`."""
        target = kept["target"]
        fields = {name: kept[name] for name in ("part", "name", "samples", "unit", "absolute", "note")}
        return cls(**fields, target=Target(**target) if target else None)


@dataclass(frozen=True)
class Point:
    """One place of a curve: a sample for each round."""

    x: float
    samples: list[float]


@dataclass
class Curve:
    """One line of a plot; curves of one `plot` share axes. `y` names the samples."""

    plot: str
    name: str
    x: str
    y: str
    points: list[Point] = field(default_factory=list)

    def add(self, x: float, samples: Sequence[float]) -> None:
        """Add a point."""
        self.points.append(Point(x, list(samples)))

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Self:
        """Return the curve of an `asdict`."""
        return cls(**{**kept, "points": [Point(**point) for point in kept["points"]]})
