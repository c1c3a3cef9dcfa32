"""The chunked transfer coding of a request's body: bytes in, the body out. No I/O.

The SDK for Java sends every body in chunks, an empty one too. The form is stricter than RFC 9112, section 7.1: chunk extensions
and trailers are refused, because programs read them in different ways, and no SDK sends them.
"""

import re
from typing import Final

from .refusals import HttpRefusal

__all__ = ["ChunkedBody"]

MAX_OVERHEAD_BYTES: Final = 16_384
"""Bytes of a chunked body besides its content: sizes and line ends. A client that sends 8 KiB at once needs some 300."""
_CRLF: Final = b"\r\n"
_SIZE: Final = re.compile(rb"[0-9A-Fa-f]{1,6}")
_MAX_SIZE_LINE_BYTES: Final = 8


class ChunkedBody:
    """Finds the chunks of one body at the beginning of a buffer. `max_bytes`: the limit of the body's content."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._position = 0
        self._size = 0
        self._chunks: list[tuple[int, int]] = []

    def take(self, buffer: bytearray) -> bytes | None:
        """Remove the body from the buffer and return its content, or return None if it is incomplete.

        Call it again with the same buffer after more bytes were appended. Raises `HttpRefusal`.
        """
        while (start := self._next_chunk(buffer)) is not None:
            size = int(buffer[self._position : start - len(_CRLF)], 16)
            end = start + size + len(_CRLF)
            self._check_size(size, end)
            if len(buffer) < end:
                return None
            if buffer[end - len(_CRLF) : end] != _CRLF:
                raise _refused("a chunk is not followed by CR LF, or there are trailers")
            self._position = end
            if size == 0:
                return self._remove(buffer)
            self._size += size
            self._chunks.append((start, start + size))
        return None

    def _next_chunk(self, buffer: bytearray) -> int | None:
        """Return where the content of the next chunk starts, or None if the line with its size is incomplete."""
        line_end = buffer.find(_CRLF, self._position, self._position + _MAX_SIZE_LINE_BYTES)
        line = bytes(buffer[self._position : self._position + _MAX_SIZE_LINE_BYTES if line_end < 0 else line_end])
        if line_end < 0 and len(line) < _MAX_SIZE_LINE_BYTES and _SIZE.fullmatch(line.removesuffix(b"\r") or b"0"):
            return None
        if line_end < 0 or not _SIZE.fullmatch(line):
            raise _refused("the size of a chunk is not one to six hexadecimal digits and CR LF")
        return line_end + len(_CRLF)

    def _check_size(self, size: int, end: int) -> None:
        if self._size + size > self._max_bytes or end - self._size - size > MAX_OVERHEAD_BYTES:
            raise HttpRefusal(
                413, "RequestEntityTooLarge", f"The body has more than {self._max_bytes} bytes, or too many chunks."
            )

    def _remove(self, buffer: bytearray) -> bytes:
        content = b"".join(bytes(buffer[start:end]) for start, end in self._chunks)
        del buffer[: self._position]
        return content


def _refused(why: str) -> HttpRefusal:
    return HttpRefusal(400, "BadRequest", f"The request is not valid HTTP/1.1: {why}.")
