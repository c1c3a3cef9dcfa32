"""Inspects callers' programs without waiting for their file systems: in another process (`inspector`), with a deadline.

A caller's file system may never answer. Then a thread of the inspector's process blocks, possibly for ever. The event loop does
not block, and other users do not wait. The blocked user has no evidence about programs until the thread has returned.
"""

import json
import os
import socket
import sys
from collections.abc import Container
from contextlib import suppress
from typing import Final

import structlog
import trio

from .process import Process
from .program import Program

__all__ = ["INSPECTION_SECONDS", "Inspector"]

INSPECTION_SECONDS: Final = 5.0
"""Time limit of one inspection. Hashing a program of a GiB takes about two seconds, the first time."""
_MAX_LATE: Final = 1_024
"""Most users with a late thread at the same time; at the limit, users that are not known yet are refused. Each thread takes
some 50 KB.
"""
_MAX_CACHED_ANSWERS: Final = 4_096
"""Most users that are remembered because they had an answer in time."""
_COMMAND: Final = ("-P", "-m", "keyferry_agent.peer.inspector")  # -P: nothing is imported from the working directory
_MAX_ANSWER_BYTES: Final = 65_536
_RESTART_SECONDS: Final = 1.0

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class _Request:
    """An inspection that has been requested and not answered yet."""

    def __init__(self, user: int | None) -> None:
        self.user = user
        self.program: Program | None = None
        self.done = trio.Event()


class Inspector:
    """Inspects programs while `run` runs, for each user one at a time. The first request starts the inspector's process."""

    def __init__(self) -> None:
        self._wanted, self._started = trio.Event(), trio.Event()
        self._socket: trio.socket.SocketType | None = None
        self._sending = trio.Lock()
        self._requests: dict[int, _Request] = {}
        self._last_number = 0
        self._under_way: dict[int | None, _Request] = {}
        """The request in flight of each user: one at a time, even if the connection that needed the inspection is closed."""
        self._late: set[int | None] = set()
        """Users whose request in flight was not answered in time."""
        self._answered: dict[int | None, None] = {}
        """Users that had an answer in time, the latest last."""

    async def inspect(
        self, process: Process, user: int | None, users: Container[int | None], *, with_hash: bool
    ) -> Program | None:
        """Return the program that a process runs, with its hash if `with_hash`; None if the evidence is not available in time.

        `users`: the users that a grant names beside a program. The programs of these users, and of users that had an answer
        before, are always inspected, unless a request of the same user is late. Other users are refused while `_MAX_LATE`
        users have a late thread.
        """
        is_known = user in users or user in self._answered
        if user in self._late or (len(self._late) >= _MAX_LATE and not is_known):
            return None
        with trio.move_on_after(INSPECTION_SECONDS):
            self._wanted.set()
            await self._started.wait()
            while (before := self._under_way.get(user)) is not None:
                await before.done.wait()
            with suppress(OSError):  # the inspector's process has ended, and `run` ends all requests
                return await self._ask(process, user, with_hash=with_hash)
            return None
        if user in self._under_way:
            self._late.add(user)
        log.warning("inspection.late", uid=user, pid=process.pid, seconds=INSPECTION_SECONDS)
        return None

    async def _ask(self, process: Process, user: int | None, *, with_hash: bool) -> Program | None:
        if self._socket is None:
            return None
        self._last_number += 1
        number, request = self._last_number, _Request(user)
        packet = json.dumps([number, user, process.pid, with_hash]).encode()
        self._requests[number] = self._under_way[user] = request
        try:
            async with self._sending:
                if self._socket is not None:  # else `run` has already ended all requests
                    await self._socket.send(packet)  # SOCK_SEQPACKET: a packet is sent whole, or not at all
        except BaseException:
            self._end(self._requests.pop(number, request))
            raise
        await request.done.wait()
        return request.program

    async def run(self) -> None:
        """Receive the answers of the inspector's process, and restart the process when it has ended. Never returns."""
        pid = os.getpid()
        while True:
            await self._wanted.wait()
            try:
                self._socket, pid = _start()
                with self._socket:
                    self._started.set()
                    while packet := await self._socket.recv(_MAX_ANSWER_BYTES):
                        self._take(packet)
                log.error("inspection.failed", error="the process that inspects programs has ended")
            except OSError as error:
                log.error("inspection.failed", error=error.strerror)
            finally:
                self._socket = None
                self._forget_all()
            started, self._wanted, self._started = self._started, trio.Event(), trio.Event()
            started.set()  # wakes the tasks that wait for a process; they find that `_socket` is None
            await trio.sleep(_RESTART_SECONDS)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - WNOHANG: does not block

    def _take(self, packet: bytes) -> None:
        number, program_fields = json.loads(packet)
        request = self._requests.pop(number, None)
        if request is None:  # the requesting task was cancelled while it sent the packet
            return
        if program_fields is not None:
            path, identity, sha256 = program_fields
            request.program = Program(path, tuple(identity), sha256)
        if request.user not in self._late:
            self._answered.pop(request.user, None)
            self._answered[request.user] = None
            if len(self._answered) > _MAX_CACHED_ANSWERS:
                del self._answered[next(iter(self._answered))]
        self._end(request)

    def _end(self, request: _Request) -> None:
        if self._under_way.get(request.user) is request:
            del self._under_way[request.user]
            self._late.discard(request.user)
        request.done.set()

    def _forget_all(self) -> None:
        while self._requests:
            self._end(self._requests.popitem()[1])


def _start() -> tuple[trio.socket.SocketType, int]:
    """Start the inspector's process; return the socket to it, and its pid. Raises OSError."""
    own_end, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with child_end:
        try:
            pid = os.posix_spawn(
                sys.executable,
                [sys.executable, *_COMMAND],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, child_end.fileno(), 0),
                    (os.POSIX_SPAWN_DUP2, child_end.fileno(), 1),
                    # Not the agent's stderr: its reader waits for the end of the stream, which a blocked thread would delay.
                    (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                ],
            )
        except BaseException:
            own_end.close()
            raise
    return trio.socket.from_stdlib_socket(own_end), pid
