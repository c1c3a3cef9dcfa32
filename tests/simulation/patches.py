"""Puts the agent into a simulated world: which names of the standard library, of trio and of the agent stand for which of
`outside`'s, for the time of one life.
"""

import datetime as dt
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import structlog
import trio
import trio._core._run as trio_run
from trio._socket import _SocketType

from keyferry_agent import process_hardening
from keyferry_agent.audit import writer_thread
from keyferry_agent.crypto import selftest
from keyferry_agent.daemon import daemon as _run  # noqa: F401 - all of the agent's modules are there
from keyferry_agent.keyring import loader
from keyferry_agent.server import dispatch, refusals, request_id, rounds, thread_pool
from keyferry_agent.state import ServerState

from .fake_syscalls import REAL, FakeSyscalls
from .threads import StepwiseThreads
from .world import MONOTONIC, World

__all__ = ["replaced"]

_DATED: Final = [
    module
    for name, module in [*sys.modules.items()]
    if name.startswith("keyferry_agent") and getattr(module, "datetime", None) is dt.datetime
]
"""The agent's modules that read the time."""


@contextmanager
def replaced(world: World, run: Callable[..., Any]) -> Iterator[None]:
    """Have the agent live in this world. `run` stands in for `trio.run`."""
    outside = FakeSyscalls(world)
    world.stepwise_threads = StepwiseThreads(world)
    mine = threading.get_ident()

    class Datetime(dt.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return dt.datetime.fromtimestamp(world.wall, tz)

    def method(function: Callable[..., Any]) -> Any:
        # A function becomes a method of the class that it is put into; a bound method would not.
        def call(itself: Any, *arguments: Any, **more: Any) -> Any:
            return function(itself, *arguments, **more)

        return call

    request_ids = request_id.request_ids().__next__
    names: list[tuple[Any, str, Any]] = [
        *((os, name, getattr(outside, name)) for name in _OS),
        (os, "getpid", lambda: _PID),
        (socket, "send_fds", outside.send_fds),
        (_SocketType, "_nonblocking_helper", method(outside.helper)),
        (_SocketType, "getsockopt", method(outside.getsockopt)),
        (_SocketType, "close", method(outside.close_socket)),
        (_SocketType, "shutdown", method(outside.shutdown)),
        (trio.socket, "socketpair", outside.socketpair),
        (trio.to_thread, "run_sync", outside.run_sync),
        (thread_pool.FairThreadPool, "submit", method(outside.submit)),
        (rounds, "_MOMENT_SECONDS", 0.0),
        (dispatch, "new_request_id", request_ids),
        (refusals, "new_request_id", request_ids),
        (trio, "run", run),
        (time, "monotonic", lambda: MONOTONIC + world.now if threading.get_ident() == mine else REAL.monotonic()),
        (time, "time", lambda: world.wall),
        (writer_thread, "threading", world.stepwise_threads),
        (writer_thread, "SimpleQueue", world.stepwise_threads.queue),
        (loader, "load", outside.load),
        (selftest, "run", outside.self_test),
        (ServerState, "adopt", method(outside.adopt)),
        (process_hardening, "harden", lambda *_: []),
        (gc, "freeze", lambda: None),  # this process continues, and has to release the resources of the agent
        (trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        *((module, "datetime", Datetime) for module in _DATED),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in names]
    logging = structlog.get_config()["processors"]
    processors = [*logging]
    state = trio_run._r.getstate()
    trio_run._r.seed(f"{world.seed}: who goes first")
    logging[:] = [lambda logger, name, event: world.capture_log(logger, name, event, structlog.DropEvent())]
    # A signal after the agent has removed its handlers must not end this process.
    handlers = {number: signal.signal(number, _nobody) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for owner, name, value in names:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
        logging[:] = processors
        trio_run._r.setstate(state)
        world.stepwise_threads.end()
        for number, handler in handlers.items():
            if signal.signal(number, handler) is not _nobody:
                world.report_violation(f"{number.name} is still taken")


def _nobody(_number: int, _frame: object) -> None:
    """Take a signal, and do nothing."""


_PID: Final = 4711
"""The number of the agent's process, which is in its audit log: one with more digits makes a longer entry."""

_OS: Final = (
    "open",
    "close",
    "read",
    "write",
    "pread",
    "ftruncate",
    "fstat",
    "stat",
    "lstat",
    "unlink",
    "chmod",
    "urandom",
)
