"""The agent's system calls in a simulation: the same calls, with faults, and traced.

Sockets, files and epoll are the kernel's own; time, chance, threads, the loader's process and who is calling are not. The agent
is unchanged: names of the standard library and of trio are replaced, and one function that starts a process.
"""

import errno
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Final

import trio
from trio._socket import _SocketType

from keyferry.secret import SecretMemory, SecretMemoryError
from keyferry_agent.config.settings import Settings
from keyferry_agent.crypto import selftest
from keyferry_agent.daemon import daemon as _run  # noqa: F401 - all of the agent's modules are there
from keyferry_agent.keyring import keyring
from keyferry_agent.keyring.description import KeyringDescription
from keyferry_agent.keyring.document import KeyringError
from keyferry_agent.keyring.keyring import Keyring
from keyferry_agent.server import thread_pool
from keyferry_agent.state import OFFLOAD_THREADS, ServerState

from . import fixtures
from .connection_trace import AgentConnection
from .faults import DAMAGED, DIES, HANGS, NO_MEMORY, SHORT, STOPS
from .threads import simulated_run_sync
from .world import World

__all__ = ["REAL", "SLOW", "FakeSyscalls"]

SLOW: Final = "a thread at a slow job"
"""The name of a task that stands for one: it goes on to its end, although its connection may have ended."""


class _Real:
    """The real system calls, for the world's own use."""

    open, close, read, write = os.open, os.close, os.read, os.write
    pread, ftruncate, fstat = os.pread, os.ftruncate, os.fstat
    stat, lstat, unlink, chmod = os.stat, os.lstat, os.unlink, os.chmod
    monotonic = time.monotonic


REAL: Final = _Real
_PEERPIDFD: Final = 77
_PEERGROUPS: Final = 59
_WHILE_IT_HEARS: Final = 3.0
"""Seconds in which a signal is heard, also while the record is waited for."""
_SMALL: Final = 4_608
"""Bytes of a small socket buffer: the least that the kernel takes."""
_self_tested = False


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class FakeSyscalls:
    """The replacements, for one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._helper = _SocketType._nonblocking_helper
        self._getsockopt = _SocketType.getsockopt
        self._close = _SocketType.close
        self._shutdown = _SocketType.shutdown
        self._socketpair = trio.socket.socketpair
        self._selftest = selftest.run
        self._adopt = ServerState.adopt
        self._random = world.faults_rng.__class__(f"{world.seed}: chance")
        self._weather = world.faults_rng
        self._slow = trio.CapacityLimiter(OFFLOAD_THREADS)

    # --- files -----------------------------------------------------------------------------------------------------

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        world = self.world
        record = os.fspath(path) == str(world.record.path)
        if record:
            self._at_record("open the record", world.record.path)
        elif path == os.devnull:
            world.inject_fault("keep a reserve")
        elif flags & os.O_DIRECTORY:
            world.inject_fault("open the folder")
        elif self._ours(path) and flags & os.O_ACCMODE == os.O_RDONLY:
            world.inject_fault("read the configuration")
            world.allocate_descriptor()
            world.release_descriptor()  # a file object closes it
            world.read = world.on_disk[1]
            world.add_event("read the configuration", world.read)
            return REAL.open(path, flags, mode, dir_fd=dir_fd)
        world.allocate_descriptor()
        descriptor = REAL.open(path, flags, mode, dir_fd=dir_fd)
        if record:
            world.record.descriptors.add(descriptor)
            world.add_event("opened the record")
        return descriptor

    def _at_record(self, point: str, *_: Any) -> int:
        """Pass a point of the audit log's thread. Returns SHORT, or 0."""
        world = self.world
        fault = world.plan.next_fault(point)
        if fault:
            world.add_event("fault", point, errno.errorcode.get(fault, fault))
        if fault == HANGS:
            world.record.hung = True
            world.stepwise_threads.hang()
            world.add_event("goes on", point)
            return 0
        if fault > 0:
            raise _error(fault)
        return fault

    def close(self, descriptor: int) -> None:
        world = self.world
        REAL.close(descriptor)
        world.release_descriptor()
        if descriptor in world.record.descriptors:
            world.record.descriptors.discard(descriptor)
            self._at_record("close the record")

    def read(self, descriptor: int, count: int) -> bytes:
        line = self.world.lines.get(descriptor)
        if line is None:
            return REAL.read(descriptor, count)
        self._at_line("receive", line)
        if self._weather.random() < 0.1:  # as if the rest came a moment later
            count = self._weather.randrange(1, 200)
        data = REAL.read(descriptor, count)
        line.on_received(data)
        return data

    def write(self, descriptor: int, data: Any) -> int:
        world = self.world
        if descriptor in world.record.descriptors:
            return self._append(descriptor, bytes(data))
        line = world.lines.get(descriptor)
        if line is None:
            return REAL.write(descriptor, data)
        return self._send("send", line, data, lambda part: REAL.write(descriptor, part))

    def _append(self, descriptor: int, data: bytes) -> int:
        world = self.world
        world.stall(self._weather.choice((0, 0, 0, 0.0003, 0.02)))
        part = data
        if self._at_record("write the record") == SHORT:
            world.record.may_be_cut_off = True
            part = data[: self._weather.randrange(len(data))]
        written = REAL.write(descriptor, part)
        world.add_event("recorded", data.count(b"\n"), written)
        world.record.written(part)
        return written

    def pread(self, descriptor: int, count: int, offset: int) -> bytes:
        if descriptor in self.world.record.descriptors:
            self._at_record("read the record's end")
        return REAL.pread(descriptor, count, offset)

    def ftruncate(self, descriptor: int, length: int) -> None:
        if descriptor in self.world.record.descriptors:
            self._at_record("take back")
            self.world.add_event("taken back", length)
            self.world.record.may_be_cut_off = False
            self.world.record.taken_back(REAL.pread(descriptor, 2**24, length))
        REAL.ftruncate(descriptor, length)

    def fstat(self, descriptor: int) -> os.stat_result:
        if descriptor in self.world.record.descriptors:
            self._at_record("see what the record is")
        return REAL.fstat(descriptor)

    def stat(self, path: Any, **more: Any) -> os.stat_result:
        if self._ours(path):
            self.world.inject_fault("look")
        return REAL.stat(path, **more)

    def lstat(self, path: Any, **more: Any) -> os.stat_result:
        if self._ours(path):
            self.world.inject_fault("look")
        return REAL.lstat(path, **more)

    def chmod(self, path: Any, mode: int, **more: Any) -> None:
        self.world.inject_fault("set the mode")
        REAL.chmod(path, mode, **more)

    def unlink(self, path: Any, **more: Any) -> None:
        self.world.inject_fault("remove the socket")
        REAL.unlink(path, **more)

    def _ours(self, path: Any) -> bool:
        return not isinstance(path, int) and os.fspath(path).startswith(str(self.world.directory))

    # --- sockets ---------------------------------------------------------------------------------------------------

    def _at_line(self, point: str, line: AgentConnection) -> int:
        """A point of one connection. Gives SHORT, or 0."""
        world = self.world
        fault = world.plan.next_fault(point)
        if not fault:
            return 0
        world.add_event("fault", point, line, errno.errorcode.get(fault, fault))
        if fault == DIES:
            line.fault = line.fault or "its process ended"
            line.end_process()
        elif fault == STOPS:
            world.stop()
            world.stop(signal.SIGINT)
        elif fault > 0:
            if fault != errno.EAGAIN:
                line.fault = line.fault or errno.errorcode[fault]
            raise _error(fault)
        return fault

    def _send(self, point: str, line: AgentConnection, data: Any, send: Callable[[Any], int]) -> int:
        self._maybe_later()
        if self._at_line(point, line) == SHORT and len(data) > 1:
            data = data[: self._weather.randrange(1, len(data))]
        sent = send(data)
        line.on_sent(bytes(data[:sent]))
        return sent

    def _maybe_later(self) -> None:
        self.world.stall(self._weather.choice((0, 0, 0, 0.0002)))

    async def helper(self, sock: Any, wait: Any, function: Any, *arguments: Any, **more: Any) -> Any:
        world, name = self.world, function.__name__
        line = world.lines.get(sock.fileno())

        def call(raw: Any, *arguments: Any, **more: Any) -> Any:
            if name == "accept":
                return self._accept(raw, function)
            if line is None:
                return function(raw, *arguments, **more)
            if name == "send":
                return self._send("send the rest", line, arguments[0], lambda part: function(raw, part))
            self._at_line("read the rest", line)
            data = function(raw, *arguments, **more)
            line.on_received(data)
            return data

        return await self._helper(sock, wait, call, *arguments, **more)

    def _accept(self, listening: socket.socket, accept: Callable[[Any], tuple[socket.socket, Any]]) -> tuple[Any, Any]:
        world = self.world
        listener = Path(listening.getsockname()).name
        fault = world.plan.next_fault("accept")
        if fault:
            world.add_event("fault", "accept", errno.errorcode.get(fault, fault))
        if fault == STOPS:
            world.stop()
            world.stop(signal.SIGINT)
        elif fault:
            raise _error(fault)
        world.allocate_descriptor()
        try:
            connection, address = accept(listening)
        except OSError:
            world.release_descriptor()
            raise
        if world.stops and world.now > world.stops[0] + _WHILE_IT_HEARS:
            world.report_violation("a connection is accepted in a drain")
        line = AgentConnection(world, world.clients[connection.getpeername()], listener)
        if world.small_buffers:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL)
        world.lines[connection.fileno()] = line
        world.add_event("accepted", line)
        return connection, address

    def getsockopt(self, sock: Any, level: int, name: int, *size: int) -> Any:
        world = self.world
        line = world.lines.get(sock.fileno())
        if line is None or name not in (socket.SO_PEERCRED, _PEERPIDFD, _PEERGROUPS):
            return self._getsockopt(sock, level, name, *size)
        client = line.client
        if name == _PEERPIDFD:
            world.inject_fault("hold the process")
            world.allocate_descriptor()
            return struct.pack("i", line.hold_process())
        if name == _PEERGROUPS:
            return struct.pack("I", client.uid)
        self._at_line("ask who it is", line)
        return struct.pack("iII", client.pid, client.uid, client.uid)

    def close_socket(self, sock: Any) -> None:
        world = self.world
        line = world.lines.pop(sock.fileno(), None)
        if line is not None:
            line.closed = world.now
            world.add_event("closed", line)
        if sock.fileno() != -1:
            world.release_descriptor()
        self._close(sock)

    def shutdown(self, sock: Any, how: int) -> None:
        line = self.world.lines.get(sock.fileno())
        if line is not None:
            self._at_line("say the end", line)
        self._shutdown(sock, how)

    def socketpair(self, *arguments: Any) -> Any:
        self.world.allocate_descriptor()
        self.world.allocate_descriptor()
        return self._socketpair(*arguments)

    def send_fds(self, _sock: socket.socket, buffers: Any, *_: Any) -> int:
        self.world.inject_fault("tell the manager")
        text = b"".join(buffers).decode()
        self.world.told.append((self.world.now, text))
        self.world.add_event("told", text.split("\n", maxsplit=1)[0])
        return len(text)

    # --- time, chance, threads, processes ----------------------------------------------------------------------------

    def urandom(self, size: int) -> bytes:
        return self._random.randbytes(size)

    async def run_sync(self, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        return await simulated_run_sync(self.world, function, *arguments, **more)

    def submit(
        self,
        threads: thread_pool.FairThreadPool,
        _user: Hashable,
        job: Callable[[], Any],
        done: Callable[[Any, Exception | None], None],
    ) -> None:
        """Run an offloaded job, which begins and ends at times of the seed."""

        async def work() -> None:
            result: Any = None
            failure: Exception | None = None
            try:
                result = await simulated_run_sync(self.world, job, limiter=self._slow)
            except Exception as error:
                failure = error
            threads.busy -= 1
            done(result, failure)

        threads.busy += 1
        trio.lowlevel.spawn_system_task(work, name=SLOW)

    def load(self, path: Path, _unseal: Path, **_: Any) -> keyring.Keyring:
        """Return the keyring of a loader's process."""
        world = self.world
        fault = world.plan.next_fault("load the keyring")
        number = -1 if fault == DAMAGED else world.on_disk[0]
        world.add_event("load the keyring", number, errno.errorcode.get(fault, fault))
        if fault > 0:
            raise _error(fault)
        if fault == NO_MEMORY:
            raise SecretMemoryError("no locked memory", 4096)
        world.allocate_descriptor()
        world.release_descriptor()
        if number < 0:
            raise KeyringError(f"{path}: it does not open")
        world.loaded = number
        keys = KeyringDescription(tuple(fixtures.described(fixtures.RINGS[number])))
        material = iter(
            [version.material for entry in fixtures.RINGS[number] for version in entry.key.versions[: entry.versions]]
        )

        def fill(view: memoryview) -> None:
            view[:] = next(material)

        memory = SecretMemory(keyring.required_bytes(keys), backing="mlock", require=False)
        return keyring.build_keyring(keys, fill, memory)

    def adopt(self, itself: ServerState, settings: Settings, keyring: Keyring) -> None:
        """Trace the state that the agent adopts."""
        self.world.record_adoption(keyring=keyring is not itself.keyring)
        self._adopt(itself, settings, keyring)

    def self_test(self, *arguments: Any, **more: Any) -> list[str]:
        """The real one, once in each process."""
        global _self_tested  # noqa: PLW0603
        if _self_tested:
            return []
        _self_tested = True
        return self._selftest(*arguments, **more)
