"""The promise about memory: what a reader takes is bounded by what it was given, whatever is claimed in there."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["frugal"]

_FREE = 64 * 1024
"""Bytes that a reader may take for nothing: caches that it fills once, and the buffers that it begins with."""


@contextmanager
def frugal(given: int, *, times: int) -> Iterator[None]:
    """Fail if the block had more than `times` the given bytes in Python's memory at once, besides 64 KiB."""
    tracemalloc.start()
    try:
        yield
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most <= times * given + _FREE, f"{most} bytes of memory for {given} bytes of input"
