"""Runs calls that may hang, on a file system or a pipe, in a thread. The caller waits for a bounded time."""

import errno
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeAlias, TypeVar

__all__ = ["WRITE_TIMEOUT_SECONDS", "WriterThread"]

WRITE_TIMEOUT_SECONDS: Final = 2.0
"""Time limit of a call. After a timeout, later calls fail at once until the late call has finished."""

T = TypeVar("T")
_Call: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]
_Outcome: TypeAlias = tuple[Any, BaseException | None]


class WriterThread:
    """Runs one call at a time in a thread of its own, for one calling thread.

    `trio.to_thread` would return the result through the event loop, which costs more than a write. Here the caller blocks
    instead. A call that timed out still runs to completion before the next one starts.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        self._outcomes: SimpleQueue[_Outcome] = SimpleQueue()
        self._late = False
        self._called_at = 0.0
        self._seconds = 0.0
        # daemon: the agent can exit even if its disk has stopped responding.
        self.thread = threading.Thread(target=self._work, name="keyferry-audit", daemon=True)
        self.thread.start()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return the result of `function`, or raise its exception. Blocks for `WRITE_TIMEOUT_SECONDS` at most.

        Raises OSError (ETIMEDOUT) if this call does not finish in time, and at once if an earlier call still runs.
        """
        if self._late:
            self._outcome(0)  # of the late call, whose caller has given up
            self._late = False
        self._called_at = time.monotonic()
        self._calls.put((function, arguments))
        result, error = self._outcome(WRITE_TIMEOUT_SECONDS)
        self._seconds = time.monotonic() - self._called_at
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def _outcome(self, seconds: float) -> _Outcome:
        try:
            return self._outcomes.get(timeout=seconds)
        except Empty:
            self._late = True
            raise OSError(errno.ETIMEDOUT, "the audit log's file does not answer") from None

    @property
    def lag(self) -> float:
        """Seconds that the last call took, or that a late call has taken so far."""
        return time.monotonic() - self._called_at if self._late else self._seconds

    def finish(self, function: Callable[[], None]) -> None:
        """Call `function` after all earlier calls. If a late call still runs, the thread calls it later; this does not wait."""
        if self._late and self._outcomes.empty():
            self._calls.put((function, ()))
        else:
            function()

    def _work(self) -> None:
        while True:
            function, arguments = self._calls.get()
            try:
                self._outcomes.put((function(*arguments), None))
            except BaseException as error:
                self._outcomes.put((None, error))
            del function, arguments
