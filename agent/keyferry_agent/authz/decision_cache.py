"""Cache of authorization decisions, keyed by the caller's grants and a request's bytes after the message ID.

Most requests of an application repeat an earlier one, with the same key, EncryptionContext and cryptographic module. A cache
hit takes an eighth of the time of a decision. An entry is valid for callers with the same grants, under one configuration and
one keyring. Conditions that change without these (a key's dates, a quota) are checked for every request.
"""

from typing import Final, Generic, TypeVar

from .grants import CallerGrants

__all__ = ["DecisionCache"]

_MAX_BYTES: Final = 40 * 2**20
"""Memory of the cache: some 16,000 requests."""
_ENTRY_OVERHEAD_BYTES: Final = 2_000
"""Measured bytes of an entry besides the request's: the decision, with its job and its audit fields."""
_MAX_REQUEST_BYTES: Final = 4_096
"""Size limit of a cached request."""
_MAX_SEEN_ONCE: Final = 16_384
"""Size limit of the set of hashes that were seen once. A request is cached at its second occurrence."""

Decision = TypeVar("Decision")


class DecisionCache(Generic[Decision]):
    """Maps callers' grants and requests to decisions. A full cache is emptied before the next entry is added."""

    __slots__ = ("_decisions", "_free_bytes", "_seen_once")

    def __init__(self) -> None:
        self._decisions: dict[tuple[CallerGrants, bytes], Decision] = {}
        self._seen_once: set[int] = set()
        self._free_bytes = _MAX_BYTES

    def __len__(self) -> int:
        return len(self._decisions)

    def clear(self) -> None:
        """Forget all decisions, and what they refer to."""
        self._decisions.clear()
        self._seen_once.clear()
        self._free_bytes = _MAX_BYTES

    def get(self, granted: CallerGrants, request: bytes) -> Decision | None:
        """Return the cached decision about a request, or None."""
        return self._decisions.get((granted, request))

    def add(self, granted: CallerGrants, request: bytes, decision: Decision) -> None:
        """Cache a decision, if its request was seen before; else only note the request's hash."""
        if len(request) > _MAX_REQUEST_BYTES:
            return
        key = granted, request
        digest = hash(key)
        if digest not in self._seen_once:
            if len(self._seen_once) >= _MAX_SEEN_ONCE:
                self._seen_once.clear()
            self._seen_once.add(digest)
            return
        self._free_bytes -= len(request) + _ENTRY_OVERHEAD_BYTES
        if self._free_bytes < 0:
            self.clear()
        self._decisions[key] = decision
