"""A process that inspects callers' programs for the agent: `python -m keyferry_agent.peer.inspector`, one thread for each user.

A thread that waits for a file system in user space cannot be ended, not even by SIGKILL, and neither can its process. So it is
not the agent's: this process holds no key, no socket and no lock of the agent's.

Standard input and output are one socket of packets, each with a JSON array. A request: its number, the user, the process, and
whether a hash is asked for. An answer, in any order: the number, and the program or null. The process ends with the socket.
"""

import errno
import json
import os
import signal
import threading
from collections import deque
from typing import Final

from .program import inspect

__all__ = ["main"]

_IDLE_SECONDS: Final = 10.0
"""After which a thread that has nothing to do ends."""
_LONGEST: Final = 4_096
_STACK: Final = 262_144
"""Bytes of a thread's stack: there may be a thousand threads that wait for file systems."""
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What says nothing about a program, but that this process has no room to look: the agent starts another one."""


class _Threads:
    """One thread for each user who has requests."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[int | None, deque[tuple[int, int, bool]]] = {}

    def submit(self, user: int | None, number: int, pid: int, *, hashed: bool) -> None:
        """Have the user's thread inspect a program, after what was asked before."""
        with self._changed:
            if user in self._waiting:
                self._waiting[user].append((number, pid, hashed))
                self._changed.notify_all()
                return
            self._waiting[user] = deque([(number, pid, hashed)])
        try:
            threading.Thread(target=self._work, args=(user, self._waiting[user]), daemon=True).start()
        except RuntimeError:  # no thread is to be had
            del self._waiting[user]
            _answer(number, None)

    def _work(self, user: int | None, requests: deque[tuple[int, int, bool]]) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: requests, _IDLE_SECONDS):
                    del self._waiting[user]
                    return
                number, pid, hashed = requests.popleft()
            try:
                _answer(number, inspect(pid, hashed=hashed))
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    os._exit(1)
                _answer(number, None)


def _answer(number: int, program: object) -> None:
    os.write(1, json.dumps([number, program]).encode())


def main() -> None:
    """Answer requests until the agent has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # those are for the agent, with which this process ends
    threading.stack_size(_STACK)
    threads = _Threads()
    while packet := os.read(0, _LONGEST):
        number, user, pid, hashed = json.loads(packet)
        threads.submit(user, number, pid, hashed=hashed)
    os._exit(0)


if __name__ == "__main__":
    main()
