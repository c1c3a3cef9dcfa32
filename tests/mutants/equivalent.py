"""Faults that no test can notice, or that no test has to: `make mutants` does not plant them."""

from typing import Final

from .modules import AGENT

_ONLY_SLOWER: Final = (
    "users whose allowance is full again are forgotten more often: they have nothing to be remembered for"
)

EQUIVALENT: Final = {
    (
        f"{AGENT}/authz/grants.py",
        "if self._free_bytes < 0:",
        "if self._free_bytes < -1:",
    ): "all sizes are multiples of 4, so the number is never -1",
    (
        f"{AGENT}/server/rate_limit.py",
        "if len(self._buckets) >= _MAX_USERS and user not in self._buckets:",
        "if len(self._buckets) <= _MAX_USERS and user not in self._buckets:",
    ): _ONLY_SLOWER,
    (
        f"{AGENT}/server/rate_limit.py",
        "if len(self._buckets) >= _MAX_USERS and user not in self._buckets:",
        "if len(self._buckets) >= _MAX_USERS or user not in self._buckets:",
    ): _ONLY_SLOWER,
    (
        f"{AGENT}/server/rate_limit.py",
        "if len(self._buckets) >= _MAX_USERS and user not in self._buckets:",
        "if len(self._buckets) == _MAX_USERS and user not in self._buckets:",
    ): "users are added one at a time",
    (
        f"{AGENT}/authz/decision_cache.py",
        "_ENTRY_OVERHEAD_BYTES: Final = 2_000",
        "_ENTRY_OVERHEAD_BYTES: Final = 1999",
    ): "an estimate of memory; tests hold the bound to some 10 %",
}
"""Reasons, by the module, its line, and the line with the fault. A changed line needs a new judgement."""
