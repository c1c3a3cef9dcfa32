"""Control-C, as a person uses it."""

import signal
import subprocess
from contextlib import suppress

from .agent import PATIENCE

_AGAIN = 10.0
"""Seconds until Control-C is pressed again: longer than a process takes to end, which a second one would interrupt."""


def interrupted(process: "subprocess.Popen[bytes]") -> tuple[int, bytes, bytes]:
    """Interrupt a process until it has ended; return its exit code and output.

    A single SIGINT may be lost. Python runs its handlers between instructions; a signal that comes after the last of them and
    before a blocking system call is found only when the call returns.
    """
    for _ in range(int(PATIENCE / _AGAIN)):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            out, error = process.communicate(timeout=_AGAIN)
            return process.returncode, out, error
    process.kill()
    raise AssertionError(f"SIGINT did not end the process in {PATIENCE:.0f} seconds")
