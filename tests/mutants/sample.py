"""Which modules a run measures, and how many faults it has to catch."""

from collections import Counter
from typing import Final

_MIN_CAUGHT: Final = 0.6
MIN_SAMPLE: Final = 40
"""The share that a run has to catch, and the number of faults from which it counts.

The tests catch 84 % of all faults, and 67 % in the weakest module (docs/notes/mutants.md). A sample of 40 from the weakest has
less than 60 % in one run of five, but four modules share a sample. Raise the bound with the rate.
"""


def rotated(modules: list[str], count: int, seed: int) -> list[str]:
    """Return `count` of the modules. Consecutive seeds have consecutive modules, so that a few runs measure all of them."""
    first = seed * count % len(modules)
    return [*modules[first:], *modules[:first]][:count]


def is_enough(counts: Counter[str]) -> bool:
    """Return whether a run has caught the share that it has to catch. A small sample is always enough."""
    tried = counts.total()
    return tried < MIN_SAMPLE or tried - counts["survived"] >= _MIN_CAUGHT * tried
