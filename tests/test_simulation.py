"""The whole daemon in simulated time, under faults that a seed chooses: docs/simulation.md. And that the simulation is one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from simulation.simulate import simulate

TESTS = Path(__file__).parent
SEED = os.environ.get("KEYFERRY_SEED")
ITEMS, EACH = 12, 100 if os.environ.get("KEYFERRY_NO_SKIPS") else 50
"""A newcomer's machine simulates half as many lives: those found every deliberate fault that all of them find."""
FIRST = int(SEED) if SEED else 0
"""KEYFERRY_SEED: the first seed, for others than those of every day."""


@pytest.fixture
def untraced() -> Iterator[None]:
    """Without coverage's tracer, which takes as long as all the rest: the question is not which lines there are."""
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("part", range(ITEMS))
def test_each_request_is_answered_once_and_audited(part: int) -> None:
    """Each world has a seed; a failure prints the command that repeats it."""
    for seed in range(FIRST + part * EACH, FIRST + (part + 1) * EACH):
        result = simulate(seed)
        assert not result.violations, result.report()


def test_seed_decides_the_trace_in_any_process() -> None:
    """The traces are equal to the last system call, with another hash seed, other descriptors and earlier worlds."""
    seeds = range(7_000, 7_012)
    here = [simulate(seed).digest for seed in seeds]
    assert here == [simulate(seed).digest for seed in seeds]
    assert len(set(here)) == len(here)
    code = f"from simulation.simulate import simulate; print(*(simulate(seed).digest for seed in reversed({seeds!r})))"
    for hashing in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(TESTS), "PYTHONHASHSEED": hashing},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert out.split() == here[::-1]


def test_seed_decides_the_trace_for_any_process_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit entry has the agent's process number, and a simulated one is not longer."""
    digests = set()
    for number in (7, 4_000_000):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        digests.add(simulate(7_000).digest)
    assert len(digests) == 1
