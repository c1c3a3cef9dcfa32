"""System calls that fail as they do on other platforms: a seccomp filter for a process that is about to start. x86-64 only."""

import ctypes
import os
import platform
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

import pytest

__all__ = ["MEMFD_SECRET", "PEERGROUPS", "PEERPIDFD", "PIDFD_OPEN", "Call", "failing", "seccomp"]

_libc = ctypes.CDLL(None, use_errno=True)
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF_0000, 0x0005_0000
_NUMBER, _ARGUMENTS = 0, 16


class Call(NamedTuple):
    """A system call, by its number; and where not all of its calls are meant, the third argument."""

    number: int
    third: int | None = None


PIDFD_OPEN: Final = Call(434)
MEMFD_SECRET: Final = Call(447)
PEERPIDFD: Final = Call(55, 77)
PEERGROUPS: Final = Call(55, 59)


def seccomp() -> pytest.MarkDecorator:
    """Skip where the numbers of system calls are others."""
    return pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64, for its numbers of system calls")


def failing(calls: dict[Call, int]) -> Callable[[], None]:
    """A function for a child before it starts its program: from then on these calls fail with these errors."""
    filters = b"".join(_rule(call, number) for call, number in calls.items()) + _step(_RETURN, _ALLOW)
    buffer = ctypes.create_string_buffer(filters)

    def install() -> None:
        program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(filters) // 8, ctypes.addressof(buffer)))
        if _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or _libc.prctl(_SECCOMP, _FILTER, program, 0, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    return install


def _step(code: int, value: int, otherwise: int = 0) -> bytes:
    return struct.pack("HBBI", code, 0, otherwise, value)


def _rule(call: Call, number: int) -> bytes:
    if call.third is None:
        return _step(_LOAD, _NUMBER) + _step(_EQUAL, call.number, 1) + _step(_RETURN, _ERRNO | number)
    return (
        _step(_LOAD, _NUMBER)
        + _step(_EQUAL, call.number, 3)
        + _step(_LOAD, _ARGUMENTS + 16)
        + _step(_EQUAL, call.third, 1)
        + _step(_RETURN, _ERRNO | number)
    )
