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
def test_whatever_happens_each_request_is_answered_once_rightly_and_on_record(part: int) -> None:
    """In so many worlds, each of them a seed; a failure says how to see it again."""
    for seed in range(FIRST + part * EACH, FIRST + (part + 1) * EACH):
        result = simulate(seed)
        assert not result.violations, result.report()


def test_a_seed_is_one_story_in_this_process_and_in_another() -> None:
    """To the last system call: with another order of sets, other descriptors, and what ran before."""
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


def test_a_seed_is_one_story_whatever_number_the_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit entry has the number of the agent's process, and a world's own is no longer than another's."""
    digests = set()
    for number in (7, 4_000_000):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        digests.add(simulate(7_000).digest)
    assert len(digests) == 1
