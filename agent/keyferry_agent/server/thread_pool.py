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
    """A pool of at most `max_threads` threads, started on demand, that serves users round-robin. For one event loop."""

    def __init__(self, max_threads: int) -> None:
        self.busy = 0
        """Jobs that were submitted and whose results were not delivered yet."""
        self._max_threads = max_threads
        self._threads = 0
        self._queued_by_user: dict[Hashable, deque[_Job]] = {}
        """Jobs to hand to threads, by user. The next user to serve comes first."""
        self._dispatched = 0
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._wakeup_pending = False
        self._results: deque[tuple[_Done, Any, Exception | None]] = deque()

    def submit(self, user: Hashable, job: Callable[[], Any], on_done: _Done) -> None:
        """Run a user's job in a thread, and call `on_done` in the event loop with the job's result or its exception.

        Raises RuntimeError if the pool has no thread and the system cannot start one.
        """
        if self._threads < self._max_threads and self.busy >= self._threads:
            try:
                # daemon: the agent's exit does not wait for abandoned jobs.
                threading.Thread(target=self._run_jobs, name="keyferry-slow", daemon=True).start()
                self._threads += 1
            except RuntimeError:
                if not self._threads:
                    raise
        self.busy += 1
        self._queued_by_user.setdefault(user, deque()).append((job, on_done, trio.lowlevel.current_trio_token()))
        self._dispatch()

    def _dispatch(self) -> None:
        # Hand over enough jobs that no thread waits for the event loop. Hand over no more: another user's job cannot overtake
        # these, and the event loop answers all finished jobs before it does anything else.
        while self._queued_by_user and self._dispatched < QUEUE_DEPTH_PER_THREAD * self._max_threads:
            user = next(iter(self._queued_by_user))
            jobs = self._queued_by_user.pop(user)
            self._dispatched += 1
            self._jobs.put(jobs.popleft())
            if jobs:
                self._queued_by_user[user] = jobs  # after all other users

    def _run_jobs(self) -> None:
        with suppress(trio.RunFinishedError):
            while True:
                job, on_done, token = self._jobs.get()
                try:
                    self._results.append((on_done, job(), None))
                except Exception as error:
                    self._results.append((on_done, None, error))
                del job, on_done  # free the objects that the job refers to, before waiting for the next job
                # Each wake-up of the event loop costs a system call, also a superfluous one.
                if not self._wakeup_pending:
                    self._wakeup_pending = True
                    token.run_sync_soon(self._deliver)

    def _deliver(self) -> None:
        self._wakeup_pending = False  # cleared first: later results wake the event loop again
        while self._results:
            on_done, result, error = self._results.popleft()
            self.busy -= 1
            self._dispatched -= 1
            on_done(result, error)
        self._dispatch()
