"""Limits the audit entries of requests without a verified signature: strangers must not fill the disk."""

from typing import Final

__all__ = ["ENTRIES_PER_SECOND", "Sample"]

ENTRIES_PER_SECOND: Final = 10


class Sample:
    """Chooses the first `ENTRIES_PER_SECOND` requests of each second, and counts the others."""

    def __init__(self) -> None:
        self.omitted = 0
        """Requests since the last `settle` that got no entry of their own."""
        self._second = 0
        self._taken = 0

    def takes(self, now: float) -> bool:
        """Return whether a request gets an audit entry. `now`: seconds of a monotonic clock."""
        if int(now) != self._second:
            self._second, self._taken = int(now), 0
        if self._taken < ENTRIES_PER_SECOND:
            self._taken += 1
            return True
        self.omitted += 1
        return False

    def settle(self) -> int:
        """Return the number of omitted requests, and begin to count anew."""
        omitted, self.omitted = self.omitted, 0
        return omitted
