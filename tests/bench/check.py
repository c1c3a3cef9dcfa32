"""Whether this run is much worse than the one that is kept: ratios only, and with a wide margin."""

from collections.abc import Iterable
from typing import Final

from .figures import Figure

__all__ = ["MARGIN", "worse"]

MARGIN: Final = 1.5
"""How many times worse a ratio has to be to count: a busy machine costs a fifth now and then, a mistake costs more."""


def worse(now: Iterable[Figure], kept: Iterable[Figure]) -> list[str]:
    """Return a line for each figure that misses its target and is `MARGIN` times worse than the kept one."""
    before = {(figure.part, figure.name): figure for figure in kept if figure.samples}
    found = []
    for figure in now:
        old = before.get((figure.part, figure.name))
        if old is None or figure.target is None or not figure.samples or figure.met:
            continue
        ratio = old.median / figure.median if figure.target.kind == "at least" else figure.median / old.median
        if ratio > MARGIN:
            found.append(
                f"{figure.part}: {figure.name}: {figure.median:.3g} {figure.unit}; it was {old.median:.3g}, "
                f"{ratio:.1f} times better"
            )
    return found
