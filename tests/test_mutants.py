"""`make mutants` knows where the modules and their tests are."""

import pytest
from mutants.modules import MODULES
from support.skip_unless import ROOT


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_tests_of_the_mutant_table_exist(module: str) -> None:
    """The table of mutants follows a renamed module."""
    assert (ROOT / module).is_file()
    assert MODULES[module]
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in MODULES[module])
