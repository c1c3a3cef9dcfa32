"""`make mutants` knows where the modules and their tests are, and what a run has to catch."""

from collections import Counter

import pytest
from mutants.equivalent import EQUIVALENT
from mutants.modules import MODULES
from mutants.sample import is_enough, rotated
from support.skip_unless import ROOT


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_tests_of_the_mutant_table_exist(module: str) -> None:
    """The table of mutants follows a renamed module."""
    assert (ROOT / module).is_file()
    assert MODULES[module]
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in MODULES[module])


def test_line_of_an_equivalent_mutant_is_in_its_module() -> None:
    """A changed line has to be judged again."""
    for module, line, changed in EQUIVALENT:
        assert line in map(str.strip, (ROOT / module).read_text().splitlines()), f"{module}: {line}"
        assert changed != line


def test_consecutive_seeds_measure_all_modules() -> None:
    """Six days of four modules each measure the whole table, and a day has four different ones."""
    modules = [*MODULES]
    days = [rotated(modules, 4, seed) for seed in range(739_000, 739_000 + -(-len(modules) // 4))]
    assert {module for day in days for module in day} == {*modules}
    assert all(len({*day}) == 4 for day in days)
    assert {*rotated(modules, 99, 1)} == {*modules}


@pytest.mark.parametrize(
    ("caught", "hung", "survived", "enough"),
    [(23, 1, 16, True), (23, 0, 17, False), (0, 0, 39, True), (0, 40, 0, True), (0, 0, 0, True), (59, 0, 41, False)],
)
def test_run_fails_below_60_percent_of_40_mutants(caught: int, hung: int, survived: int, *, enough: bool) -> None:
    """A fault that hangs is caught. A sample of fewer than 40 faults says too little to fail."""
    assert is_enough(Counter(caught=caught, hung=hung, survived=survived)) is enough
