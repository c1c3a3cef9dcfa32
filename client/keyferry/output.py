"""Standard output of both commands: what was done is done, also where it cannot be printed."""

import os
import sys
from collections.abc import Iterable
from typing import Final

__all__ = ["DONE", "FAILED", "show", "show_lines"]

DONE: Final = 0
FAILED: Final = 74
"""EX_IOERR of sysexits.h: it was done, and could not be printed."""


def show(program: str, text: str) -> int:
    """Print a text and give the exit code: `DONE`, or where standard output takes nothing, a word on stderr and `FAILED`."""
    return show_lines(program, [text])


def show_lines(program: str, lines: Iterable[str]) -> int:
    """The same for any number of lines, as they are made."""
    for line in lines:
        try:
            print(line)
        except OSError as error:
            return _failed(program, error)
    try:
        sys.stdout.flush()
    except OSError as error:
        return _failed(program, error)
    return DONE


def _failed(program: str, error: OSError) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says it again when it ends
    print(f"{program}: standard output: {error.strerror}", file=sys.stderr)
    return FAILED
