"""The checklist that a key daemon runs before it touches a key. Each step says what it is against."""

import ctypes
import os
import resource
import sys
from collections.abc import Collection
from contextlib import suppress
from typing import Final

__all__ = ["DUMPABLE", "clears_freed_memory", "harden"]

DUMPABLE: Final = "KEYFERRY_DUMPABLE"
"""An environment variable, for tests only: with it, other processes of the same user may read this one's memory."""

_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_FIRST_FREE: Final = 3
_DESCRIPTORS: Final = 8_192
"""To have, if the system allows it: the usual 1,024 are as many as connections, and leave none for anything else."""

_PROBE: Final = 200


def harden(keep: Collection[int] = ()) -> list[str]:
    """Harden this process, and close all that it inherited but `keep`; give what could not be done, a line each."""
    failures = []
    _standard_descriptors()
    _close_inherited(keep)
    os.umask(0o077)  # nothing is created that others can read, until somebody says so
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _DESCRIPTORS)), hard))
    libc = ctypes.CDLL(None, use_errno=True)
    steps = [(_PR_SET_NO_NEW_PRIVS, 1, "no new privileges: a set-uid program could be started")]
    if DUMPABLE in os.environ:
        failures.append(
            f"dumpable: {DUMPABLE} is set, which is for tests; processes of the same user can read all keys"
        )
    else:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        steps.append((_PR_SET_DUMPABLE, 0, "not dumpable: processes of the same user could read this one's memory"))
    for option, value, what in steps:
        if libc.prctl(option, value, 0, 0, 0) != 0:
            failures.append(f"{what} ({os.strerror(ctypes.get_errno())})")
    return failures


def clears_freed_memory() -> bool:
    """Whether freed memory really is overwritten: seen at an object of Python's, which has just been freed."""
    probe = b"A" * _PROBE
    address = id(probe) + sys.getsizeof(b"")
    del probe
    return b"A" * (_PROBE // 4) not in ctypes.string_at(address, _PROBE - 1)


def _standard_descriptors() -> None:
    """Open what is closed of 0, 1 and 2, so that no socket or key file becomes somebody's standard output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < _FIRST_FREE:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _close_inherited(keep: Collection[int]) -> None:
    """Close what somebody left open by mistake: a connection, a terminal, somebody else's secret."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= _FIRST_FREE and int(name) not in keep:
            with suppress(OSError):  # the listing's own is closed already
                os.close(int(name))
