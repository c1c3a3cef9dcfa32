"""Threads for slow jobs, whose results come back to the event loop: several at a time, where several are done.

A trio thread costs 120 microseconds for each job, and each result a turn of the loop of its own. These cost 30, and what is
done together is recorded and answered together.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, TypeAlias

import trio

__all__ = ["Workers"]

_Job: TypeAlias = tuple[Callable[[], Any], "_Done", trio.lowlevel.TrioToken]
_Done: TypeAlias = Callable[[Any, Exception | None], None]


class Workers:
    """At most `most` threads, made when there is something to do; who waits for them is served in turn. For one event loop."""

    def __init__(self, most: int) -> None:
        self.busy = 0
        """Jobs that were taken and have not come back."""
        self._most = most
        self._threads = 0
        self._turns = threading.Lock()
        self._waiting: dict[Hashable, deque[_Job]] = {}
        """By whose they are; whose turn is next is first."""
        self._wanted: queue.SimpleQueue[None] = queue.SimpleQueue()
        """An item for each job: what threads wait for."""
        self._announced = False
        self._results: deque[tuple[_Done, Any, Exception | None]] = deque()

    def submit(self, user: Hashable, job: Callable[[], Any], done: _Done) -> None:
        """Do a user's job in a thread; call `done`, in the event loop, with what it gave, or with what it raised.

        Raises RuntimeError where the system lets no thread be started at all.
        """
        if self._threads < self._most and self.busy >= self._threads:
            try:
                # A daemon: an agent ends without what nobody waits for any more.
                threading.Thread(target=self._work, name="keyferry-slow", daemon=True).start()
                self._threads += 1
            except RuntimeError:
                if not self._threads:
                    raise
        self.busy += 1
        with self._turns:
            self._waiting.setdefault(user, deque()).append((job, done, trio.lowlevel.current_trio_token()))
        self._wanted.put(None)

    def _next(self) -> _Job:
        """The job of whoever's turn it is. Threads take it themselves: none stands still until the event loop has time."""
        self._wanted.get()
        with self._turns:
            user = next(iter(self._waiting))
            jobs = self._waiting.pop(user)
            job = jobs.popleft()
            if jobs:
                self._waiting[user] = jobs  # behind all others
        return job

    def _work(self) -> None:
        with suppress(trio.RunFinishedError):
            while True:
                job, done, token = self._next()
                try:
                    self._results.append((done, job(), None))
                except Exception as error:
                    self._results.append((done, None, error))
                del job, done  # and with them what the job holds on to, while there is no other
                if not self._announced:  # to wake the event loop costs a system call, also where it was told before
                    self._announced = True
                    token.run_sync_soon(self._deliver)

    def _deliver(self) -> None:
        self._announced = False  # first: what comes from now on is announced again
        while self._results:
            done, result, error = self._results.popleft()
            self.busy -= 1
            done(result, error)
