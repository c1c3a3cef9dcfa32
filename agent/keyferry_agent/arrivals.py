"""Who sends next: whoever asks one thing at a time is waited for a moment, without a turn of the whole event loop.

A turn of trio's loop takes longer than all the work on a request. So the connection that was just answered looks first whether
its client asks on: in one system call, which ends at once when any other connection has something, and in a moment anyhow.
"""

import select
from typing import Final

__all__ = ["Arrivals"]

_MOMENT: Final = 0.0002
"""Seconds to wait for the next request: a client in Python needs as long between two. Whatever else there is waits as long."""

_SKIP: Final = 8
"""Answers after which nobody is waited for, where the last wait was in vain."""
_SKIP_CROWD: Final = 64
"""And where there was somebody else."""


class Arrivals:
    """All connections' sockets, as one descriptor."""

    def __init__(self) -> None:
        """Raises OSError where there is no descriptor left."""
        self._poll = select.epoll()
        self._descriptor = self._poll.fileno()
        self._skipped = 0

    def add(self, connection: int) -> None:
        """Look at a connection, by its descriptor, until it is closed. Raises OSError."""
        self._poll.register(connection, select.EPOLLIN)

    def close(self) -> None:
        """Look at nothing any more."""
        self._poll.close()

    def next_is(self, connection: int) -> bool:
        """Whether this connection sends something now, or in a moment, and no other has."""
        if self._skipped:
            self._skipped -= 1
            return False
        if not select.select([self._descriptor], (), (), _MOMENT)[0]:
            self._skipped = _SKIP
            return False
        if [each for each, _ in self._poll.poll(0, 2)] == [connection]:
            return True
        self._skipped = _SKIP_CROWD
        return False

    def others_wait(self, connection: int) -> bool:
        """Whether a connection other than this has sent something that was not read yet."""
        return any(each != connection for each, _ in self._poll.poll(0, 2))
