"""A share of one processor for a process, by a control group that is made for it: version 2, or version 1's cpu controller."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PERIOD_MICROSECONDS: Final = 100_000
_ROOT: Final = Path("/sys/fs/cgroup")


def has_cpu_quota() -> bool:
    """Return whether a control group with a quota can be made here."""
    try:
        with cpu_quota(50):
            return True
    except OSError:
        return False


@contextmanager
def cpu_quota(percent: int) -> Iterator[Callable[[], None]]:
    """Make a control group, and yield a function that moves the calling process into it.

    Raises OSError where no control group can be made.
    """
    version_2 = (_ROOT / "cgroup.controllers").exists()
    group = (_ROOT if version_2 else _ROOT / "cpu") / f"keyferry-test-{os.getpid()}"
    group.mkdir()
    try:
        quota = PERIOD_MICROSECONDS * percent // 100
        if version_2:
            (group / "cpu.max").write_text(f"{quota} {PERIOD_MICROSECONDS}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        yield lambda: _enter(group)
    finally:
        group.rmdir()


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text("0")
