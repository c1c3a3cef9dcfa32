"""Starts the agent over in an environment in which all memory is overwritten when it is freed. Imports next to nothing."""

import os
import sys
from contextlib import suppress
from typing import Final

__all__ = ["clear_freed_memory"]

_CLEARED: Final = "KEYFERRY_CLEARED"
_CLEARING: Final = {
    # Libraries free padded messages and intermediate keys as they are, and Python its strings: all that is freed is
    # overwritten, whoever frees it. glibc's caches per thread would go round that, and so would Python's own allocator.
    "GLIBC_TUNABLES": "glibc.malloc.perturb=85:glibc.malloc.tcache_count=0",
    "PYTHONMALLOC": "malloc",
    # The first call of a library's function, bound when it is made, saves the vector registers on the stack: with the round
    # keys that AES has just used.
    "LD_BIND_NOW": "1",
}


def clear_freed_memory() -> None:
    """Start this program over, once, in an environment in which all memory is overwritten when it is freed.

    The process keeps its ID, its arguments and its descriptors. To be called before anything large is imported.
    """
    if os.environ.get(_CLEARED) == str(os.getpid()):
        for name in (_CLEARED, *_CLEARING):  # it is done, and nothing for the loader
            del os.environ[name]
        return
    environment = {**os.environ, **_CLEARING, _CLEARED: str(os.getpid())}
    with suppress(OSError):  # whoever goes on all the same sees it by `clears_freed_memory`
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - this very program
