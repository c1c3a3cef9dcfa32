"""A client in a process of its own: `python -m soak.client KIND ALGORITHM SOCKET JOURNAL PACE SEED`, until SIGTERM.

KIND is blocking, threads, trio or asyncio; PACE how many requests it makes in a second.
"""

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Any

import trio
from support.keys import recipient

from keyferry import Client, aio

from .journal import Journal, Violation
from .workload import Workload

__all__ = ["KINDS", "PATIENCE"]

KINDS = ("blocking", "threads", "trio", "asyncio")
PATIENCE = 60.0
_TOGETHER = 3
"""Threads that share a client, and tasks."""


class Caller:
    """Sends the requests of a workload at its pace, and notes the answers. One for each thread, or task."""

    def __init__(self, asking: Generator[Any, Any, None], journal: Journal, pace: float) -> None:
        self._asking = asking
        self._journal = journal
        self._pause = 1 / pace
        self._next = time.monotonic()

    def first(self) -> Any:
        """The first request."""
        return next(self._asking)

    def wait(self) -> float:
        """How long to wait until the next request, in seconds; one that was late is not made up for."""
        now = time.monotonic()
        self._next = max(self._next + self._pause, now)
        return self._next - now

    def answer(self, request: Any, outcome: Any, began: float) -> Any:
        """Note an answer, and return the next request."""
        operation = request[0] if type(request) is tuple else type(request).__name__
        self._journal.answered(operation, outcome, began, time.monotonic() - began)
        return self._asking.send(outcome)


class _Stop:
    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def _blocking(kms: Client, asker: Caller, stop: _Stop) -> None:
    request = asker.first()
    while not stop.asked:
        time.sleep(asker.wait())
        began = time.monotonic()
        (outcome,) = kms.pipeline([request])
        request = asker.answer(request, outcome, began)


async def _awaited(kms: aio.Client, asker: Caller, stop: _Stop, sleep: Any) -> None:
    request = asker.first()
    while not stop.asked:
        await sleep(asker.wait())
        began = time.monotonic()
        (outcome,) = await kms.pipeline([request])
        request = asker.answer(request, outcome, began)


async def _in_trio(path: str, askers: list[Caller], stop: _Stop) -> None:
    async with aio.Client(path, timeout=PATIENCE) as kms, trio.open_nursery() as nursery:
        for asker in askers:
            nursery.start_soon(_awaited, kms, asker, stop, trio.sleep)


async def _in_asyncio(path: str, askers: list[Caller], stop: _Stop) -> None:
    async with aio.Client(path, timeout=PATIENCE) as kms:
        await asyncio.gather(*(_awaited(kms, asker, stop, asyncio.sleep) for asker in askers))


def _in_threads(path: str, askers: list[Caller], stop: _Stop, journal: Journal) -> None:
    def ask(asker: Caller) -> None:
        try:
            _blocking(kms, asker, stop)
        except Exception as error:
            journal.write(Violation(repr(error)))

    with Client(path, timeout=PATIENCE) as kms:
        threads = [threading.Thread(target=ask, args=(asker,)) for asker in askers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main(kind: str, algorithm: str, path: str, notes: str, pace: str, seed: str) -> None:
    """Ask until SIGTERM."""
    stop, to = _Stop(), recipient(algorithm)
    count = 1 if kind == "blocking" else _TOGETHER
    with Journal(Path(notes)) as journal:
        askers = [
            Caller(Workload(int(seed) * _TOGETHER + number, to, journal).requests(), journal, float(pace) / count)
            for number in range(count)
        ]
        try:
            if kind == "trio":
                trio.run(_in_trio, path, askers, stop)
            elif kind == "asyncio":
                asyncio.run(_in_asyncio(path, askers, stop))
            else:
                _in_threads(path, askers, stop, journal)
        except BaseException as error:
            journal.write(Violation(repr(error)))
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
