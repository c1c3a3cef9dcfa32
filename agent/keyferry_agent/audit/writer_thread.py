"""Runs calls that may hang, on a file system or a pipe, in a thread. The caller waits for a bounded time."""

import errno
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

__all__ = ["PATIENCE", "Wakeup", "WriterThread"]

PATIENCE: Final = 2.0
"""Seconds that a caller waits for a call. After a timeout, later calls fail at once until the late call has finished."""

T = TypeVar("T")


class Wakeup:
    """Wakes one waiting thread through an eventfd. The write releases the GIL, so the woken thread can run at once.

    Python's own locks and queues wake a thread that then has to wait for the GIL: six thread switches instead of two.
    """

    def __init__(self) -> None:
        """Create the eventfd. Raises OSError if the process has no descriptor left."""
        self._event = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._event, select.POLLIN)

    def ring(self) -> None:
        """Wake the waiting thread, or the next thread that waits."""
        os.eventfd_write(self._event, 1)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for `ring`, for `seconds` at most, or without a limit for None. Return False after a timeout."""
        if seconds is not None and not self._poll.poll(max(0, math.ceil(seconds * 1_000))):
            return False
        while True:  # a signal to any thread can interrupt this call, and Python does not repeat it
            try:
                os.eventfd_read(self._event)
                return True
            except InterruptedError:
                continue


class WriterThread:
    """Runs one call at a time in a thread of its own, for one calling thread.

    `trio.to_thread` would return the result through the event loop, which costs more than a write. Here the caller blocks
    instead. A call that timed out still runs to completion before the next one starts.
    """

    def __init__(self) -> None:
        self._asked: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._done: deque[tuple[Any, BaseException | None]] = deque()
        self._begin, self._end = Wakeup(), Wakeup()
        self._waited_for = False
        self._late = False
        self._asked_at = 0.0
        self._took = 0.0
        # daemon: the agent can exit even if its disk has stopped responding.
        self.thread = threading.Thread(target=self._work, name="keyferry-audit", daemon=True)
        self.thread.start()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return the result of `function`, or raise its exception. Blocks for `PATIENCE` seconds at most.

        Raises OSError (ETIMEDOUT) if this call does not finish in time, and at once if an earlier call still runs.
        """
        if self._late:
            if not self._done:
                raise _timed_out()
            self._done.clear()
            self._late = False
        self._asked_at = time.monotonic()
        self._asked.append((function, arguments))
        self._begin.ring()
        if not self._done and not self._wait():
            self._late = True
            raise _timed_out()
        result, error = self._done.popleft()
        self._took = time.monotonic() - self._asked_at
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def _wait(self) -> bool:
        """Wait until the call has finished. Return False after a timeout."""
        self._waited_for = True
        try:
            while not self._done:  # a wake-up may be left over from a call that timed out
                if not self._end.wait(self._asked_at + PATIENCE - time.monotonic()):
                    break
            return bool(self._done)
        finally:
            self._waited_for = False

    @property
    def lag(self) -> float:
        """Seconds that the last call took, or that a late call has taken so far."""
        return time.monotonic() - self._asked_at if self._late else self._took

    def finish(self, function: Callable[[], None]) -> None:
        """Call `function` after all earlier calls. If a late call still runs, the thread calls it later; this does not wait."""
        if self._late and not self._done:
            self._asked.append((function, ()))
            self._begin.ring()
        else:
            function()

    def _work(self) -> None:
        while True:
            self._begin.wait()
            function, arguments = self._asked.popleft()
            try:
                self._done.append((function(*arguments), None))
            except BaseException as error:
                self._done.append((None, error))
            del function, arguments
            if self._waited_for:
                self._end.ring()


def _timed_out() -> OSError:
    return OSError(errno.ETIMEDOUT, "the record's file does not answer")
