"""Writes a result to a file that appears complete, or not at all (`new_files.replacing`), with its attributes and holes."""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from .. import descriptors, new_files
from .attributes import Attributes
from .header import FileError
from .sparse import SparseWriter

__all__ = ["check_not_source", "check_place", "replacing"]


@contextlib.contextmanager
def replacing(
    path: str, *, source: BinaryIO | None = None, mode: int = 0o600, attributes: Attributes | None = None
) -> Iterator[SparseWriter]:
    """Lend a file to write to; at the end of the block, it replaces the file at `path`, and is on the disk.

    When the block raises, the file at `path` is unchanged. `source` is the file that the block reads; a path to the same file
    is refused. The new file gets the `attributes`. Without them, it keeps the mode, owner and group of the file that it
    replaces, and a file that replaces none has the `mode`. Blocks of zeros become holes. Raises OSError, and `FileError` for a
    path that is not a place for a file.
    """
    status = check_place(path, source)
    if attributes is None and status is not None:
        attributes = Attributes.of_replaced(status)
    # Until it is complete, a file that will get attributes is private to this user.
    with (
        new_files.replacing(path, 0o600 if attributes else mode) as descriptor,
        SparseWriter(descriptor) as file,
    ):
        yield file
        with new_files.naming(path):
            file.finish()
            if attributes is not None:
                attributes.apply(descriptor)


def check_place(path: str, source: BinaryIO | None = None) -> os.stat_result | None:
    """Check that a path is a place for a result, which is made from `source`; return the status of a file to be replaced.

    A command also calls the function before any work is done for the result. Raises `FileError`, OSError.
    """
    if not path:
        raise FileError("OUT is empty; - is standard output")
    if descriptors.find_output(path) is not None:
        raise FileError(f"{path}: leads to an open descriptor, which is not a place for a file; - is standard output")
    real_path = os.path.realpath(path)  # a rename would replace a symlink, not the file it names
    try:
        status = os.stat(real_path)
    except FileNotFoundError:
        if not os.path.basename(path):
            raise FileError(f"{path}: ends with a slash; name a file in a folder") from None
        return None
    if stat.S_ISDIR(status.st_mode):
        raise FileError(f"{path}: a folder, not a regular file; name a file in it, or - for standard output")
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{real_path}: not a regular file; - is standard output")
    if not os.path.basename(path):
        raise FileError(f"{path}: ends with a slash, and is not a folder")
    check_not_source(path, status, source)
    return status


def check_not_source(path: str, status: os.stat_result, source: BinaryIO | None) -> None:
    """Check that a result does not replace the file that it is made from. Raises `FileError`."""
    if source is not None and os.path.samestat(status, os.fstat(source.fileno())):
        raise FileError(f"{path}: OUT is the same file as IN; name another OUT")
