"""The head of an HTTP/1.1 request: bytes in, a checked head out. No I/O.

Libraries for HTTP parse a head completely before they judge it, and accept forms that proxies read in different ways: two equal
Content-Length, bare LF, folded lines, Transfer-Encoding beside Content-Length (RFC 9112, sections 2.2, 5.2 and 6.3). So this
module limits the bytes first, and then accepts one form of each line. A test compares it with h11, which accepts more.
"""

import re
from typing import Final, NamedTuple

from .chunked import ChunkedBody
from .refusals import HttpRefusal

__all__ = ["MAX_BODY_BYTES", "MAX_HEAD_BYTES", "Head", "HeadReader"]

MAX_LINE_BYTES: Final = 262_144
"""Bytes of a request line. ReEncrypt of 6,144 bytes with two contexts of emoji has some 217 KiB."""
MAX_HEADER_BYTES: Final = 16_384
"""Bytes of all header lines together."""
MAX_HEADERS: Final = 64
"""Number of header lines."""
MAX_BODY_BYTES: Final = 262_144
"""Bytes of a body, for the same reason as those of a request line."""
MAX_HEAD_BYTES: Final = MAX_LINE_BYTES + MAX_HEADER_BYTES + 4
_CRLF: Final = b"\r\n"
_END: Final = b"\r\n\r\n"
_LINE: Final = re.compile(rb"([A-Z]+) (/[!-\"$-~]*) HTTP/([0-9]\.[0-9])")
"""A method in upper case, a target in origin form without `#`, and a version."""
_FIELD: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
"""A token of RFC 9110, directly before its colon, and a value without control characters but tabs."""
_LENGTH: Final = re.compile(rb"[0-9]{1,7}")
_VERSIONS: Final = (b"1.0", b"1.1")


class Head(NamedTuple):
    """A checked head. `headers`: values by name in lower case, in their order, without white space at their ends."""

    method: str
    target: str
    headers: dict[str, list[str]]
    body_bytes: int
    """The value of Content-Length; 0 for a chunked body."""
    is_chunked: bool
    expects_continue: bool
    keep_alive: bool

    def values(self, name: str) -> list[str]:
        """Return the values of all headers with this name."""
        return self.headers.get(name, [])

    def value(self, name: str) -> str:
        """Return the value of the first header with this name; an empty text without one."""
        values = self.headers.get(name)
        return values[0] if values else ""


class HeadReader:
    """Collects the bytes of one connection, and returns a head as soon as it is complete."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        """Received bytes that belong to no request yet."""
        self._searched = 0
        self._chunked_body: ChunkedBody | None = None

    def feed(self, data: bytes | bytearray) -> None:
        """Add received bytes."""
        self.buffer += data

    def take_head(self) -> Head | None:
        """Remove and return the next head, or return None if it is incomplete. Raises `HttpRefusal`."""
        while self.buffer.startswith(_CRLF):  # empty lines before a request line are ignored (RFC 9112, section 2.2)
            del self.buffer[:2]
        end = self.buffer.find(_END, max(0, self._searched - 3))
        self._searched = len(self.buffer)
        if end < 0:
            _check_incomplete(self.buffer)
            return None
        head = bytes(self.buffer[: end + len(_END)])
        del self.buffer[: end + len(_END)]
        self._searched = 0
        return _parse(head)

    def take_body(self, head: Head) -> bytes | None:
        """Remove and return the body that follows a head, or return None if it is incomplete. Raises `HttpRefusal`."""
        if head.is_chunked:
            if self._chunked_body is None:
                self._chunked_body = ChunkedBody(MAX_BODY_BYTES)
            content = self._chunked_body.take(self.buffer)
            if content is not None:
                self._chunked_body = None
            return content
        if len(self.buffer) < head.body_bytes:
            return None
        body = bytes(self.buffer[: head.body_bytes])
        del self.buffer[: head.body_bytes]
        return body


def _check_incomplete(received: bytearray) -> None:
    """Raise `HttpRefusal` as soon as a head cannot become valid, so that its bytes need not be kept."""
    line_end = received.find(_CRLF)
    line_bytes = len(received) if line_end < 0 else line_end  # not copied: a client may send a long line byte by byte
    fields = b"" if line_end < 0 else bytes(received[line_end + len(_CRLF) :])
    is_split = received.endswith(b"\r")  # between CR and LF
    _check_sizes(line_bytes - (is_split and line_end < 0), fields.removesuffix(b"\r"))
    if received.find(b"\n", 0, line_bytes) >= 0 or b"\n" in fields.replace(_CRLF, b""):
        raise _bad_request("a line ends in a bare LF")


def _check_sizes(line_bytes: int, fields: bytes) -> None:
    if line_bytes > MAX_LINE_BYTES:
        raise HttpRefusal(414, "RequestURITooLong", f"The request line has more than {MAX_LINE_BYTES} bytes.")
    if len(fields) > MAX_HEADER_BYTES or fields.count(b"\n") > MAX_HEADERS:
        raise HttpRefusal(
            431,
            "RequestHeaderFieldsTooLarge",
            f"The headers have more than {MAX_HEADER_BYTES} bytes or {MAX_HEADERS} lines.",
        )


def _parse(head: bytes) -> Head:
    line, _, fields = head[: -len(_CRLF)].partition(_CRLF)
    _check_sizes(len(line), fields)
    match = _LINE.fullmatch(line)
    if match is None:
        raise _bad_request("the request line is not METHOD /TARGET HTTP/1.1 in printable ASCII")
    if match[3] not in _VERSIONS:
        raise HttpRefusal(505, "HTTPVersionNotSupported", "HTTP/1.1 is expected.")
    method, target = match[1].decode("ascii"), match[2].decode("ascii")
    return _checked(method, target, _headers(fields), is_1_1=match[3] == b"1.1")


def _headers(fields: bytes) -> dict[str, list[str]]:
    """Return the values of complete header lines by their names."""
    headers: dict[str, list[str]] = {}
    for field in fields.split(_CRLF)[:-1]:
        match = _FIELD.fullmatch(field)
        if match is None:
            raise _bad_request(
                "a header line is folded, has a bare CR, a bare LF or another control character, or is not NAME: VALUE "
                "without white space before the colon"
            )
        name = match[1].lower().decode("ascii")
        headers.setdefault(name, []).append(match[2].rstrip(b" \t").decode("latin-1"))
    return headers


def _checked(method: str, target: str, headers: dict[str, list[str]], *, is_1_1: bool) -> Head:
    if len(headers.get("host", ())) != 1:
        raise _bad_request("one Host header is expected")
    is_chunked = _is_chunked(headers, is_1_1=is_1_1)
    lengths = headers.get("content-length", [])
    if len(lengths) > 1 or not all(_LENGTH.fullmatch(length.encode("latin-1")) for length in lengths):
        raise _bad_request("one Content-Length of at most seven digits is expected")
    body_bytes = int(lengths[0]) if lengths else 0
    if body_bytes > MAX_BODY_BYTES:
        raise HttpRefusal(413, "RequestEntityTooLarge", f"The body has more than {MAX_BODY_BYTES} bytes.")
    expectations = [value.lower() for value in headers.get("expect", ())]
    if expectations not in ([], ["100-continue"]):
        raise HttpRefusal(417, "ExpectationFailed", "Expect: only 100-continue is supported.")
    options = [option.strip().lower() for value in headers.get("connection", ()) for option in value.split(",")]
    return Head(
        method=method,
        target=target,
        headers=headers,
        body_bytes=body_bytes,
        is_chunked=is_chunked,
        expects_continue=bool(expectations) and is_1_1,
        keep_alive=is_1_1 and "close" not in options,
    )


def _is_chunked(headers: dict[str, list[str]], *, is_1_1: bool) -> bool:
    """Return whether the body is chunked. Raises `HttpRefusal` for another coding, and for two statements about the length."""
    codings = [value.lower() for value in headers.get("transfer-encoding", ())]
    if not codings:
        return False
    if codings != ["chunked"] or "content-length" in headers or not is_1_1:
        raise HttpRefusal(
            411,
            "MissingContentLength",
            "Transfer-Encoding: only chunked is supported, in HTTP/1.1, and without Content-Length.",
        )
    return True


def _bad_request(why: str) -> HttpRefusal:
    return HttpRefusal(400, "BadRequest", f"The request is not valid HTTP/1.1: {why}.")
