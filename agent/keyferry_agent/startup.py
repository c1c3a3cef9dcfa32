"""The checklist that a key daemon runs before it touches a key. Each step says what it is against."""

import ctypes
import os
import resource
from typing import Final

__all__ = ["harden"]

_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_FIRST_FREE: Final = 3
_DESCRIPTORS: Final = 8_192
"""To have, if the system allows it: the usual 1,024 are as many as connections, and leave none for anything else."""


def harden() -> list[str]:
    """Harden this process; give what could not be done, a line each."""
    failures = []
    _standard_descriptors()
    os.umask(0o077)  # nothing is created that others can read, until somebody says so
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _DESCRIPTORS)), hard))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value, what in (
        (_PR_SET_NO_NEW_PRIVS, 1, "no new privileges: a set-uid program could be started"),
        (_PR_SET_DUMPABLE, 0, "not dumpable: processes of the same user could read this one's memory"),
    ):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            failures.append(f"{what} ({os.strerror(ctypes.get_errno())})")
    return failures


def _standard_descriptors() -> None:
    """Open what is closed of 0, 1 and 2, so that no socket or key file becomes somebody's standard output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < _FIRST_FREE:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
