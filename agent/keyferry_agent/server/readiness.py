"""Who sends next: whoever asks one thing at a time is waited for a moment, without a turn of the whole event loop.

A turn of trio's loop takes longer than all the work on a request. So the connection that was just answered looks first whether
its client asks on: in system calls that end at once when any other connection has something, and in a moment anyhow.
"""

import math
import os
import select
import time
from contextlib import suppress
from typing import Final

__all__ = ["ReadinessPoller"]

_AWAKE: Final = 0.0001
"""Seconds to look for the next request again and again: longer than most clients take. A processor that slept takes half as
long as a client to be back, and finds little in its caches."""
_MOMENT: Final = 0.0002
"""Seconds to sleep for it then: a client in Python needs as long between two. Whatever else there is waits as long."""

_SKIP: Final = 8
"""Answers after which nobody is waited for, where the last wait was in vain."""
_SKIP_CROWD: Final = 64
"""And where there was somebody else."""

_CROWD: Final = 0.02
"""Seconds for which a crowd is one, after somebody had to wait."""


class ReadinessPoller:
    """All connections' sockets, and those that are listened on, as one descriptor."""

    def __init__(self) -> None:
        """Raises OSError where there is no descriptor left."""
        self._poll = select.epoll()
        self._descriptor = self._poll.fileno()
        self._skipped = 0
        self._crowd_at = -math.inf

    def add(self, number: int) -> None:
        """Look at a socket, by its descriptor's number. Raises OSError."""
        self._poll.register(number, select.EPOLLIN)

    def forget(self, number: int) -> None:
        """Look at it no more. Before it is closed: who has inherited it keeps it here, by a number that is another's then."""
        with suppress(OSError):  # it was not there
            self._poll.unregister(number)

    def close(self) -> None:
        """Look at nothing any more."""
        self._poll.close()

    def poll_for_next_request(self, connection: int) -> bool:
        """Whether this connection sends something now, or in a moment, and no other has."""
        if self._skipped:
            self._skipped -= 1
            return False
        sent = self._poll.poll(0, 2) or self._soon()
        if not sent:
            self._skipped = _SKIP
            return False
        if len(sent) == 1 and sent[0][0] == connection:
            return True
        self._skipped = _SKIP_CROWD
        return False

    def _soon(self) -> list[tuple[int, int]]:
        until = time.monotonic() + _AWAKE
        while time.monotonic() < until:
            os.sched_yield()  # who asks may be on this very processor
            if sent := self._poll.poll(0, 2):
                return sent
        select.select([self._descriptor], (), (), _MOMENT)
        return self._poll.poll(0, 2)

    def others_readable(self, connection: int) -> bool:
        """Whether a connection other than this has sent something that was not read yet."""
        waiting = any(each != connection for each, _ in self._poll.poll(0, 2))
        if waiting:
            self._crowd_at = time.monotonic()
        return waiting

    def contended(self) -> bool:
        """Whether connections had to wait for each other a moment ago."""
        return time.monotonic() - self._crowd_at < _CROWD
