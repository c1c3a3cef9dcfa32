"""Requests that were asked before: what is equal to one, byte for byte behind its message ID, is decided as it was.

Most of what an application asks it has asked before: the same key, context and module, every time. To decide that once, and
look it up afterwards, takes an eighth of the time. What is remembered is of one kind of caller, under one configuration and
keyring; what can change beside these (a key's dates, a quota) is judged each time all the same.
"""

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

__all__ = ["DecisionCache"]

_ROOM: Final = 40 * 2**20
"""Bytes of memory for all that is remembered: some 16,000 requests."""
_EACH: Final = 2_000
"""Bytes that one takes besides its own, as measured: what is to be done, and what is recorded of it."""
_LONGEST: Final = 4_096
"""Bytes of a request to remember."""
_ONCE: Final = 16_384
"""Requests of which is known, by their hash, that they were seen: only what comes again is remembered."""

T = TypeVar("T")


class DecisionCache(Generic[T]):
    """What was decided, by whom it is for and the request's bytes. When it is full, it begins anew."""

    __slots__ = ("_known", "_once", "_room")

    def __init__(self) -> None:
        self._known: dict[tuple[Hashable, bytes], T] = {}
        self._once: set[int] = set()
        self._room = _ROOM

    def __len__(self) -> int:
        return len(self._known)

    def recall(self, who: Hashable, request: bytes) -> T | None:
        """What was remembered of a request; None where nothing was."""
        return self._known.get((who, request))

    def remember(self, who: Hashable, request: bytes, decided: T) -> None:
        """Note what was decided: for good, if it was noted before."""
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

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
        self._once.clear()
        self._room = _ROOM
