"""The checklist that a key daemon runs before it touches a key. Each step says what it is against."""

import os
import resource
from collections.abc import Collection
from contextlib import suppress
from typing import Final

from keyferry.hardening import clears_freed_memory, protect

__all__ = ["clears_freed_memory", "harden"]

_FIRST_FREE: Final = 3
_DESCRIPTORS: Final = 8_192
"""To have, if the system allows it: the usual 1,024 are as many as connections, and leave none for anything else."""


def harden(keep: Collection[int] = ()) -> list[str]:
    """Harden this process, and close all that it inherited but `keep`; return one message for each failed step."""
    _standard_descriptors()
    _close_inherited(keep)
    os.umask(0o077)  # nothing is created that others can read, until somebody says so
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _DESCRIPTORS)), hard))
    return protect()


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
