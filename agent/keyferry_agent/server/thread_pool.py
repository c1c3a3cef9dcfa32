"""Threads for offloaded jobs. Results that are ready together return to the event loop together.

`trio.to_thread` costs 120 microseconds for each job, and one iteration of the event loop for each result. This pool costs 30
microseconds, and jobs that finish together are audited and answered together.
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

QUEUE_DEPTH_PER_THREAD: Final = 4
"""Jobs handed to each thread, including the one that it runs."""


class FairThreadPool:
    """A pool of at most `most` threads, started on demand, that serves users round-robin. For one event loop."""

    def __init__(self, most: int) -> None:
        self.busy = 0
        """Jobs that were submitted and whose results were not delivered yet."""
        self._most = most
        self._threads = 0
        self._waiting: dict[Hashable, deque[_Job]] = {}
        """Jobs to hand to threads, by user. The next user to serve comes first."""
        self._handed = 0
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._announced = False
        self._results: deque[tuple[_Done, Any, Exception | None]] = deque()

    def submit(self, user: Hashable, job: Callable[[], Any], done: _Done) -> None:
        """Run a user's job in a thread, and call `done` in the event loop with the job's result or its exception.

        Raises RuntimeError if the pool has no thread and the system cannot start one.
        """
        if self._threads < self._most and self.busy >= self._threads:
            try:
                # daemon: the agent's exit does not wait for abandoned jobs.
                threading.Thread(target=self._work, name="keyferry-slow", daemon=True).start()
                self._threads += 1
            except RuntimeError:
                if not self._threads:
                    raise
        self.busy += 1
        self._waiting.setdefault(user, deque()).append((job, done, trio.lowlevel.current_trio_token()))
        self._hand_over()

    def _hand_over(self) -> None:
        # Hand over enough jobs that no thread waits for the event loop. Hand over no more: another user's job cannot overtake
        # these, and the event loop answers all finished jobs before it does anything else.
        while self._waiting and self._handed < QUEUE_DEPTH_PER_THREAD * self._most:
            user = next(iter(self._waiting))
            jobs = self._waiting.pop(user)
            self._handed += 1
            self._jobs.put(jobs.popleft())
            if jobs:
                self._waiting[user] = jobs  # after all other users

    def _work(self) -> None:
        with suppress(trio.RunFinishedError):
            while True:
                job, done, token = self._jobs.get()
                try:
                    self._results.append((done, job(), None))
                except Exception as error:
                    self._results.append((done, None, error))
                del job, done  # free the objects that the job refers to, before waiting for the next job
                if not self._announced:  # each wake-up of the event loop costs a system call, also a superfluous one
                    self._announced = True
                    token.run_sync_soon(self._deliver)

    def _deliver(self) -> None:
        self._announced = False  # cleared first: later results wake the event loop again
        while self._results:
            done, result, error = self._results.popleft()
            self.busy -= 1
            self._handed -= 1
            done(result, error)
        self._hand_over()
