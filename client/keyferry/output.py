"""Standard output of both commands: what was done is done, also where it cannot be printed."""

import os
import sys
from typing import Final

__all__ = ["DONE", "FAILED", "show"]

DONE: Final = 0
FAILED: Final = 74
"""EX_IOERR of sysexits.h: it was done, and could not be printed."""


def show(program: str, text: str) -> int:
    """Print a text and give the exit code: `DONE`, or where standard output takes nothing, a word on stderr and `FAILED`."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says it again when it ends
        print(f"{program}: standard output: {error.strerror}", file=sys.stderr)
        return FAILED
    return DONE
