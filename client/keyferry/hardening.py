"""Hardens a process before it handles a key. The agent, and every command that opens a keyring or a module, use it.

The steps change the whole process. So only the commands perform them, never the library: an application that opens a
`SoftwareModule` makes its own choice.
"""

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["DUMPABLE", "clear_freed_memory", "clears_freed_memory", "has_capability", "lock_memory", "protect"]

DUMPABLE: Final = "KEYFERRY_DUMPABLE"
"""An environment variable, for tests only: with it, other processes of the same user may read this one's memory."""

_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_MCL_ONFAULT: Final = 4
_CAP_IPC_LOCK: Final = 14
_ALL_USERS: Final = ["0", "0", "4294967295"]
"""The uid_map of the first user namespace."""

_PROBE_BYTES: Final = 200
_CLEARED_PID: Final = "KEYFERRY_CLEARED"
_CLEARING_SETTINGS: Final = {
    # Libraries free padded messages and intermediate keys without wiping them, and Python does so with strings. With these
    # settings, glibc overwrites all memory that is freed. glibc's caches per thread, and Python's own allocator, would bypass
    # that.
    "GLIBC_TUNABLES": "glibc.malloc.perturb=85:glibc.malloc.tcache_count=0",
    "PYTHONMALLOC": "malloc",
    # With lazy binding, the first call of a library's function saves the vector registers on the stack. They hold the round
    # keys that AES has just used.
    "LD_BIND_NOW": "1",
}


def clear_freed_memory() -> None:
    """Start this program over, once, in an environment in which all memory is overwritten when it is freed.

    The process keeps its ID, its arguments and its descriptors. A caller calls this before it imports anything large.
    """
    if os.environ.get(_CLEARED_PID) == str(os.getpid()):
        for name in (_CLEARED_PID, *_CLEARING_SETTINGS):  # child processes do not inherit the settings
            os.environ.pop(name, None)
        return
    environment = {**os.environ, **_CLEARING_SETTINGS, _CLEARED_PID: str(os.getpid())}
    with suppress(OSError):  # on failure the process continues, and `clears_freed_memory` returns False
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - this very program


def clears_freed_memory() -> bool:
    """Return whether freed memory is overwritten. The function frees a Python object and reads its memory."""
    probe = b"A" * _PROBE_BYTES
    address = id(probe) + sys.getsizeof(b"")
    del probe
    return b"A" * (_PROBE_BYTES // 4) not in ctypes.string_at(address, _PROBE_BYTES - 1)


def protect() -> list[str]:
    """Forbid new privileges, core dumps, and access to this process's memory by processes of the same user.

    Returns one message for each step that failed. exec(2) undoes the last step.
    """
    failures = []
    libc = ctypes.CDLL(None, use_errno=True)
    steps = [(_PR_SET_NO_NEW_PRIVS, 1, "no new privileges: a set-uid program could be started")]
    if DUMPABLE in os.environ:
        failures.append(
            f"dumpable: {DUMPABLE} is set, which is for tests; processes of the same user can read all keys"
        )
    else:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        steps.append((_PR_SET_DUMPABLE, 0, "not dumpable: processes of the same user could read this one's memory"))
    for option, value, consequence in steps:
        if libc.prctl(option, value, 0, 0, 0) != 0:
            failures.append(f"{consequence} ({os.strerror(ctypes.get_errno())})")
    return failures


def lock_memory() -> bool:
    """Keep all memory of this process out of swap, where no limit forbids it. Returns whether the kernel agreed.

    Under a limit, the kernel would refuse memory to this process later (MCL_FUTURE). Then this function does nothing.
    """
    if not _may_lock_everything():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    # MCL_ONFAULT: pages are locked when the process first touches them, and an untouched reservation costs nothing.
    return bool(libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0)


def has_capability(number: int) -> bool:
    """Return whether this process has a capability (capabilities(7)), by its number, over the whole host.

    A capability in a user namespace of its own does not count: it lifts no limit of the host.
    """
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        users = Path("/proc/self/uid_map").read_text().split()
    except OSError:
        return False
    capabilities = next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)
    return bool(capabilities >> number & 1) and users == _ALL_USERS


def _may_lock_everything() -> bool:
    unlimited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
    return unlimited or has_capability(_CAP_IPC_LOCK)
