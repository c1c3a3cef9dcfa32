"""Standard output and standard error of both commands: the one place that handles output which cannot be written.

The exit code reports the outcome of a command. When a result cannot be printed, the code is `FAILED`, which differs from the
code of a refusal. A reader that closes the pipe early (`| head -1`) is not a fault, so no message is printed. JSON is UTF-8 in
every locale. Text is in the encoding of the locale, with backslash escapes for characters outside that encoding.
"""

import errno
import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final, TextIO

from .streams import ESCAPE

__all__ = ["DONE", "FAILED", "complain", "complain_json", "say", "settle", "show", "show_json", "show_lines", "to_json"]

DONE: Final = 0
FAILED: Final = 74
"""EX_IOERR of sysexits.h: the command did its work, and could not print the result."""


def show(program: str, text: str) -> int:
    """Print a text. Returns `DONE`, or `FAILED` after a message where standard output cannot be written."""
    return show_lines(program, [text])


def show_lines(program: str, lines: Iterable[str], *, is_json: bool = False) -> int:
    """Print each line as the iterable yields it, and return the code of `show`. `is_json`: print UTF-8 in every locale."""
    for line in lines:
        try:
            _write(sys.stdout, f"{line}\n", utf8=is_json)
        except OSError as error:
            return _failed(program, error)
    return settle(program, DONE)


def show_json(program: str, result: Any) -> int:
    """Print a result as JSON, and return the code of `show`."""
    return show_lines(program, [to_json(result)], is_json=True)


def to_json(result: Any) -> str:
    """Return the text of a result as JSON for people: indented, and without escapes that ASCII would need."""
    return json.dumps(result, indent=2, ensure_ascii=False)


def settle(program: str, code: int) -> int:
    """Flush standard output. Returns `code`, or `FAILED` if `code` is `DONE` and the flush fails."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        failed = _failed(program, error)
        return failed if code == DONE else code
    return code


def complain(program: str, message: str) -> None:
    """Print a message on standard error, where standard error can be written."""
    say(f"{program}: {message}")


def say(line: str) -> None:
    """Print a line on standard error, where standard error can be written."""
    with suppress(OSError):
        _write(sys.stderr, f"{line}\n", utf8=False)
        sys.stderr.flush()


def complain_json(error: Any) -> None:
    """Print an error on standard error as JSON, where standard error can be written."""
    with suppress(OSError):
        _write(sys.stderr, f"{to_json(error)}\n", utf8=True)
        sys.stderr.flush()


def _write(stream: TextIO | None, text: str, *, utf8: bool) -> None:
    if stream is None:  # Python's own streams are None where their descriptors are closed
        raise OSError("it is closed")
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        stream.write(text)
        return
    encoding = "utf-8" if utf8 else stream.encoding
    stream.flush()
    buffer.write(text.encode(encoding, ESCAPE))


def _failed(program: str, error: OSError) -> int:
    with suppress(OSError, AttributeError):  # or Python repeats the error when it ends
        null_descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_descriptor, sys.stdout.fileno())
        os.close(null_descriptor)
    if not isinstance(error, BrokenPipeError):
        why = "it is closed" if error.errno == errno.EBADF else error.strerror or str(error)
        complain(program, f"standard output: {why}")
    return FAILED
