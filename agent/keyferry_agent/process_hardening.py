"""Hardens the daemon's process before it reads a key. A comment at each step names the risk."""

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
"""Descriptors to allow, up to the hard limit. The usual 1,024 equal the default limit of connections, and files need some."""


class HardeningError(Exception):
    """A step that is required to start the agent has failed. The message names the step and a remedy."""


def harden(descriptors: Collection[int] = ()) -> list[str]:
    """Harden this process, and close all inherited descriptors except `descriptors`. Return one message for each failed step.

    Raises `HardeningError` if the process cannot list its descriptors.
    """
    open_closed()  # so that no socket or key file gets the descriptor of a standard stream
    _close_inherited(descriptors)
    os.umask(0o077)  # other users can read a new file only after an explicit chmod
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft_limit, min(hard_limit, _DESCRIPTORS)), hard_limit))
    return protect()


def _close_inherited(descriptors: Collection[int]) -> None:
    """Close descriptors that a parent process left open by mistake: a connection, a terminal, a file with a secret."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError as error:
        raise HardeningError(
            f"/proc/self/fd: {error.strerror}: the agent reads there which descriptors it inherited, and closes them; "
            "mount /proc (a chroot or a container may lack it)"
        ) from None
    for name in names:
        if int(name) >= _FIRST_FREE and int(name) not in descriptors:
            with suppress(OSError):  # the descriptor of the listing itself is closed already
                os.close(int(name))
