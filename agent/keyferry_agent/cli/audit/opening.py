"""Opens the audit log for a command, and reports which files were read and from which time on the log is complete."""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from keyferry.stdout import complain

from ...audit import rotated
from ...audit.history import History
from ...audit.scan import Tally
from ...chained_log import chain
from ...config.settings import Settings

__all__ = ["open_history", "report", "say", "time_text"]

_MAX_PROBLEMS: Final = 20
"""Problems that are printed one by one."""
_MAX_ATTEMPTS: Final = 5
"""Attempts to read all files while log rotation renames them."""


def open_history(
    files: Sequence[Path], settings: Settings | None, tally: Callable[[], Tally] | None, *, option: str = "files"
) -> History:
    """Read the named files, or the files of the configuration if none is named. Raises `ChainError`."""
    if files:
        paths = dict.fromkeys(files)
        neighbours = [
            f"{path}: looks like a rotated file of this audit log; name it, too" for path in rotated.not_among(paths)
        ]
        return History([rotated.File(path, mixed=True) for path in paths], unnamed_files=neighbours, tally=tally)
    if settings is None or settings.audit.path == "stderr":
        location = (
            ": it goes to standard error, and journalctl -o cat prints it for a unit"
            if settings
            else ", or use --config to find them"
        )
        raise chain.ChainError(f"name the {option} of the audit log{location}")
    current = Path(settings.audit.path)
    log_files = rotated.find(current)
    for _ in range(_MAX_ATTEMPTS):
        history = History(log_files.files, problems=log_files.problems, current=current, tally=tally)
        old_files, log_files = log_files, rotated.find(current)
        if not history.moved and old_files == log_files:
            break
    return history


def report(history: History, since: datetime | None) -> None:
    """Print which files were read, and from which time on the audit log is complete."""
    if history.files:
        say(f"read, oldest first: {', '.join(map(str, history.files))}")
    for text in history.notes:
        say(text)
    for problem in history.problems[:_MAX_PROBLEMS]:
        say(problem.text)
    if len(history.problems) > _MAX_PROBLEMS:
        say(f"and {len(history.problems) - _MAX_PROBLEMS} more problems")
    end = time_text(history.ends)
    if not history.problems:
        say(f"the audit log is complete from its beginning, {time_text(history.begins)}, to {end}")
    elif history.is_complete(since):
        say(
            f"the audit log is complete from {time_text(history.healed)} to {end}, which includes all entries since --since"
        )
    elif history.healed is not None:
        say(f"THE AUDIT LOG IS INCOMPLETE: it is complete from {time_text(history.healed)} to {end} only")
    else:
        say("THE AUDIT LOG IS INCOMPLETE")


def say(text: str) -> None:
    """Print a line on standard error."""
    complain("keyferry-agent", text)


def time_text(time: datetime | None) -> str:
    """Return a time in the form in which it is printed."""
    return "an unknown time" if time is None else time.isoformat(timespec="milliseconds")
