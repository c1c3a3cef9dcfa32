"""One simulation, from its seed to its violations: the whole daemon, its clients, its operator, its end."""

import fcntl
import gc
import hashlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import trio

from keyferry_agent.config.options import Options, StartError
from keyferry_agent.daemon import daemon as life

from . import checks, operator_actions
from .clients import Client
from .fake_syscalls import SLOW
from .patches import replaced
from .world import World

__all__ = ["Result", "simulate"]

_TOO_LONG: Final = 60
"""Seconds of real time for a simulation that takes milliseconds: the limit ends an endless loop of the agent."""
_FOLDER: Final = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where files are in memory: on a disk, removing them takes as long as all the rest."""
_EVERY: Final = 200
_ONCE: Final = 2
"""Descriptors that an agent has until its process ends: of the record, and one in reserve."""
_since_collection = 0
_real_run: Final = trio.run


class Result(NamedTuple):
    """The trace of a simulation, line by line, and its violations."""

    seed: int
    trace: list[str]
    violations: list[str]
    kind: str

    @property
    def digest(self) -> str:
        """A fingerprint of all that happened."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()

    def report(self) -> str:
        """Return the violations, their trace, and the command that repeats it."""
        last = "\n".join(self.trace[-25:])
        wrong = "\n".join(f"  {violation}" for violation in self.violations)
        return f"seed {self.seed}:\n{wrong}\n\nwhat happened last:\n{last}\n\nto see it again: make simulate SEED={self.seed}"


class _Stuck(BaseException):
    """The agent is in an endless loop."""


def simulate(seed: int) -> Result:
    """Run one seed's world. Raises nothing: violations are in the result."""
    directory = Path(tempfile.mkdtemp(prefix="keyferry-simulation-", dir=_FOLDER))
    world = World(seed, directory)
    gc.disable()
    old = signal.signal(signal.SIGALRM, _stuck)
    signal.setitimer(signal.ITIMER_REAL, _TOO_LONG)
    try:
        _live(world)
    except* _Stuck:
        world.report_violation(
            f"it did not end in {_TOO_LONG} seconds of real time, or in its steps:\n{traceback.format_exc()}"
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        shutil.rmtree(directory)
        _collect()
    return Result(seed, world.trace, world.violations, world.plan.kind)


def _stuck(*_: object) -> None:
    raise _Stuck


def _collect() -> None:
    global _since_collection  # noqa: PLW0603
    _since_collection += 1
    gc.enable()
    if _since_collection >= _EVERY:  # it takes as long as a few simulations
        _since_collection = 0
        gc.collect()


def _live(world: World) -> None:
    operator_actions.write_files(world)
    manager = str(world.directory / "manager")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(manager)
        _live_with(world, manager)


def _live_with(world: World, manager: str) -> None:
    descriptors, threads = _descriptors(), set(threading.enumerate())
    play = _Run(world)
    with replaced(world, play.run):
        if world.watchdog:
            os.environ["NOTIFY_SOCKET"] = manager
            os.environ["WATCHDOG_USEC"] = str(world.watchdog * 1_000_000)
        try:
            life.run_daemon(
                Options(config=world.directory / "agent.toml", socket=None, keyring=None, unseal=None, dev=False)
            )
        except* StartError as errors:
            world.add_event("not started", errors.exceptions)
            if not world.plan.injected or world.serving.is_set():
                world.report_violation(f"it did not start, and nothing was wrong: {errors.exceptions}")
        except* Exception as errors:
            world.report_violation(f"the agent failed: {''.join(traceback.format_exception(errors))}")
    for line in world.all_connections:
        line.end_process()
    left = {
        "descriptors": _kept(world, descriptors),
        "threads": len(set(threading.enumerate()) - threads),  # a thread of an earlier test may end meanwhile
        "sockets": _sockets(world),
        **play.left,
    }
    if world.serving.is_set():
        checks.check_clients(world)
        checks.check_record(world)
        checks.check_end(world, left)


def _kept(world: World, before: set[int]) -> list[str]:
    """Return the leaked descriptors, except the two that an agent keeps until its process ends, and close them."""
    left = _descriptors() - before
    if len(left) > _ONCE:  # an exception that ended a start may hold on to frames
        gc.collect()
        left = _descriptors() - before
    names = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in sorted(left)]
    for descriptor in left:
        os.close(descriptor)
    record = [str(path) for path in (world.record.path, *world.record.rotated)]
    for once in ([os.devnull], record):
        for name in [name for name in names if name in once][:1]:
            names.remove(name)
    return names


def _sockets(world: World) -> set[str]:
    if world.plan.injected["look"] or world.plan.injected["remove the socket"]:
        return set()
    return {"first", "second"} & {*os.listdir(world.directory)}


def _descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            fcntl.fcntl(int(name), fcntl.F_GETFD)
        except OSError:
            continue  # the one that listed them
        found.add(int(name))
    return found


class _Run:
    """The order of events around the agent's main task."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.left: dict[str, Any] = {}

    def run(self, serve: Callable[..., Any], *arguments: Any, **more: Any) -> None:
        """Stand in for `trio.run`, in the agent's own last line."""
        _real_run(self._main, serve, arguments, clock=self._world.clock, **more)

    async def _main(self, serve: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        world = self._world
        tasks = _tasks()
        failed: list[BaseException] = []
        async with trio.open_nursery() as everything:
            ended = trio.Event()

            async def agent() -> None:
                try:
                    await serve(*arguments)
                except trio.Cancelled:
                    raise
                except BaseException as error:
                    failed.append(error)
                finally:
                    world.ended = world.now
                    world.add_event("the agent ended")
                    world.serving.set() if world.adopted else None
                    ended.set()

            everything.start_soon(agent)
            everything.start_soon(operator_actions.release_hangs, world)
            async with trio.open_nursery() as start:
                start.start_soon(_until, ended, start.cancel_scope)
                await world.serving.wait()
                start.cancel_scope.cancel()
            if world.ended is None:
                async with trio.open_nursery() as around:
                    await self._around(around, ended)
            everything.cancel_scope.cancel()
        if left := sorted(set(_tasks()) - {*tasks, SLOW}):
            self.left["tasks"] = left
        agent_, server = arguments[:2]
        self.left["connections counted"] = agent_.counters.connections
        self.left["users counted"] = dict(server._admission._per_user)
        self.left["connections in rounds"] = len(server._rounds)
        if failed:
            raise failed[0]

    async def _around(self, around: trio.Nursery, ended: trio.Event) -> None:
        world, rng = self._world, self._world.faults_rng
        clients = [Client(world, world.rng, number) for number in range(rng.choice((1, 1, 2, 3, 5)))]
        around.start_soon(operator_actions.act, world)
        if world.early:
            for client in clients:
                around.start_soon(client.run)
            await trio.sleep(rng.choice((0, 0.001, 0.02, 0.3, 1, 4)))
        else:
            async with trio.open_nursery() as all_of_it:
                for client in clients:
                    all_of_it.start_soon(client.run)
            if not world.stops and world.ended is None:
                await operator_actions.end_faults(world)
            if not world.stops and world.ended is None:
                await self._probe(len(clients))
        world.stop()
        if rng.random() < 0.5:
            await trio.sleep(rng.choice((0, 0.05, 1)))
            world.stop(signal.SIGINT)
        with trio.move_on_after(_TOO_LONG):
            await ended.wait()
        if world.ended is None:
            world.report_violation("the drain does not end")
            around.cancel_scope.cancel()

    async def _probe(self, number: int) -> None:
        """When all is well again, the agent is as its files say, and answers."""
        world = self._world
        if world.adopted[-1][1:] != world.on_disk:
            world.report_violation(f"it goes by {world.adopted[-1][1:]}, and the files are {world.on_disk}")
        probe = Client(world, world.rng, number, well_behaved=True)
        await probe.run()
        silenced = probe.notifies and world.rate
        if probe.line is None or (len(probe.line.answers) != len(probe.asks) and not silenced):
            world.report_violation("all is well, and a client is not answered")
        if world.ended is None and not world.record.in_place:
            world.report_violation("the record's file was moved away, and is not opened anew")


async def _until(ended: trio.Event, scope: trio.CancelScope) -> None:
    await ended.wait()
    scope.cancel()


def _tasks() -> list[str]:
    """The names of all tasks."""
    root = trio.lowlevel.current_root_task()
    found, rest = [], [root] if root else []
    while rest:
        task = rest.pop()
        found.append(task.name)
        rest += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return sorted(found)
