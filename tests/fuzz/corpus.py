"""The corpora: for each target a few small inputs with all coverage so far, and all inputs that broke a promise.

A file that the fuzzer found has its SHA-1 as its name; files with other names stay. The fuzzer is not needed here.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeAlias

__all__ = ["CORPUS", "FOUND", "grow", "kept"]

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).with_name("corpus")
FOUND = ROOT / ".cache" / "fuzz"
"""Where the fuzzer's own corpora grow, and its findings are; not in the repository."""
_BY_HASH = re.compile(r"[0-9a-f]{40}")
_READERS = ("/keyferry/", "/keyferry_agent/")

Reached: TypeAlias = set[tuple[CodeType, int, int]]
"""Steps from one line of a function to another."""


def kept(target: str) -> list[Path]:
    """The files of a target's corpus, always in the same order."""
    return sorted((CORPUS / target).iterdir())


def grow(target: str, run: Callable[[bytes], None]) -> tuple[int, int]:
    """Take the smallest of what the fuzzer has found that reaches more than what is there; say how many files were dropped and
    taken.
    """
    named = [path for path in kept(target) if not _BY_HASH.fullmatch(path.name)]
    by_hash = [path for path in kept(target) if path not in named]
    reached: Reached = set()
    for path in named:
        reached |= _reached(run, path.read_bytes())
    candidates = {path.read_bytes() for path in [*by_hash, *_files(FOUND / target)]}
    wanted = []
    for data in sorted(candidates, key=lambda data: (len(data), data)):
        more = _reached(run, data)
        if not more <= reached:
            reached |= more
            wanted.append(data)
    names = {hashlib.sha1(data).hexdigest(): data for data in wanted}
    dropped = [path for path in by_hash if path.name not in names]
    for path in dropped:
        path.unlink()
    new = [name for name in names if not (CORPUS / target / name).exists()]
    for name in new:
        (CORPUS / target / name).write_bytes(names[name])
    return len(dropped), len(new)


def _files(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _reached(run: Callable[[bytes], None], data: bytes) -> Reached:
    reached: Reached = set()

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        if not any(part in frame.f_code.co_filename for part in _READERS):
            return None
        last = 0

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                reached.add((frame.f_code, last, frame.f_lineno))
                last = frame.f_lineno
            return step

        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        with suppress(AssertionError):  # the target's memory count includes these entries
            run(data)
    finally:
        sys.settrace(before)
    return reached
