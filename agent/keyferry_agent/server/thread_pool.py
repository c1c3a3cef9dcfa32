"""Threads for slow jobs, whose results come back to the event loop: several at a time, where several are done.

A trio thread costs 120 microseconds for each job, and each result a turn of the loop of its own. These cost 30, and what is
done together is recorded and answered together.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, Final, TypeAlias

import trio

__all__ = ["FairThreadPool"]

_Job: TypeAlias = tuple[Callable[[], Any], "_Done", trio.lowlevel.TrioToken]
_Done: TypeAlias = Callable[[Any, Exception | None], None]

_HANDED: Final = 4
"""Jobs in the hands of each thread, the one that it does included."""


class FairThreadPool:
    """At most `most` threads, made when there is something to do; who waits for them is served in turn. For one event loop."""

    def __init__(self, most: int) -> None:
        self.busy = 0
        """Jobs that were taken and have not come back."""
        self._most = most
        self._threads = 0
        self._waiting: dict[Hashable, deque[_Job]] = {}
        """By whose they are; whose turn is next is first."""
        self._handed = 0
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
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
        self._waiting.setdefault(user, deque()).append((job, done, trio.lowlevel.current_trio_token()))
        self._hand_over()

    def _hand_over(self) -> None:
        # So many that no thread waits for the event loop; and no more, since what is handed over cannot be overtaken any more,
        # and the event loop answers all that is done before it does anything else.
        while self._waiting and self._handed < _HANDED * self._most:
            user = next(iter(self._waiting))
            jobs = self._waiting.pop(user)
            self._handed += 1
            self._jobs.put(jobs.popleft())
            if jobs:
                self._waiting[user] = jobs  # behind all others

    def _work(self) -> None:
        with suppress(trio.RunFinishedError):
            while True:
                job, done, token = self._jobs.get()
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
            self._handed -= 1
            done(result, error)
        self._hand_over()
