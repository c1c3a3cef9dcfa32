"""The command: `python -m soak [--minutes M] [--clients N] [--pace R] [--seed S]`, in a shell `make soak MINUTES=60`.

A sixth of the time with restarts and crashes, and the rest with one agent: its memory, descriptors and latency are compared.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from bisect import bisect_right
from pathlib import Path
from typing import Any

from tqdm import tqdm

from keyferry import Client

from .client import PATIENCE
from .figures import Sample, compare, not_flat, table
from .host import ACTIONS, Host
from .journal import Answer, Journal, Violation, read
from .verify import Opened, Recorded, check_record, open_listeners

RESULTS = Path(__file__).parents[2] / ".cache" / "soak" / "results.json"
_WITH_RESTARTS = 1 / 6
_SAMPLES = 120
_LEAST = 12
"""Samples in each third, from which on its median is compared with the first."""
_SHOWN = 20


def main() -> int:
    """Run, check, print, write. Exit code 1 if anything was wrong, or is not flat."""
    parser = argparse.ArgumentParser(prog="make soak")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--pace", type=float, default=120, help="requests that all clients make together in a second")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kf-soak-") as name:
        host = Host(Path(name), arguments.clients, arguments.pace, arguments.seed)
        try:
            samples = _soak(host, arguments.minutes * 60)
            opened, recorded = _check(host)
        finally:
            host.close()
        samples = _with_latencies(samples, host.journals)
        wrong = [entry.what for entry in read(host.journals) if isinstance(entry, Violation)]
    return _report(vars(arguments), host, samples, opened, recorded, wrong + host.wrong)


def _soak(host: Host, seconds: float) -> list[Sample]:
    """Run the soak for so many seconds; return the samples of the last agent's time."""
    began = time.monotonic()
    steady = began + seconds * _WITH_RESTARTS
    troubles = itertools.cycle((Host.restart, Host.kill_client, Host.crash, Host.grants))
    pause = min(15.0, max(0.5, seconds * _WITH_RESTARTS / 16))
    while time.monotonic() < steady:
        time.sleep(pause)
        next(troubles)(host)
    host.restart()  # whose memory begins anew here
    actions = itertools.cycle(ACTIONS)
    samples: list[Sample] = []
    step = max(0.5, (began + seconds - time.monotonic()) / _SAMPLES)
    with tqdm(total=round(seconds), unit="s", disable=None) as bar:
        while (now := time.monotonic()) < began + seconds:
            bar.update(round(now - began) - bar.n)
            time.sleep(step)
            samples.append(Sample(time.monotonic(), *host.look()))
            next(actions)(host)
    return samples


def _check(host: Host) -> tuple[Opened, Recorded]:
    host.stop_clients()
    host.settle()
    notes = host.folder / "checks.jsonl"
    with Client(host.socket, timeout=PATIENCE) as kms, Journal(notes) as checks:
        opened = open_listeners(kms, host.journals, checks)
    host.end()
    return opened, check_record(host.records(), [*host.journals, notes], host.killed, host.cut)


def _with_latencies(samples: list[Sample], journals: list[Path]) -> list[Sample]:
    """Samples, each with the calls that were answered since the one before it."""
    ends = [sample.at for sample in samples]
    calls: list[tuple[list[float], list[float]]] = [([], []) for _ in samples]
    for entry in read(journals):
        if isinstance(entry, Answer) and ends[0] <= entry.at < ends[-1]:
            slow = entry.operation in ("GenerateAndExportDataKey", "ExportDataKey")
            calls[bisect_right(ends, entry.at)][slow].append(entry.seconds)
    return [s._replace(fast=tuple(fast), slow=tuple(slow)) for s, (fast, slow) in zip(samples, calls, strict=True)]


def _report(
    arguments: dict[str, Any],
    host: Host,
    samples: list[Sample],
    opened: Opened,
    recorded: Recorded,
    wrong: list[str],
) -> int:
    figures = compare(samples)
    wrong = [*wrong, *opened.wrong, *recorded.wrong]
    moved = not_flat(figures) if len(samples) >= 3 * _LEAST else []
    results = {
        **arguments,
        "answered": recorded.answered,
        "recorded": recorded.lines,
        "recorded, and not answered: a client or an agent was killed": recorded.unanswered,
        "ciphertexts opened, and under another context refused": opened.tried,
        **host.counts,
        "samples": len(samples),
        "wrong": len(wrong),
    }
    print("\n".join(f"{name}: {value}" for name, value in results.items()))
    print(table(figures))
    print("\n".join([*wrong[:_SHOWN], *moved]) or "Nothing was wrong.")
    if len(samples) < 3 * _LEAST:
        print("Too short to say whether anything grows.")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    kept = {
        **results,
        "figures": [figure[:4] for figure in figures],
        "not flat": moved,
        "what was wrong": wrong,
        "over time": [sample[:4] for sample in samples],
    }
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"Written: {RESULTS.relative_to(RESULTS.parents[2])}")
    return int(bool(wrong or moved))


if __name__ == "__main__":
    sys.exit(main())
