"""Curves as pictures: a PNG for each plot, the median of the rounds as a line, all rounds as a band."""

from collections.abc import Iterable
from pathlib import Path
from statistics import median

import matplotlib as mpl
from matplotlib import pyplot as plt

from .figures import Curve

__all__ = ["draw"]

_DOUBLING = ("connections", "keys", "grants", "depth")
"""Plots whose places are far apart."""


def draw(curves: Iterable[Curve], folder: Path) -> list[Path]:
    """Write the pictures, and return their paths."""
    mpl.use("Agg")
    plots: dict[str, list[Curve]] = {}
    for curve in curves:
        plots.setdefault(curve.plot, []).append(curve)
    return [_draw(name, members, folder / f"{name}.png") for name, members in plots.items()]


def _draw(name: str, curves: list[Curve], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for curve in curves:
        at = [point.x for point in curve.points]
        middle = [median(point.samples) for point in curve.points]
        axes.plot(at, middle, marker="o", label=curve.name)
        axes.fill_between(
            at,
            [min(point.samples) for point in curve.points],
            [max(point.samples) for point in curve.points],
            alpha=0.2,
        )
    if name in _DOUBLING:
        axes.set_xscale("log")
    if name == "latency":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(curves[0].x)
    axes.set_ylabel(curves[0].y)
    axes.grid(visible=True, alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
