"""Simulations by the thousand, for as long as is asked: `make simulate`, or `python -m simulation` with tests/ on the path."""

import argparse
import faulthandler
import os
import subprocess
import sys
import time
from collections import Counter

from .simulate import simulate

_SAY_EVERY = 60.0


def main() -> int:
    """Run one seed and print its trace, or run many and print their violations. Returns 1 for a violation."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="this one, with everything that happens in it")
    parser.add_argument("--minutes", type=float, help="as many as fit into so many minutes")
    parser.add_argument("--runs", type=int, default=2_000, help="so many (default: 2000) in each process")
    parser.add_argument(
        "--first", type=int, default=time.time_ns() // 1_000_000, help="the first seed (default: the time)"
    )
    parser.add_argument("--step", type=int, default=1, help="from one seed to the next (default: 1)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(default: as many as there are cores)")
    arguments = parser.parse_args()
    faulthandler.enable()
    if arguments.seed is not None:
        result = simulate(arguments.seed)
        print(*result.trace, f"\n{result.kind}; all that happened: {result.digest}", sep="\n")
        if result.violations:
            print(f"\n{result.report()}")
        return bool(result.violations)
    if arguments.processes > 1:
        return _in_processes(arguments)
    return _many(arguments.first, arguments.step, arguments.runs, arguments.minutes)


def _in_processes(arguments: argparse.Namespace) -> int:
    """Run several processes, with interleaved seeds."""
    command = [sys.executable, "-m", "simulation", "--processes", "1", "--step", str(arguments.processes)]
    command += ["--runs", str(arguments.runs)] if arguments.minutes is None else ["--minutes", str(arguments.minutes)]
    children = [
        subprocess.Popen([*command, "--first", str(arguments.first + place)]) for place in range(arguments.processes)
    ]
    return max([child.wait() for child in children])


def _many(first: int, step: int, runs: int, minutes: float | None) -> int:
    began = said = time.monotonic()
    wrong, kinds, count = list[int](), Counter[str](), 0
    while count < runs if minutes is None else time.monotonic() < began + 60 * minutes:
        result = simulate(first + step * count)
        count += 1
        kinds[result.kind] += 1
        if result.violations:
            wrong.append(result.seed)
            print(result.report(), flush=True)
        if time.monotonic() > said + _SAY_EVERY:
            said = time.monotonic()
            print(f"{count:,} simulations from seed {first}: {len(wrong)} went wrong", flush=True)
    took = time.monotonic() - began
    each = 1000 * took / max(count, 1)
    print(f"{count:,} simulations from seed {first} in {took:.0f} s ({each:.1f} ms each), of which {dict(kinds)}")
    print(f"{len(wrong)} went wrong{': ' if wrong else ''}{' '.join(map(str, wrong[:20]))}", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
