"""Writes plaintext with holes: a block of zeros takes no space on the disk."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Final

__all__ = ["SparseWriter"]

_BLOCK: Final = 4_096
"""Size of the smallest hole, in bytes: the block size of common file systems."""
_ZEROS: Final = bytes(_BLOCK)


class SparseWriter(io.BufferedWriter):
    """Writes a new, empty file from its beginning. Whole blocks of zeros are skipped; `finish` gives the file its length.

    Closing the writer leaves the descriptor open.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(_Skipping(descriptor, "wb", closefd=False))

    def finish(self) -> None:
        """Write the buffered bytes, and extend the file over a hole at its end."""
        self.flush()
        end = self.raw.tell()
        if end > os.fstat(self.fileno()).st_size:
            os.ftruncate(self.fileno(), end)

    @contextmanager
    def reading_back(self) -> Iterator[BinaryIO]:
        """Finish the file, and lend a file that reads its content. The descriptor must be open for reading, too."""
        self.finish()
        with open(os.dup(self.fileno()), "rb") as file:
            file.seek(0)
            yield file
            file.seek(0, os.SEEK_END)  # both descriptors share one file offset


class _Skipping(io.FileIO):
    def write(self, data: Any, /) -> int:
        """Write the blocks before the first block of zeros, or skip leading blocks of zeros. Returns the number of bytes."""
        with memoryview(data) as view:
            size = len(view)
            blocks = size // _BLOCK
            zero_blocks = 0
            while zero_blocks < blocks and _is_zeros(view, zero_blocks):
                zero_blocks += 1
            if zero_blocks:
                self.seek(zero_blocks * _BLOCK, os.SEEK_CUR)
                return zero_blocks * _BLOCK
            end = next((block for block in range(1, blocks) if _is_zeros(view, block)), None)
            return super().write(view if end is None else view[: end * _BLOCK])


def _is_zeros(view: memoryview, block: int) -> bool:
    start = block * _BLOCK
    return not view[start] and view[start : start + _BLOCK].tobytes() == _ZEROS
