"""The command: `python -m mutants [--minutes M] [--seed N] [PART...]` plants faults, one at a time, in a copy of the product.

Cosmic Ray's operators make the faults. A seed draws a sample of them. Without one, the date is the seed, so that each day has
another sample, and a second run on that day has the same one.
"""

import argparse
import ast
import datetime as dt
import gc
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from .equivalent import EQUIVALENT
from .modules import MODULES
from .sample import MIN_SAMPLE, is_enough, rotated

ROOT = Path(__file__).parents[2]
COPY = ROOT / ".cache" / "mutants"
LOG = COPY / "pytest.log"
"""The output of the last run of tests."""
_TIMES_BASELINE = 3
_MARGIN_SECONDS = 20
"""A mutant whose tests take so many times what they take without it, and so many seconds more, counts as caught: it hangs."""
_LEFT_OUT = re.compile(
    r"core/(ReplaceBinaryOperator_BitOr_|ExceptionReplacer"
    r"|ReplaceBinaryOperator_.*_(Bit(Xor|Or|And)|[LR]Shift|Mod|FloorDiv|Pow)$|ReplaceComparisonOperator_.*_Is(Not)?$)"
)
"""Operators whose mutants say little: unions in annotations; handlers of an exception that is never raised; arithmetic and
comparisons that are not written by mistake, and that often have the same value.
"""
FORK = multiprocessing.get_context("fork")
PRELOADED = (
    "anyio._backends._asyncio",
    "cryptography",
    "hypothesis",
    "msgpack",
    "pytest_trio",
    "sqlalchemy",
    "structlog",
    "trio",
)
"""Packages of others that most tests import: two thirds of the time of a short run of tests."""


class Mutant(NamedTuple):
    """One fault: an operator's nth change of a module."""

    operator: str
    occurrence: int
    line: int


def main() -> int:
    """Return 0 if enough faults were caught: people judge the survivors. 1: too few were, or tests fail without a fault."""
    parser = argparse.ArgumentParser(prog="python -m mutants")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all modules together")
    parser.add_argument("--seed", type=int, default=dt.datetime.now(dt.UTC).toordinal())
    parser.add_argument("--sample", type=int, metavar="N", help="only N of the modules; the next seed has the next N")
    parser.add_argument("part", nargs="*", help="part of a module's path: only such modules")
    arguments = parser.parse_args()
    chosen = [module for module in MODULES if not arguments.part or any(part in module for part in arguments.part)]
    if not chosen:
        parser.error(f"no module has such a path; there are {', '.join(MODULES)}")
    if arguments.sample:
        chosen = rotated(chosen, arguments.sample, arguments.seed)
    for package in PRELOADED:
        importlib.import_module(package)
    gc.freeze()  # nothing of it is garbage: collections in the children pass it over
    _copy()
    print(f"seed {arguments.seed}")
    total: Counter[str] = Counter()
    end = time.monotonic() + 60 * arguments.minutes
    for number, module in enumerate(chosen):
        share = (end - time.monotonic()) / (len(chosen) - number)
        counts = _try(module, arguments.seed, time.monotonic() + share)
        if counts is None:
            return 1
        total += counts
    _report("all", total)
    if total.total() < MIN_SAMPLE:
        print(f"a sample of fewer than {MIN_SAMPLE} is not judged; take more minutes")
    return 0 if is_enough(total) else 1


def _copy() -> None:
    """Copy the files that git knows: faults are never in the checkout itself."""
    shutil.rmtree(COPY, ignore_errors=True)
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, COPY / name)


def _try(module: str, seed: int, end: float) -> Counter[str] | None:
    """Plant faults in a module until the time has passed; return how many were caught, and how."""
    source = (COPY / module).read_text()
    began = time.monotonic()
    if _run(module, None) != 0:
        print(f"{module}: the tests fail without a fault: see {LOG}")
        return None
    for cached in (COPY / module).parent.glob(f"__pycache__/{Path(module).stem}.*.pyc"):
        cached.unlink()
    patience = _TIMES_BASELINE * (time.monotonic() - began) + _MARGIN_SECONDS
    mutants = sorted(_mutants(source))
    random.Random(f"{seed} {module}").shuffle(mutants)
    counts: Counter[str] = Counter()
    for mutant in mutants:
        if time.monotonic() >= end:
            break
        changed = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
        if changed is None:
            continue
        before, after = (text.splitlines()[mutant.line - 1].strip() for text in (source, changed))
        if (module, before, after) in EQUIVALENT:
            continue
        (COPY / module).write_text(changed)
        try:
            code = _run(module, patience)
        finally:
            (COPY / module).write_text(source)
        outcome = {None: "hung", 0: "survived"}.get(code, "caught")
        counts[outcome] += 1
        if outcome == "survived":
            print(f"{module}:{mutant.line}: {mutant.operator.removeprefix('core/')}: {after}", flush=True)
    _report(f"{module} ({len(mutants)} in all)", counts)
    return counts


def _mutants(source: str) -> Iterator[Mutant]:
    """Yield every fault of a module that can matter: not in annotations, imports, docstrings and other texts of constants."""
    lines = _lines_that_run(source)
    nodes = list(ast_nodes(get_ast(source)))
    for name in operator_names():
        operator = get_operator(name)
        if _LEFT_OUT.match(name) or operator.arguments():
            continue
        places = [start for node in nodes for start, _ in operator().mutation_positions(node)]
        for occurrence, (line, _) in enumerate(places):
            if line in lines:
                yield Mutant(name, occurrence, line)


def _lines_that_run(source: str) -> set[int]:
    """Return the lines of statements inside functions, and of constants; without definitions and their annotations."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                lines.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            lines.update(range(node.value.lineno, (node.value.end_lineno or node.value.lineno) + 1))
    return lines


def _run(module: str, patience: float | None) -> int | None:
    """Run the tests of a module in the copy, in a child of this process: third-party packages are imported already.

    Returns pytest's exit code, or None where the tests took too long.
    """
    child = FORK.Process(target=_run_tests, args=(module, patience is None))
    child.start()
    child.join(patience)
    if child.exitcode is None and child.pid is not None:
        os.killpg(child.pid, signal.SIGKILL)  # with the agents that the tests have started
        child.join()
        return None
    return child.exitcode


def _run_tests(module: str, is_baseline: bool) -> None:
    """Run pytest until the first failure: first the tests that noticed a fault before, then those that start no process."""
    os.setsid()
    os.chdir(COPY)
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    folders = [str(COPY / folder) for folder in ("client", "agent", "tests")]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    sys.path[:] = [*folders, *(entry for entry in sys.path if not Path(entry or ".").is_relative_to(ROOT / "tests"))]
    # A fault must not outlive its run in a .pyc, which is known by the size and the second of its source.
    sys.dont_write_bytecode = not is_baseline
    os.environ["PYTHONDONTWRITEBYTECODE"] = "" if is_baseline else "1"
    tests = [f"tests/{name}.py" for name in MODULES[module]]
    options = ["-q", "-x", "-n0", "--failed-first", "-p", "no:randomly", "--assert=plain"]
    sys.exit(pytest.main([*options, *tests], plugins=[_FastFirst()]))


class _FastFirst:
    """pytest's plugin that sorts the tests that start no process before the others."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort the tests: `make test-fast` has the same ones."""
        from support.fast import is_fast  # noqa: PLC0415 - the copy's

        items.sort(key=lambda item: not is_fast(item))


def _report(name: str, counts: Counter[str]) -> None:
    tried = counts.total()
    share = f"{100 * (tried - counts['survived']) / tried:.0f} %" if tried else "-"
    print(f"{name}: {tried} tried, {share} caught, {counts['hung']} of them by a hang", flush=True)


if __name__ == "__main__":
    sys.exit(main())
