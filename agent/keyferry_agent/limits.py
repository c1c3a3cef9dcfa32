"""Quotas: how many requests a user may make in a second."""

from typing import Final

__all__ = ["Rate"]

_FORGET: Final = 4_096
"""Users to remember at most; past that, those whose allowance is full again are forgotten."""


class Rate:
    """A token bucket per user: `per_second` requests, and as many at once after a second of quiet. 0 is no limit."""

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._buckets: dict[int | None, tuple[float, float]] = {}  # user -> (requests left, when that was)

    def allows(self, user: int | None, now: float) -> bool:
        """Take one request from the user's allowance at `now`, in seconds of a steady clock; False if there is none."""
        if not self._per_second:
            return True
        left, since = self._buckets.get(user, (float(self._per_second), now))
        left = min(self._per_second, left + (now - since) * self._per_second)
        if len(self._buckets) >= _FORGET:
            self._buckets = {
                u: (n, t) for u, (n, t) in self._buckets.items() if n + (now - t) * self._per_second < self._per_second
            }
        self._buckets[user] = (left - 1, now) if left >= 1 else (left, now)
        return left >= 1
