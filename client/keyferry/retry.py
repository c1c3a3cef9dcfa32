"""Decides when a call is repeated, without I/O: both clients get the delays from this module, and sleep in their own way.

A client repeats calls only with a `Retry`: `Client(retry=Retry())`. The agent is on the same host, so the program should learn
of a failure immediately. A client that waited by default would delay a probe, a request of a web server, or a caller with its
own policy. (Without a `Retry`, both clients still repeat requests when a restart of the agent broke a connection in use.)
"""

import os
from collections.abc import Callable, Iterable
from typing import Final

from .errors import KeyferryError, Throttled
from .protocol.rpc import PendingCall, seconds

__all__ = ["Attempts", "Retry"]

_MAX_DOUBLINGS: Final = 32


def _random() -> float:
    """Return a random number from 0 to below 1. (The module `random` takes longer to import than this package.)"""
    return int.from_bytes(os.urandom(4), "big") / 2**32


class Retry:
    """Repeats calls whose failure is `retryable`: exponential backoff with full jitter, bounded in seconds.

    The delay before the n-th repeat is chosen evenly from 0 to `first` · 2ⁿ⁻¹ seconds, at most `longest`; after a `Throttled`,
    its `retry_after` comes on top. No repeat begins later than `within` seconds after the first failure, nor after the
    client's `timeout`, which bounds the whole call with its repeats. Then the last failure is raised.

    `random` returns a number from 0 to below 1; tests replace it.
    """

    def __init__(
        self,
        *,
        within: float = 10.0,
        first: float = 0.05,
        longest: float = 2.0,
        random: Callable[[], float] = _random,
    ) -> None:
        self.within = seconds(within)
        self.first = seconds(first)
        self.longest = seconds(longest)
        self.random = random

    def __repr__(self) -> str:
        return f"Retry(within={self.within:g}, first={self.first:g}, longest={self.longest:g})"


class Attempts:
    """The attempts of one call. Without a `Retry`, the first is the only one.

    `now` is the time of a monotonic clock, and `remaining` what is left of the client's timeout, both in seconds.
    """

    def __init__(self, retry: Retry | None) -> None:
        self._retry = retry
        self._failures = 0
        self._deadline = 0.0

    def after_failure(self, error: KeyferryError, now: float, remaining: float) -> float | None:
        """Return the seconds to wait before the next attempt, or None if the call has failed with the error."""
        return self._delay([error], now, remaining) if error.retryable else None

    def after_answers(self, calls: Iterable[PendingCall], now: float, remaining: float) -> float | None:
        """Return the seconds to wait before refused calls are repeated, or None if all outcomes are final.

        Calls to be repeated are marked as not answered.
        """
        if self._retry is None:
            return None
        refusals = [
            (call.pending, error) for call in calls if (error := call.refusal()) is not None and error.retryable
        ]
        delay = self._delay([error for _, error in refusals], now, remaining) if refusals else None
        if delay is not None:
            for response, _ in refusals:
                response.response = None
        return delay

    def _delay(self, errors: Iterable[KeyferryError], now: float, remaining: float) -> float | None:
        retry = self._retry
        if retry is None:
            return None
        if not self._failures:
            self._deadline = now + retry.within
        ceiling = min(retry.longest, retry.first * 2 ** min(self._failures, _MAX_DOUBLINGS))
        self._failures += 1
        minimum = max(error.retry_after if isinstance(error, Throttled) else 0.0 for error in errors)
        delay = minimum + ceiling * retry.random()
        return delay if delay < remaining and now + delay <= self._deadline else None
