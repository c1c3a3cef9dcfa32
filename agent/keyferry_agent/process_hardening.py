"""The checklist that a key daemon runs before it touches a key. Each step says what it is against."""

import os
import resource
from collections.abc import Collection
from contextlib import suppress
from typing import Final

from keyferry.hardening import clears_freed_memory, protect
from keyferry.streams import open_closed

__all__ = ["HardeningError", "clears_freed_memory", "harden"]

_FIRST_FREE: Final = 3
_DESCRIPTORS: Final = 8_192
"""To have, if the system allows it: the usual 1,024 are as many as connections, and leave none for anything else."""


class HardeningError(Exception):
    """A step that the agent does not start without has failed. The message says which, and what to do."""


def harden(keep: Collection[int] = ()) -> list[str]:
    """Harden this process, and close all that it inherited but `keep`; return one message for each failed step.

    Raises `HardeningError` where the process cannot see its descriptors.
    """
    open_closed()  # no socket or key file becomes standard output
    _close_inherited(keep)
    os.umask(0o077)  # nothing is created that others can read, until somebody says so
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _DESCRIPTORS)), hard))
    return protect()


def _close_inherited(keep: Collection[int]) -> None:
    """Close what somebody left open by mistake: a connection, a terminal, somebody else's secret."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError as error:
        raise HardeningError(
            f"/proc/self/fd: {error.strerror}: the agent reads there which descriptors it inherited, and closes them; "
            "mount /proc (a chroot or a container may lack it)"
        ) from None
    for name in names:
        if int(name) >= _FIRST_FREE and int(name) not in keep:
            with suppress(OSError):  # the listing's own is closed already
                os.close(int(name))
