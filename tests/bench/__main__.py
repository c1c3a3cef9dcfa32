"""The command: `python -m bench [--quick] [--check] [PART...]`, in a shell `make bench` and `make bench-check`."""

import argparse
import json
import os
import platform
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from keyferry import libcrypto

from . import table
from .check import worse
from .cpu import ALL, CLIENT, SERVER, pin
from .figures import Figure
from .measure import PARTS
from .run_context import DISTURBED, Bare, Session
from .worker import Worker

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
KEPT = ROOT / "docs" / "performance"
"""Where a whole run's results and pictures are kept."""
CACHE = ROOT / ".cache" / "bench"
CHECKED = ("throughput", "sm2", "client", "module")


def main() -> int:
    """Measure, print one table, write results and pictures; with --check, compare with the kept results."""
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter rounds; docs/performance.md stays as it is"
    )
    parser.add_argument(
        "--check", action="store_true", help="fail if a ratio is much worse than docs/performance/results.json"
    )
    parser.add_argument("part", nargs="*", help=f"what to measure: {', '.join(PARTS)}; all by default")
    arguments = parser.parse_args()
    for unknown in set(arguments.part) - PARTS.keys():
        parser.error(f"there is no part {unknown!r}: {', '.join(PARTS)}")
    parts = arguments.part or (CHECKED if arguments.check else PARTS)
    quick = arguments.quick or arguments.check
    session, took = _measured(parts, quick=quick)
    results = _results(session, took)
    print(table.text(session.figures))
    print("\n".join(results["notes"]))
    whole = not quick and not arguments.part
    folder = KEPT if whole else CACHE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    pictures = _pictures(session, folder)
    written = [folder / "results.json", *pictures]
    if whole:
        shown = [str(path.relative_to(PAGE.parent)) for path in pictures]
        made = table.markdown(session.figures, results["notes"], shown)
        PAGE.write_text(table.between_marks(PAGE.read_text(), made))
        written.append(PAGE)
    print("Written:", *(path.relative_to(ROOT) for path in written))
    return _check(session.figures) if arguments.check else 0


def _measured(parts: Any, *, quick: bool) -> tuple[Session, float]:
    began = time.monotonic()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process that is started compiles its modules anew
    pin(0, CLIENT)
    with ExitStack() as stack:
        session = Session(quick, stack.enter_context(Worker(SERVER)), stack.enter_context(Worker(ALL)))
        for part in parts:
            session.say(part)
            PARTS[part](session)
    return session, time.monotonic() - began


def _results(session: Session, took: float) -> dict[str, Any]:
    bare = [f"{kind}: {median(rates):,.0f}/s" for kind, rates in session.bare_rates.items() if kind.size == Bare().size]
    disturbed = median(session.disturbed) if session.disturbed else 0.0
    often = sum(share > DISTURBED for share in session.disturbed) / max(1, len(session.disturbed))
    how = f"{session.rounds} rounds of {session.seconds:g} s each, {took / 60:.1f} minutes. Beside them: {'; '.join(bare)}."
    where = (
        f"{len(ALL)} cores, {_processor()}, Linux {platform.release()}, Python {platform.python_version()}, "
        f"{libcrypto.version()}."
    )
    quiet = (
        f"Other programs kept these from their cores for {disturbed:.1%} of the time (median of all measurements), and for "
        f"more than {DISTURBED:.0%} in {often:.0%} of the measurements."
    )
    return {
        "figures": [figure.to_json() for figure in session.figures],
        "curves": [asdict(curve) for curve in session.curves],
        "bare": {str(kind): rates for kind, rates in session.bare_rates.items()},
        "notes": [how, where, quiet],
    }


def _pictures(session: Session, folder: Path) -> list[Path]:
    try:
        from .plots import draw  # noqa: PLC0415 - the only thing that needs matplotlib
    except ImportError:
        print("No pictures: matplotlib is not installed.", file=sys.stderr)
        return []
    return draw(session.curves, folder)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _check(figures: list[Figure]) -> int:
    """0: nothing is much worse; 1: something is; 2: there is nothing to compare with."""
    path = KEPT / "results.json"
    if not path.exists():
        print(f"There is nothing to compare with: make bench writes {path.relative_to(ROOT)}.", file=sys.stderr)
        return 2
    kept = [Figure.from_json(each) for each in json.loads(path.read_text())["figures"]]
    found = worse(figures, kept)
    print("\n".join(found) if found else "Nothing is much worse than docs/performance/results.json.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
