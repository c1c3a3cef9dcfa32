"""The promise about memory: a reader takes memory in proportion to its input, and not to any claimed size."""

import tracemalloc
from collections.abc import Callable
from typing import TypeVar

__all__ = ["assert_memory_bounded"]

T = TypeVar("T")

_FREE = 96 * 1024
"""Bytes that a reader may take for nothing: the buffers that it begins with. msgpack's parser takes 42 KB; two can exist."""


def assert_memory_bounded(read: Callable[[], T], given: int, *, times: int) -> T:
    """Return the result of `read`. Fails if it allocates more than `times` the given bytes and 96 KiB, twice in a row.

    The first time, it may import a module, or the interpreter's own tables may grow.
    """
    result, most = _measured(read)
    if most > times * given + _FREE:
        result, most = _measured(read)
    assert most <= times * given + _FREE, f"{most} bytes of memory for {given} bytes of input"
    return result


def _measured(read: Callable[[], T]) -> tuple[T, int]:
    tracemalloc.start()
    try:
        return read(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
