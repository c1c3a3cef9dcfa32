"""Parses times on the command line of `audit who`: dates, durations before now, and names of days."""

import argparse
import re
from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = ["EXPECTED", "since", "until"]

EXPECTED: Final = (
    "a time like 2026-01-31, 2026-01-31T12:00:00Z, 2h or 3d (ago), today, yesterday, or monday; "
    "without a time zone, this host's applies"
)
_AGO: Final = re.compile(r"(\d{1,6})(min|[mhdw])")
_UNITS: Final = {"m": "minutes", "min": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_DATE: Final = re.compile(r"\d{4}-?\d{2}-?\d{2}")
_LATEST: Final = datetime.max.replace(tzinfo=UTC)


def since(text: str) -> datetime:
    """Return the time that `--since` names; for a day, its beginning. Raises `ArgumentTypeError`."""
    return _time(text)[0]


def until(text: str) -> datetime:
    """Return the time that `--until` names; for a day, its end. Raises `ArgumentTypeError`."""
    time, is_day = _time(text)
    if not is_day:
        return time
    try:
        return (time + timedelta(days=1)).astimezone()
    except OverflowError:
        return _LATEST


def _time(text: str) -> tuple[datetime, bool]:
    """Return a time, and whether the text names a whole day, whose beginning the time is."""
    word = text.strip().lower()
    now = datetime.now().astimezone()
    try:
        if word == "now":
            return now, False
        if match := _AGO.fullmatch(word):
            return now - timedelta(**{_UNITS[match[2]]: int(match[1])}), False
        if (days := _days_ago(word, now)) is not None:
            midnight = now.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
            return (midnight - timedelta(days=days)).astimezone(), True
        return datetime.fromisoformat(text.strip()).astimezone(), bool(_DATE.fullmatch(word))
    except (ValueError, OverflowError, OSError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: expected {EXPECTED}") from None


def _days_ago(word: str, now: datetime) -> int | None:
    """Return how many days ago a named day was, or None for another word. A weekday is the last one, which may be today."""
    if word in ("today", "yesterday"):
        return int(word == "yesterday")
    return (now.weekday() - _DAYS.index(word)) % 7 if word in _DAYS else None
