"""Opens IN and OUT of the commands for files: a file, a standard stream, or an open descriptor that a path leads to.

Needs the extra `module`: the commands import it when they run.
"""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, BinaryIO, Final

from .. import descriptors, streams
from ..files import Attributes, FileError, replacing
from ..files.atomic import check_not_source, check_place
from ..files.sparse import SparseWriter
from .common import Failed, usage

__all__ = ["Target", "in_place", "source"]

_STANDARD: Final = "-"
_STANDARD_INPUT: Final = 0
_STANDARD_OUTPUT: Final = 1


@contextmanager
def source(path: str) -> Iterator[BinaryIO]:
    """Lend the file to be read. `-` means standard input, and a path to an open descriptor means that descriptor."""
    if not path:
        raise Failed("IN is empty; - is standard input")
    if path == _STANDARD and not descriptors.allows_reading(_STANDARD_INPUT):
        raise Failed("-: standard input is closed")
    with streams.reader(_STANDARD_INPUT) if path == _STANDARD else descriptors.open_to_read(path) as file:
        yield file


@contextmanager
def in_place(path: str, source: BinaryIO, *, preserve: bool) -> Iterator[SparseWriter]:
    """Lend a file that replaces the source at the end of the block, with the source's mode, owner and group.

    With `preserve`, also with its times. Raises `Failed` for a source that cannot be replaced, and `FileError` if another
    process changed or replaced the source meanwhile; then the source is left as it is.
    """
    status = os.fstat(source.fileno())
    if path == _STANDARD or descriptors.find(path) is not None or not stat.S_ISREG(status.st_mode):
        raise Failed(f"{path}: not a regular file with a name, and cannot be replaced; name an OUT")
    if status.st_nlink > 1:
        raise Failed(
            f"{path}: has {status.st_nlink} names (hard links), of which only one would be replaced; name an OUT"
        )
    with replacing(path, attributes=Attributes.of_original(status) if preserve else None) as out:
        yield out
        current = os.stat(path)
        size_and_time = current.st_size, current.st_mtime_ns
        if not os.path.samestat(current, status) or size_and_time != (status.st_size, status.st_mtime_ns):
            raise FileError(f"{path}: another process changed the file meanwhile; it was left unchanged")


class Target:
    """The destination of a result. Create it before opening any other file, whose descriptor OUT could name by mistake."""

    def __init__(self, path: str, *, preserve: bool) -> None:
        self._path = path
        self._descriptor = _STANDARD_OUTPUT if path == _STANDARD else descriptors.find_output(path)
        if path == _STANDARD and not descriptors.allows_writing(_STANDARD_OUTPUT):
            raise Failed("-: standard output is closed")
        self._preserve = preserve
        if self._descriptor is None:
            check_place(path)
        elif preserve:
            usage(f"--preserve sets the mode of a new file; OUT {path} is an open descriptor")

    def is_terminal(self) -> bool:
        """Return True if the result would appear on a terminal."""
        return self._descriptor is not None and os.isatty(self._descriptor)

    def open(self, source: BinaryIO, *, mode: int, after_all: bool) -> AbstractContextManager[BinaryIO]:
        """Return a context that yields the file for the result. With `after_all`, it appears only when it is complete."""
        status = os.fstat(source.fileno())
        if self._descriptor is None:
            if self._preserve and not stat.S_ISREG(status.st_mode):
                usage("--preserve needs an IN that is a regular file")
            attributes = Attributes.of_original(status) if self._preserve else None
            return replacing(self._path, source=source, mode=mode, attributes=attributes)
        output_status = os.fstat(self._descriptor)
        if stat.S_ISREG(output_status.st_mode):
            check_not_source(self._path, output_status, source)
        return _spooled(self._descriptor) if after_all else _direct(self._descriptor)


@contextmanager
def _direct(descriptor: int) -> Iterator[BinaryIO]:
    """Lend a descriptor with its own buffer, so that Python does not try to write remaining bytes again at exit."""
    file = streams.writer(descriptor)
    try:
        yield file
        file.flush()
    finally:
        with suppress(OSError):
            file.close()


@contextmanager
def _spooled(descriptor: int) -> Iterator[BinaryIO]:
    """Lend an unnamed file in $TMPDIR, and copy it to the descriptor at the end of the block."""
    with _naming_tmpdir():
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - only the errors of opening are about $TMPDIR
    with file, _Spool(file.fileno()) as spool:
        yield spool
        spool.finish()
        file.seek(0)
        with _direct(descriptor) as out:
            shutil.copyfileobj(file, out)


class _Spool(SparseWriter):
    """The file in $TMPDIR. Its errors name that folder, which no other error of the command does."""

    def write(self, data: Any, /) -> int:
        with _naming_tmpdir():
            return super().write(data)

    def flush(self) -> None:
        with _naming_tmpdir():
            super().flush()


@contextmanager
def _naming_tmpdir() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = " is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise Failed(
            f"$TMPDIR ({_tmpdir()}){reason}: {error.strerror}; the plaintext is kept there until all of it is authentic; "
            "set TMPDIR to a folder with room for it"
        ) from None


def _tmpdir() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:
        return os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - only named
