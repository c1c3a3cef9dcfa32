"""Inspects callers' programs without waiting for their file systems: in another process (`inspector`), with a deadline.

A caller's file system may never answer. Then a thread of that process blocks, for as long as it likes; the event loop does not,
no other user waits, and that user has no evidence about programs until the thread is back.
"""

import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Container
from contextlib import suppress
from typing import Final

import structlog
import trio

from .process import Process
from .program import Program

__all__ = ["INSPECTION_SECONDS", "Inspector"]

INSPECTION_SECONDS: Final = 5.0
"""For one inspection. Hashing a program of a GiB takes about two seconds, the first time."""
_MOST_LATE: Final = 64
"""Users, of those whom no grant names beside a program, whose threads may be late at one time."""
_COMMAND: Final = ("-P", "-m", "keyferry_agent.peer.inspector")  # -P: nothing is imported from the working directory
_LONGEST_ANSWER: Final = 65_536
_RESTART_SECONDS: Final = 1.0

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class _Request:
    """An inspection that was asked for and not answered yet."""

    def __init__(self, user: int | None) -> None:
        self.user = user
        self.program: Program | None = None
        self.done = trio.Event()
        self.late = False


class Inspector:
    """Inspects programs, for each user one at a time, while `run` runs. Its process is started when it is needed first."""

    def __init__(self) -> None:
        self._wanted, self._started = trio.Event(), trio.Event()
        self._socket: trio.socket.SocketType | None = None
        self._sending = trio.Lock()
        self._requests: dict[int, _Request] = {}
        self._last_number = 0
        self._late: Counter[int | None] = Counter()

    async def inspect(
        self, process: Process, user: int | None, named: Container[int | None], *, hashed: bool
    ) -> Program | None:
        """Return the program that a process runs, with its hash if `hashed`; None for evidence that cannot be had in time.

        `named`: the users whom a grant names beside a program; of all others only so many may have a thread that is late.
        """
        if user in self._late or (len(self._late) >= _MOST_LATE and user not in named):
            return None
        request = _Request(user)
        with trio.move_on_after(INSPECTION_SECONDS):
            self._wanted.set()
            await self._started.wait()
            with suppress(OSError):  # the process has ended: `run` has said so to all who wait
                await self._ask(request, process, hashed=hashed)
            return request.program
        if not request.done.is_set():
            request.late = True
            self._late[user] += 1
        log.warning("inspection.late", uid=user, pid=process.pid, seconds=INSPECTION_SECONDS)
        return None

    async def _ask(self, request: _Request, process: Process, *, hashed: bool) -> None:
        self._last_number += 1
        number = self._last_number
        packet = json.dumps([number, request.user, process.pid, hashed]).encode()
        async with self._sending:
            if self._socket is None:
                return
            self._requests[number] = request
            await self._socket.send(packet)
        await request.done.wait()

    async def run(self) -> None:
        """Keep the process, start it anew when it has ended, and take its answers. For ever."""
        pid = os.getpid()
        while True:
            await self._wanted.wait()
            try:
                self._socket, pid = _start()
                with self._socket:
                    self._started.set()
                    while packet := await self._socket.recv(_LONGEST_ANSWER):
                        self._take(packet)
            except OSError as error:
                log.error("inspection.failed", error=error.strerror)
            finally:
                self._socket = None
                self._forget_all()
            self._wanted, self._started = trio.Event(), trio.Event()
            await trio.sleep(_RESTART_SECONDS)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - which does not wait

    def _take(self, packet: bytes) -> None:
        number, found = json.loads(packet)
        request = self._requests.pop(number)
        if request.late:
            self._late[request.user] -= 1
            if not self._late[request.user]:
                del self._late[request.user]
        if found is not None:
            path, identity, sha256 = found
            request.program = Program(path, tuple(identity), sha256)
        request.done.set()

    def _forget_all(self) -> None:
        self._late.clear()
        while self._requests:
            self._requests.popitem()[1].done.set()


def _start() -> tuple[trio.socket.SocketType, int]:
    """Start the process; return the socket to it, and its number. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, *_COMMAND],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), 1),
                    # Not the agent's: whoever reads that waits for its end, which a thread that blocks would hold up.
                    (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                ],
            )
        except BaseException:
            ours.close()
            raise
    return trio.socket.from_stdlib_socket(ours), pid
