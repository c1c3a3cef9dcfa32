"""`make test` ends with one line that is true, and the coverage gate applies where nothing is skipped."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.agent import PATIENCE
from support.skip_unless import ROOT, program

pytestmark = program("make", "make")

PASSED = "make test passed: 3 tests passed, 1 skipped"
TESTS = """#!/bin/sh
case "$0 $*" in
    *"coverage run "* | *"/pytest "*)
        echo "    1 test needs neovim" >.cache/skipped; echo "3 tests passed, 1 skipped" >.cache/counts; exit "$TESTS" ;;
    *"coverage report"*) echo "94 % is less than the gate"; exit 2 ;;
esac
"""
"""A `pytest` and a `coverage` that end a run as $TESTS says. The run covers less than the gate asks for."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, and programs that do nothing; `pytest` and `coverage` pretend to run tests."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("client/pyproject.toml", "agent/pyproject.toml", "pyproject.toml", ".ci/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    for name in (".created", ".runtime", ".development"):
        (tmp_path / ".venv" / name).touch()
    for name in ("ruff", "mypy", "python", "coverage", "pytest"):
        (programs / name).write_text(TESTS if name in ("coverage", "pytest") else 'test "$MYPY" != fails\n')
        (programs / name).chmod(0o755)
    return tmp_path


def make_test(checkout: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `make test` in the checkout, with an environment that does not depend on this run."""
    return subprocess.run(
        ["make", "test"],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "TESTS": "0", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_run_with_skips_passes_below_the_coverage_gate(checkout: Path) -> None:
    """The end of the output is the list of skipped tests, and one line with the result."""
    ended = make_test(checkout)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-2:] == ["    1 test needs neovim", PASSED]


@pytest.mark.parametrize("environment", [{"KEYFERRY_NO_SKIPS": "1"}, {"TESTS": "1"}, {"MYPY": "fails"}])
def test_a_run_that_fails_does_not_print_that_it_passed(checkout: Path, environment: dict[str, str]) -> None:
    """A run fails below the coverage gate where nothing may be skipped, for a failed test, and for a finding of mypy."""
    ended = make_test(checkout, **environment)
    assert ended.returncode != 0
    assert "make test passed" not in ended.stdout
