"""A process that inspects callers' programs for the agent: `python -m keyferry_agent.peer.inspector`, one thread for each user.

A thread that waits for a file system in user space cannot be ended, not even by SIGKILL, and neither can its process. So
programs are not inspected in the agent's process. This process holds no key, no socket and no lock of the agent.

Standard input and output are one socket of packets, each with a JSON array. A request contains its number, the user, the
process, and whether a hash is needed. An answer contains the number, and the program or null. Answers can come in any order.
The process ends when the socket is closed.
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
"""Time after which an idle thread ends."""
_MAX_PATH_BYTES: Final = 4_096
_STACK: Final = 262_144
"""Bytes of a thread's stack: a thousand threads may be waiting for file systems."""
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that are not about a program: this process lacks descriptors or memory. It exits, and the agent starts another one."""


class _Threads:
    """One thread for each user that has requests."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[int | None, deque[tuple[int, int, bool]]] = {}

    def submit(self, user: int | None, number: int, pid: int, *, with_hash: bool) -> None:
        """Queue the inspection of a program for the user's thread, after earlier requests."""
        with self._changed:
            if user in self._waiting:
                self._waiting[user].append((number, pid, with_hash))
                self._changed.notify_all()
                return
            self._waiting[user] = deque([(number, pid, with_hash)])
        try:
            threading.Thread(target=self._work, args=(user, self._waiting[user]), daemon=True).start()
        except RuntimeError:  # a thread cannot be started
            del self._waiting[user]
            _answer(number, None)

    def _work(self, user: int | None, requests: deque[tuple[int, int, bool]]) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: requests, _IDLE_SECONDS):
                    del self._waiting[user]
                    return
                number, pid, with_hash = requests.popleft()
            try:
                _answer(number, inspect(pid, with_hash=with_hash))
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    os._exit(1)
                _answer(number, None)


def _answer(number: int, program: object) -> None:
    os.write(1, json.dumps([number, program]).encode())


def main() -> None:
    """Answer requests until the agent closes the socket."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the agent; this process ends when the agent does
    threading.stack_size(_STACK)
    threads = _Threads()
    while packet := os.read(0, _MAX_PATH_BYTES):
        number, user, pid, with_hash = json.loads(packet)
        threads.submit(user, number, pid, with_hash=with_hash)
    os._exit(0)


if __name__ == "__main__":
    main()
