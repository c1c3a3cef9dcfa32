"""A thread for what may hang: a file system, or the reader of a pipe. Whoever asks waits for a bounded time."""

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
"""Seconds to wait: once. Until what was asked for is done, nobody else waits at all."""

T = TypeVar("T")


class Wakeup:
    """Wakes the thread that waits for it, while nobody has Python's lock: whoever wakes goes on at once.

    A lock or a queue of Python's wakes a thread that has to wait for that lock then: six switches of threads for two.
    """

    def __init__(self) -> None:
        """Raises OSError where there is no descriptor left."""
        self._event = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._event, select.POLLIN)

    def ring(self) -> None:
        """Wake who waits, or who waits next."""
        os.eventfd_write(self._event, 1)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for it, for so many seconds at most; False when it was not rung."""
        if seconds is not None and not self._poll.poll(max(0, math.ceil(seconds * 1_000))):
            return False
        while True:  # a signal, which any thread may get, interrupts this call, and Python does not repeat it
            try:
                os.eventfd_read(self._event)
                return True
            except InterruptedError:
                continue


class WriterThread:
    """Does one thing at a time, in a thread of its own, for one other thread.

    A trio thread would answer through the event loop, which costs more than a write; this one is waited for. What nobody
    waited for any more is still done, to its end, before anything else is.
    """

    def __init__(self) -> None:
        self._asked: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._done: deque[tuple[Any, BaseException | None]] = deque()
        self._begin, self._end = Wakeup(), Wakeup()
        self._waited_for = False
        self._late = False
        self._asked_at = 0.0
        self._took = 0.0
        # A daemon: an agent ends, even if its disk does not answer any more.
        self.thread = threading.Thread(target=self._work, name="keyferry-audit", daemon=True)
        self.thread.start()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` gives, or raises; OSError (ETIMEDOUT) if it is not done in time, or something before it is not."""
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
        """Wait until it is done; False when it takes too long."""
        self._waited_for = True
        try:
            while not self._done:  # whoever rang may have meant what nobody waited for any more
                if not self._end.wait(self._asked_at + PATIENCE - time.monotonic()):
                    break
            return bool(self._done)
        finally:
            self._waited_for = False

    @property
    def lag(self) -> float:
        """Seconds that the last thing took, or that one has taken for which nobody waits any more."""
        return time.monotonic() - self._asked_at if self._late else self._took

    def finish(self, function: Callable[[], None]) -> None:
        """Call `function` as the last one: in the thread, and without waiting, if the thread is still busy."""
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
