"""Nonces of signed requests: a request that was served once is refused when it is sent again. Bounded, without I/O.

A nonce is remembered until its timestamp is outside of the clock's window. If too many are remembered, the oldest second is
forgotten and becomes the floor: requests that were signed in it or before are refused as expired. So no replay is served, and
only the time narrows in which a request may arrive.
"""

import hashlib
import os
from typing import Final

__all__ = ["Nonces", "Verdict"]

_HASH_BYTES: Final = 8
START_MARGIN_SECONDS: Final = 5
"""Seconds before the agent's start at which the first floor is: a request recorded before a restart is refused after it."""


class Verdict:
    """The result of `Nonces.use`."""

    FRESH: Final = "fresh"
    USED: Final = "used"
    EXPIRED: Final = "expired"


class _OfKey:
    """The nonces of one access key."""

    __slots__ = ("floor", "purged_at", "second_of", "seconds")

    def __init__(self, floor: int) -> None:
        self.floor = floor
        self.purged_at = 0
        self.second_of: dict[int, int] = {}
        self.seconds: dict[int, list[int]] = {}

    def purge(self, oldest: int) -> None:
        """Forget all seconds before `oldest`. Looks for them once a second."""
        if oldest > self.purged_at:
            self.purged_at = oldest
            for second in [second for second in self.seconds if second < oldest]:
                self.forget(second)

    def forget(self, second: int) -> None:
        """Forget the nonces of one second."""
        for nonce in self.seconds.pop(second):
            del self.second_of[nonce]


class Nonces:
    """Remembers nonces by access key, at most `max_nonces` of each. `skew`: seconds by which clocks may differ."""

    def __init__(self, started_at: float, skew: int, max_nonces: int) -> None:
        self._floor = int(started_at) - START_MARGIN_SECONDS
        self._skew = skew
        self._max = max_nonces
        self._secret = os.urandom(16)
        """Keys the hash: a caller cannot choose nonces that collide."""
        self._of_key: dict[str, _OfKey] = {}

    def use(self, access_key_id: str, nonce: str, signed_at: int, now: float) -> str:
        """Remember the nonce of a request whose signature was verified, and return a `Verdict`.

        `signed_at`: the request's timestamp in whole seconds. `now`: the time. Both are seconds since 1970.
        """
        nonces = self._of_key.setdefault(access_key_id, _OfKey(self._floor))
        nonces.purge(int(now) - self._skew)
        if abs(now - signed_at) > self._skew or signed_at <= nonces.floor:
            return Verdict.EXPIRED
        digest = hashlib.blake2b(nonce.encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES, key=self._secret)
        number = int.from_bytes(digest.digest(), "big")
        if number in nonces.second_of:
            return Verdict.USED
        while len(nonces.second_of) >= self._max:
            nonces.floor = max(nonces.floor, min(nonces.seconds))
            nonces.forget(min(nonces.seconds))
        if signed_at <= nonces.floor:  # its own second was the oldest
            return Verdict.EXPIRED
        nonces.second_of[number] = signed_at
        nonces.seconds.setdefault(signed_at, []).append(number)
        return Verdict.FRESH
