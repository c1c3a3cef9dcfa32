"""Threads in a simulation: one at a time, in an order that the seed gives. The agent's own code runs in them, unchanged."""

import queue
import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from .faults import NO_THREAD
from .world import World

__all__ = ["StepwiseThreads", "simulated_run_sync"]

T = TypeVar("T")


class _ProcessExit(BaseException):
    """Ends a thread that never returns by itself."""


class _Idle(BaseException):
    """Returns from an idle thread to the one that let it run."""


class StepwiseThreads:
    """The audit log's thread, which runs only while the event loop's thread waits for it.

    It stands in for `threading`, and makes the queues between such a thread and the event loop's. Without hangs, one thread
    does both, because a second one would take most of a simulation's time. The function is called when the event loop waits,
    and left where it waits for a call. Both ways are equivalent, because the function has no call in hand there.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._go, self._still = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._still.acquire()
        self._target: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None
        self._inside = self._parked = self._over = self._ended = False

    def queue(self) -> "_Queue":
        """Return a queue between such a thread and the event loop's."""
        return _Queue(self)

    def Thread(self, *, target: Callable[[], None], name: str, daemon: bool) -> "StepwiseThreads":  # noqa: N802 - threading's name
        """Such a thread; there is one."""
        assert self._target is None
        self._target = target
        if self._world.plan.hangs:
            self._thread = threading.Thread(target=self._body, name=name, daemon=daemon)
        return self

    def start(self) -> None:
        """Start the thread, which waits until the event loop lets it run."""
        if self._thread is not None:
            self._thread.start()

    def _body(self) -> None:
        self._go.acquire()
        try:
            if not self._over and self._target is not None:
                self._target()
        except _ProcessExit:
            pass
        finally:
            self._ended = True
            self._still.release()

    @property
    def inside(self) -> bool:
        """Whether the current code runs in this thread."""
        return self._inside or threading.current_thread() is self._thread

    def let_work(self) -> None:
        """Let the thread run until it is idle."""
        if self._thread is not None:
            if not self._parked:
                self._go.release()
                self._still.acquire()
        elif self._target is not None:
            self._inside = True
            try:
                self._target()
            except _Idle:
                pass
            finally:
                self._inside = False

    def wait_for_turn(self) -> None:
        """Block the thread until the event loop lets it run."""
        if self._thread is None:
            raise _Idle
        self._still.release()
        self._go.acquire()
        if self._over:
            raise _ProcessExit

    def hang(self) -> None:
        """Block the thread in a system call until `release`."""
        self._parked = True
        while self._parked:
            self.wait_for_turn()

    def release(self) -> None:
        """Let the system call return."""
        if self._parked:
            self._parked = False
            self.let_work()

    def wait(self, seconds: float) -> None:
        """Time passes while the event loop's thread waits in vain."""
        self._world.add_event("waited in vain", seconds)
        self._world.stall(seconds)

    def end(self) -> None:
        """The process ends, and the thread with it."""
        self._over, self._parked = True, False
        if self._thread is not None:
            while self._thread.is_alive():  # each turn brings it nearer to its end
                self._go.release()
                self._still.acquire()
                if self._ended:
                    break
            self._thread.join()


class _Queue:
    """`queue.SimpleQueue`, between two threads of which one runs at a time."""

    def __init__(self, lockstep: StepwiseThreads) -> None:
        self._lockstep = lockstep
        self._items: deque[Any] = deque()
        self.put = self._items.append

    def empty(self) -> bool:
        """Return whether the queue has no item."""
        return not self._items

    def get(self, timeout: float | None = None) -> Any:
        """Return the next item. Raises `queue.Empty` after `timeout` seconds of simulated time."""
        if self._lockstep.inside:
            while not self._items:
                self._lockstep.wait_for_turn()
        elif not self._items and timeout != 0:
            self._lockstep.let_work()
        if not self._items:
            if timeout:
                self._lockstep.wait(timeout)
            raise queue.Empty
        return self._items.popleft()


async def simulated_run_sync(
    world: World,
    function: Callable[..., T],
    *arguments: Any,
    abandon_on_cancel: bool = False,
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """Replace `trio.to_thread.run_sync` by a thread that begins and ends at times of the seed, while all else waits."""
    rng: random.Random = world.faults_rng
    await trio.lowlevel.checkpoint_if_cancelled()
    me = object()
    if limiter is not None:
        await limiter.acquire_on_behalf_of(me)
    try:
        if world.plan.next_fault("thread") == NO_THREAD:
            world.add_event("fault", "thread")
            await trio.lowlevel.cancel_shielded_checkpoint()
            raise RuntimeError("can't start new thread")
        with trio.CancelScope(shield=not abandon_on_cancel):
            await trio.sleep(rng.choice((0, 0, 0.0001, 0.01, 0.4)))
            result = function(*arguments)
            if after := rng.choice((0, 0, 0.0001, 0.01, 1.5)):
                await trio.sleep(after)
        return result
    finally:
        if limiter is not None:
            limiter.release_on_behalf_of(me)
