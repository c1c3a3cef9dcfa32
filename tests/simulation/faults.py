"""The points where the agent calls the outside world, and their possible faults. A seed chooses faults and times."""

import errno
import random
from collections import Counter
from typing import Final

__all__ = ["DIES", "HANGS", "NO_THREAD", "POINTS", "SHORT", "STOPS", "FaultPlan"]

SHORT: Final = -1
"""Only a part is taken."""
HANGS: Final = -2
"""The call hangs until the simulated operator releases it."""
NO_THREAD: Final = -3
"""A thread cannot be started."""
DIES: Final = -4
"""The process at the other end ends in this very moment: the connection is cancelled."""
STOPS: Final = -5
"""The agent is told to stop, twice, in this very moment: everything is cancelled."""
DAMAGED: Final = -6
"""A keyring that does not open."""
NO_MEMORY: Final = -7
"""Locked memory cannot be had."""

_OUT_OF: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

POINTS: Final[dict[str, tuple[int, ...]]] = {
    # connections
    "accept": (*_OUT_OF, errno.ENOBUFS, errno.ECONNABORTED, STOPS),
    "ask who it is": (errno.ENOMEM, errno.ENOTCONN),
    "hold the process": (errno.EMFILE, errno.ESRCH),
    "receive": (errno.ECONNRESET, errno.EIO, errno.ENOMEM, DIES, STOPS),
    "send": (errno.EAGAIN, SHORT, SHORT, errno.EPIPE, errno.ECONNRESET, errno.ENOBUFS, DIES, STOPS),
    "send the rest": (errno.EAGAIN, SHORT, SHORT, errno.EPIPE, errno.ECONNRESET, errno.ENOMEM, DIES, STOPS),
    "say the end": (errno.ENOTCONN,),
    "read the rest": (errno.ECONNRESET, errno.EIO),
    # the record of requests
    "open the record": (*_OUT_OF, errno.EACCES, errno.ENOSPC, errno.EIO, HANGS),
    "see what the record is": (errno.EIO,),
    "read the record's end": (errno.EIO, errno.ENOMEM),
    "write the record": (errno.ENOSPC, errno.EIO, errno.EDQUOT, SHORT, SHORT, HANGS),
    "take back": (errno.EIO, errno.EIO, HANGS),
    "close the record": (errno.EIO,),
    # files that are replaced
    "look": (errno.EACCES, errno.EIO, errno.ENOENT),
    "read the configuration": (*_OUT_OF, errno.EACCES, errno.EIO),
    "load the keyring": (*_OUT_OF, errno.EAGAIN, DAMAGED, NO_MEMORY),
    # the rest of the system
    "thread": (NO_THREAD,),
    "tell the manager": (errno.EAGAIN, errno.ECONNREFUSED, errno.EMFILE),
    "keep a reserve": _OUT_OF,
    "open the folder": _OUT_OF,
    "set the mode": (errno.EPERM, errno.EIO),
    "remove the socket": (errno.EIO, errno.EACCES),
}
"""Each point, and what can happen there: an errno, or one of the above."""


_WHILE_IT_SERVES: Final = [
    point
    for point in POINTS
    if point not in ("keep a reserve", "open the folder", "set the mode", "read the record's end")
]

_OFTEN: Final = ["receive", "send", "send", "send the rest", "write the record", "write the record", "write the record"]


class FaultPlan:
    """The faults of one simulation: none; one or a few in exact places; or random ones at a rate."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._crossed: Counter[str] = Counter()
        self._planned: dict[tuple[str, int], int] = {}
        self._rate = 0.0
        self.injected: Counter[str] = Counter()
        """The number of injected faults, by point."""
        self.started = rng.random() < 0.15
        """Whether the agent serves; in some simulations things go wrong before, too."""
        kind = rng.random()
        if kind < 0.15:
            self.kind = "calm"
        elif kind < 0.6:
            self.kind = "placed"
            for _ in range(rng.choice((1, 1, 2, 3))):
                point = rng.choice([*POINTS] if self.started else _WHILE_IT_SERVES + _OFTEN)
                first = rng.choice((1, 1, 2, 3, 5, 8, 13, 21))
                fault = rng.choice(POINTS[point])
                for again in range(rng.choice((1, 1, 2, 4))):
                    self._planned[point, first + again] = fault
        else:
            self.kind = "noisy"
            self._rate = rng.choice((0.004, 0.02, 0.1))
        self.over = False
        self.hangs = HANGS in self._planned.values() or (self._rate > 0 and rng.random() < 0.25)
        """Whether anything can hang."""

    def next_fault(self, point: str) -> int:
        """Return the fault of this call at this point; 0 for none."""
        if self.over or not self.started:
            return 0
        self._crossed[point] += 1
        fault = self._planned.get((point, self._crossed[point]), 0)
        if not fault and self._rate and self._rng.random() < self._rate:
            fault = self._rng.choice(POINTS[point])
            if fault == HANGS and not self.hangs:
                fault = 0
        if fault:
            self.injected[point] += 1
        return fault
