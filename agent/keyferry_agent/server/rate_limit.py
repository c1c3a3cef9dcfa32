"""Limits the requests of each user per second."""

from typing import Final

__all__ = ["Rate"]

_MAX_USERS: Final = 4_096
"""Users to remember at most. Past that, users with a full allowance are forgotten, then those seen longest ago."""


class Rate:
    """A token bucket per user or access key: `per_second` requests, and as many at once after a second without requests.

    0 means no limit.
    """

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._buckets: dict[int | str | None, tuple[float, float]] = {}  # user -> (requests left, when that was)

    @property
    def unlimited(self) -> bool:
        """Whether requests are unlimited."""
        return not self._per_second

    def allows(self, user: int | str | None, now: float, count: int = 1) -> bool:
        """Take `count` from the user's allowance. Return False, and take nothing, if fewer are left.

        `now` is in seconds of a monotonic clock.
        """
        if not self._per_second or not count:
            return True
        tokens, last_time = self._buckets.get(user, (float(self._per_second), now))
        tokens = min(self._per_second, tokens + (now - last_time) * self._per_second)
        if len(self._buckets) >= _MAX_USERS and user not in self._buckets:
            self._forget(now)
        is_allowed = tokens >= count
        self._buckets[user] = (tokens - count if is_allowed else tokens, now)
        return is_allowed

    def _forget(self, now: float) -> None:
        buckets = {
            u: (n, t) for u, (n, t) in self._buckets.items() if n + (now - t) * self._per_second < self._per_second
        }
        if len(buckets) >= _MAX_USERS:
            # Keep the users that were seen last.
            buckets = dict(sorted(buckets.items(), key=lambda bucket: bucket[1][1])[_MAX_USERS // 2 :])
        self._buckets = buckets
