"""Ends both commands: catches every exception of a subcommand, so that no user sees a traceback.

A command has its own messages for the errors that it expects. Every other error becomes one line and an exit code here.
"""

import contextlib
import io
import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from .errors import KeyferryError
from .stdout import FAILED, complain, settle, show

__all__ = ["INTERRUPTED", "TRACEBACK", "guarded", "parse", "reason"]

INTERRUPTED: Final = 130
"""The exit code that shells report for SIGINT."""
TRACEBACK: Final = "KEYFERRY_TRACEBACK"
"""An environment variable. "1" adds the place in the code to the message about an internal error, and never a value."""
_FAILURE: Final = 1


def guarded(program: str, run: Callable[[], int]) -> int:
    """Run a command and return its exit code. For an exception, print at most one line and return a code for it.

    SystemExit is not caught, because argparse ends a command with it.
    """
    try:
        code = run()
    except SystemExit:
        raise
    except BaseException as error:
        code = _code_of(program, error)
    return settle(program, code)


def parse(program: str, parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Parse arguments. Print the texts of --help and --version with `stdout.show`, like every other result."""
    traceback_text = io.StringIO()
    try:
        with contextlib.redirect_stdout(traceback_text):
            return parser.parse_args(argv)
    except SystemExit:
        if text := traceback_text.getvalue():
            raise SystemExit(show(program, text.removesuffix("\n"))) from None
        raise


def reason(error: OSError) -> str:
    """Return the message for an OSError: the file's name, if the error has one, and the reason."""
    why = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        if isinstance(error, FileNotFoundError) and not _has_working_folder():
            return "the working folder no longer exists; name files by absolute paths"
        return why
    return f"{os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: {why}"


def _code_of(program: str, error: BaseException) -> int:
    causes = [*_leaves(error)]
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
        return INTERRUPTED
    cause = causes[0]
    if isinstance(cause, BrokenPipeError):  # a reader that has seen enough
        return FAILED
    if isinstance(cause, OSError):
        complain(program, reason(cause))
    elif isinstance(cause, KeyferryError):
        complain(program, str(cause))
    elif isinstance(cause, MemoryError):
        complain(program, "not enough memory")
    elif isinstance(cause, UnicodeError):
        complain(program, "an argument, or a file that it names, is not valid UTF-8 text")
        _trace(cause)
    else:
        complain(
            program,
            f"internal error: {type(cause).__name__} at {_place(cause)}; please report it "
            f"({TRACEBACK}=1 also prints the lines of code that led to it)",
        )
        _trace(cause)
    return _FAILURE


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions of a group, which trio raises, or the one exception."""
    if isinstance(error, BaseExceptionGroup):
        for cause in error.exceptions:
            yield from _leaves(cause)
    else:
        yield error


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "an unknown place"


def _trace(error: BaseException) -> None:
    # Do not print the texts of the exception and its causes: they may contain secrets.
    if os.environ.get(TRACEBACK) == "1":
        with contextlib.suppress(OSError):
            print("".join(traceback.format_tb(error.__traceback__)), end="", file=sys.stderr)


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True
