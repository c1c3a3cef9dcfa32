"""`make mutants` knows where the modules and their tests are."""

import pytest
from mutants.modules import MODULES
from support.skip_unless import ROOT


@pytest.mark.parametrize("module", MODULES)
def test_a_mutated_module_and_its_tests_exist(module: str) -> None:
    """A module that moves has to move in the table, too."""
    assert (ROOT / module).is_file()
    assert MODULES[module]
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in MODULES[module])
