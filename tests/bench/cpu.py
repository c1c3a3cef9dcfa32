"""The cores of agent and clients, and the interference of other processes.

The agent, the bare loop and every peer run on one core; the clients run on another. On a machine with one core they share
it, and the figures say more about the scheduler than about the agent.
"""

import os
import time
from pathlib import Path
from typing import Final

__all__ = ["ALL", "CLIENT", "SERVER", "Interference", "pin", "processor_seconds"]

ALL: Final = frozenset(os.sched_getaffinity(0))
SERVER: Final = frozenset({min(ALL)})
"""Where the agent, the bare loop, and the peers run."""
CLIENT: Final = frozenset({max(ALL)})
"""Where load generators and clients run."""


def pin(pid: int, cores: frozenset[int]) -> None:
    """Keep all threads of a process on some cores, and those that they start. 0 is this process."""
    for thread in os.listdir(f"/proc/{pid or 'self'}/task"):
        os.sched_setaffinity(int(thread), cores)


def processor_seconds(pid: int) -> float:
    """The processor time of all threads of a process, in seconds."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


class Interference:
    """How much of the time some processes were ready to run, and had to wait because another ran on their core.

    A quiet machine is near 0: each has a core of its own. (`/proc/PID/schedstat`: nanoseconds on the core, and waiting for it.)
    """

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._began = time.perf_counter()
        self._waited = self._waiting()

    def share(self) -> float:
        """The share of the time since it began, as a number from 0, all processes added up."""
        return (self._waiting() - self._waited) / (time.perf_counter() - self._began)

    def _waiting(self) -> float:
        total = 0
        for pid in self._pids:
            for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                total += int(path.read_text().split()[1])
        return total / 1e9
