"""A thread for what may hang: a file system, or the reader of a pipe. Whoever asks waits for a bounded time."""

import errno
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

__all__ = ["PATIENCE", "Hand"]

PATIENCE: Final = 2.0
"""Seconds to wait: once. Until what was asked for is done, nobody else waits at all."""

T = TypeVar("T")


class Hand:
    """Does one thing at a time, in a thread of its own, for one other thread.

    A trio thread would answer through the event loop, which costs more than a write; this one is waited for. What nobody
    waited for any more is still done, to its end, before anything else is.
    """

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._late = False
        self._asked_at = 0.0
        self._took = 0.0
        # A daemon: an agent ends, even if its disk does not answer any more.
        threading.Thread(target=self._work, name="keyferry-audit", daemon=True).start()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` gives, or raises; OSError (ETIMEDOUT) if it is not done in time, or something before it is not."""
        if self._late:
            if self._done.empty():
                raise _timed_out()
            self._done.get()
            self._late = False
        self._asked_at = time.monotonic()
        self._asked.put((function, arguments))
        try:
            result, error = self._done.get(timeout=PATIENCE)
        except queue.Empty:
            self._late = True
            raise _timed_out() from None
        self._took = time.monotonic() - self._asked_at
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    @property
    def lag(self) -> float:
        """Seconds that the last thing took, or that one has taken for which nobody waits any more."""
        return time.monotonic() - self._asked_at if self._late else self._took

    def _work(self) -> None:
        while True:
            function, arguments = self._asked.get()
            try:
                self._done.put((function(*arguments), None))
            except BaseException as error:
                self._done.put((None, error))
            del function, arguments


def _timed_out() -> OSError:
    return OSError(errno.ETIMEDOUT, "the record's file does not answer")
