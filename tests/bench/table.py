"""Figures as a table: for a terminal, and for docs/performance.md between two marks."""

from collections.abc import Iterable, Sequence
from typing import Final

from .figures import Figure

__all__ = ["MARKS", "between_marks", "markdown", "text"]

MARKS: Final = ("<!-- written by make bench -->", "<!-- until here -->")
_HEAD: Final = ("", "median", "of all rounds", "", "target", "")


def number(value: float) -> str:
    """Three digits that count, and no more than a person reads."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"


def cells(figure: Figure) -> tuple[str, ...]:
    """Name, median with its unit, spread, the absolute value, target, and whether it is met."""
    if not figure.samples:
        return figure.name, "–", "–", "", "", ""
    low, high = figure.spread
    target = f"{figure.target.kind} {number(figure.target.bound)}" if figure.target else ""
    met = {True: "met", False: "**missed**", None: ""}[figure.met]
    return (
        figure.name,
        f"{number(figure.median)} {figure.unit}",
        f"{number(low)} to {number(high)}",
        figure.absolute,
        target,
        met,
    )


def _parts(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    parts: dict[str, list[Figure]] = {}
    for figure in figures:
        parts.setdefault(figure.part, []).append(figure)
    return parts


def text(figures: Sequence[Figure]) -> str:
    """For a terminal: columns, a heading for each part, notes below the lines they are about."""
    rows = [cells(figure) for figure in figures]
    widths = [max(map(len, column)) for column in zip(*rows, _HEAD, strict=True)]
    lines: list[str] = []
    said: set[str] = set()
    for part, members in _parts(figures).items():
        lines += ["", part]
        for figure in members:
            row = "  ".join(cell.ljust(width) for cell, width in zip(cells(figure), widths, strict=True))
            lines.append(f"  {row.replace('**', '').rstrip()}")
            if figure.note and figure.note not in said:
                said.add(figure.note)
                lines.append(f"      {figure.note}")
    return "\n".join(lines).lstrip("\n") + "\n"


def markdown(figures: Sequence[Figure], notes: Sequence[str], pictures: Sequence[str] = ()) -> str:
    """For a page: one table, a line in bold for each part, and beneath it notes, and pictures by their paths."""
    lines = ["| | median | all rounds | middle round | target | |", "|---|---|---|---|---|---|"]
    said: list[str] = []
    for part, members in _parts(figures).items():
        lines.append(f"| **{part}** | | | | | |")
        for figure in members:
            name, *rest = cells(figure)
            if figure.note and figure.note not in said:
                said.append(figure.note)
            mark = f" ({said.index(figure.note) + 1})" if figure.note else ""
            lines.append(f"| {name}{mark} | {' | '.join(rest)} |")
    numbered = [f"{at}. {note}." for at, note in enumerate(said, 1)]
    shown = [f"![{path.rpartition('/')[2].removesuffix('.png')}]({path})" for path in pictures]
    return "\n".join([*lines, "", *numbered, "", *notes, "", *shown]) + "\n"


def between_marks(page: str, table: str) -> str:
    """The page with the table in its place. Raises ValueError when the marks are not there."""
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"the page has no place for the table: {MARKS[0]} ... {MARKS[1]}")
    return f"{before}{begin}\n\n{table}\n{end}{after}"
