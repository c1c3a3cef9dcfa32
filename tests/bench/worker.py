"""A process on cores of its own that repeats the loops of `loops` as long as it is told to: `python -m bench.worker CORE...`.

A line in, `{"loop", "size", "seconds", "threads"}`, and a line out: how many steps each second.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

from .baselines import LOOPS, Step
from .cpu import pin

__all__ = ["Worker"]

_BURST = 0.002
"""Seconds between two looks at the clock."""


class Worker:
    """The other end: starts the process, and asks it."""

    def __init__(self, cores: frozenset[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", *map(str, sorted(cores))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def rate(self, loop: str, seconds: float, *, size: int = 32, threads: int = 1) -> float:
        """Return the steps per second of a loop that `threads` threads repeat for `seconds`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"loop": loop, "size": size, "seconds": seconds, "threads": threads}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def repeat(step: Step, seconds: float) -> float:
    """Repeat a step for some seconds; return the steps per second."""
    began = time.perf_counter()
    step()
    burst = max(1, round(_BURST / (time.perf_counter() - began)))
    done, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        for _ in range(burst):
            step()
        done += burst
    return done / elapsed


def _together(step: Step, seconds: float, threads: int) -> float:
    rates: list[float] = []
    workers = [threading.Thread(target=lambda: rates.append(repeat(step, seconds))) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)


def main() -> None:
    """Answer lines until there are no more."""
    pin(0, frozenset(map(int, sys.argv[1:])))
    steps: dict[tuple[str, int], Step] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        which = asked["loop"], asked["size"]
        if which not in steps:
            steps[which] = LOOPS[asked["loop"]](asked["size"])
            repeat(steps[which], asked["seconds"] / 4)  # warm
        print(_together(steps[which], asked["seconds"], asked["threads"]), flush=True)


if __name__ == "__main__":
    main()
