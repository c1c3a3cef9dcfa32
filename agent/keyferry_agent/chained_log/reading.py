"""Reads one file of an audit log line by line in bounded memory. Detects compression by the content, not by the name."""

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, TypeAlias

__all__ = ["MAX_LINE", "ChainError", "Identity", "Line", "MovedError", "OtherLineError", "entry", "identity", "lines"]

MAX_LINE: Final = 1 << 20
"""Bytes of a line. An audit entry has fewer than 4,096, but a line of a compressed file can be larger than the memory."""
_COMPRESSED: Final = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bz2"),
    (b"\xfd7zXZ\0", "lzma"),
    (b"\x5d\0\0", "lzma"),
)
"""First bytes of a file, and the module whose `open` reads it. Imported on demand, since a serving agent needs none of them."""
_MAX_MAGIC_BYTES: Final = 6
_CLAIMS: Final = (b'"event": "audit', b'"previous": "')
"""Parts of a line by which it counts as an audit entry, even if it is damaged."""
_UNREADABLE: Final = (
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x1f\x9d", "compress"),
    (b"LZIP", "lzip"),
    (b"PK\x03\x04", "zip"),
)
"""First bytes of formats that Python's standard library cannot read, and the program that writes each."""

Identity: TypeAlias = tuple[int, int]
"""Device and inode, which stay the same when a file is renamed."""


class ChainError(Exception):
    """An audit log cannot be read or verified. The message names the file, and the line if there is one."""


class MovedError(ChainError):
    """Another file has the name now, because a log rotation is in progress."""


class OtherLineError(ChainError):
    """A line does not look like an audit entry, such as a line that systemd writes into a unit's journal."""


class Line(NamedTuple):
    """A line without its newline, its number, and its fault, if any: the newline is missing, or the line is too long."""

    number: int
    text: bytes
    fault: str


def identity(status: os.stat_result) -> Identity:
    """Return the device and inode of a file, which identify it under any name."""
    return status.st_dev, status.st_ino


def lines(path: Path, file_identity: Identity | None = None) -> Iterator[Line]:
    """Yield the lines of a file.

    Raises OSError, `ChainError` if the compressed data is damaged, and `MovedError` if the file has another identity.
    """
    with open(path, "rb") as file:
        if file_identity is not None and identity(os.fstat(file.fileno())) != file_identity:
            raise MovedError(
                f"{path}: another file has this name now, because a log rotation is in progress; try again"
            )
        number = 0
        stream = _decompressed(path, file)
        while text := _read_line(path, stream):
            number += 1
            if text.endswith(b"\n"):
                yield Line(number, text[:-1], "")
            elif len(text) < MAX_LINE:
                yield Line(number, text, "cut off")
            else:
                yield Line(number, text, f"longer than {MAX_LINE} bytes")
                while (part := _read_line(path, stream)) and not part.endswith(b"\n"):
                    pass


def entry(path: Path, line: Line) -> dict[str, Any] | None:
    """Return a line's audit entry; None for other lines of the agent's log.

    Raises `OtherLineError` for an invalid line that does not look like an audit entry, and `ChainError` for one that does.
    """
    fault, fields = line.fault, None
    if not fault:
        with suppress(ValueError, RecursionError):
            fields = json.loads(line.text)
        if not isinstance(fields, dict):
            fault = "not a line of an audit log"
    if fields is None or fault:
        is_other = not line.fault and not any(claim in line.text for claim in _CLAIMS)
        raise (OtherLineError if is_other else ChainError)(f"{path}, line {line.number}: {fault}")
    return fields if fields.get("event") == "audit" or "previous" in fields else None


def _decompressed(path: Path, file: Any) -> BinaryIO:
    head = file.peek(_MAX_MAGIC_BYTES)
    for magic, program in _UNREADABLE:
        if head.startswith(magic):
            raise ChainError(f"{path}: compressed with {program}, which cannot be read here; decompress it first")
    for magic, module in _COMPRESSED:
        if head.startswith(magic):
            try:
                decompressed: BinaryIO = importlib.import_module(module).open(file)
            except ImportError:
                raise ChainError(f"{path}: this Python was built without {module}; decompress it first") from None
            return decompressed
    stream: BinaryIO = file
    return stream


def _read_line(path: Path, stream: BinaryIO) -> bytes:
    try:
        return stream.readline(MAX_LINE)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        # Each decompressor has its own error: EOFError, zlib.error, lzma.LZMAError, or an OSError without a number.
        raise ChainError(f"{path}: the compressed data is damaged or cut off: {error}") from None
