"""Cache of authorization decisions, keyed by the caller's grants and a request's bytes after the message ID.

Most requests of an application repeat an earlier one, with the same key, EncryptionContext and cryptographic module. A cache
hit takes an eighth of the time of a decision. An entry is valid for callers with the same grants, under one configuration and
one keyring. Conditions that change without these (a key's dates, a quota) are checked for every request.
"""

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

__all__ = ["DecisionCache"]

_ROOM: Final = 40 * 2**20
"""Memory of the cache in bytes: some 16,000 requests."""
_EACH: Final = 2_000
"""Measured bytes of an entry besides the request's: the decision, with its job and its audit fields."""
_LONGEST: Final = 4_096
"""Size limit of a cached request, in bytes."""
_ONCE: Final = 16_384
"""Size limit of the set of hashes that were seen once. A request is cached at its second occurrence."""

T = TypeVar("T")


class DecisionCache(Generic[T]):
    """Maps callers and requests to decisions. A full cache is emptied before the next entry is added."""

    __slots__ = ("_known", "_once", "_room")

    def __init__(self) -> None:
        self._known: dict[tuple[Hashable, bytes], T] = {}
        self._once: set[int] = set()
        self._room = _ROOM

    def __len__(self) -> int:
        return len(self._known)

    def recall(self, who: Hashable, request: bytes) -> T | None:
        """Return the cached decision about a request, or None."""
        return self._known.get((who, request))

    def remember(self, who: Hashable, request: bytes, decided: T) -> None:
        """Cache a decision, if its request was seen before; else only note the request's hash."""
        if len(request) > _LONGEST:
            return
        key = who, request
        seen = hash(key)
        if seen not in self._once:
            if len(self._once) >= _ONCE:
                self._once.clear()
            self._once.add(seen)
            return
        self._room -= len(request) + _EACH
        if self._room < 0:
            self._known.clear()
            self._room = _ROOM
        self._known[key] = decided
