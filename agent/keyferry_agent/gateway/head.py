"""The head of an HTTP/1.1 request: bytes in, a checked head out. No I/O.

h11 parses a head completely before it judges the head, and accepts forms that proxies read in different ways: two equal
Content-Length, bare LF, folded lines, Transfer-Encoding beside Content-Length (RFC 9112, sections 2.2, 5.2 and 6.3). So this
module limits and checks the bytes first, and then hands h11 exactly one head.
"""

import re
from typing import Final, NamedTuple

import h11

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
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""A token of RFC 9110: a header's name, directly before its colon."""
_LENGTH: Final = re.compile(rb"[0-9]{1,7}")
_VERSIONS: Final = (b"1.0", b"1.1")


class Head(NamedTuple):
    """A checked head. Names of headers are in lower case; values have no white space at their ends."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body_bytes: int
    """The value of Content-Length; 0 for a chunked body."""
    is_chunked: bool
    expects_continue: bool
    keep_alive: bool
    connection: h11.Connection
    """The state of h11, which frames the answer."""

    def values(self, name: str) -> list[str]:
        """Return the values of all headers with this name."""
        return [value for header, value in self.headers if header == name]

    def value(self, name: str) -> str:
        """Return the value of the first header with this name; an empty text without one."""
        return next(iter(self.values(name)), "")


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
    line, _, fields = received.partition(_CRLF)
    _check_sizes(bytes(line), fields)
    if b"\n" in line or b"\n" in fields.replace(_CRLF, b""):
        raise _bad_request("a line ends in a bare LF")


def _check_sizes(line: bytes, fields: bytes | bytearray) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise HttpRefusal(414, "RequestURITooLong", f"The request line has more than {MAX_LINE_BYTES} bytes.")
    if len(fields) > MAX_HEADER_BYTES or fields.count(b"\n") > MAX_HEADERS:
        raise HttpRefusal(
            431,
            "RequestHeaderFieldsTooLarge",
            f"The headers have more than {MAX_HEADER_BYTES} bytes or {MAX_HEADERS} lines.",
        )


def _parse(head: bytes) -> Head:
    line, _, fields = head[: -len(_CRLF)].partition(_CRLF)
    _check_sizes(line, fields)
    _check_line(line)
    _check_fields(fields)
    # _check_sizes has enforced the limits, so h11's own limit never applies.
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
    connection.receive_data(head)
    try:
        request = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise _bad_request(str(error)) from None
    if not isinstance(request, h11.Request):
        raise _bad_request("the head is not that of a request")
    headers = [(name.decode("ascii"), value.decode("latin-1").strip()) for name, value in request.headers]
    return _checked(request, headers, connection)


def _check_line(line: bytes) -> None:
    match = _LINE.fullmatch(line)
    if match is None:
        raise _bad_request("the request line is not METHOD /TARGET HTTP/1.1 in printable ASCII")
    if match[3] not in _VERSIONS:
        raise HttpRefusal(505, "HTTPVersionNotSupported", "HTTP/1.1 is expected.")


def _check_fields(fields: bytes) -> None:
    if b"\0" in fields or b"\n" in fields.replace(_CRLF, b"") or b"\r" in fields.replace(_CRLF, b""):
        raise _bad_request("a header line contains NUL, a bare CR or a bare LF")
    for field in fields.split(_CRLF)[:-1]:
        name, colon, _ = field.partition(b":")
        if not colon or not _NAME.fullmatch(name):
            raise _bad_request("a header line is folded, or is not NAME: VALUE without white space before the colon")


def _checked(request: h11.Request, headers: list[tuple[str, str]], connection: h11.Connection) -> Head:
    names = [name for name, _ in headers]
    if names.count("host") != 1:
        raise _bad_request("one Host header is expected")
    is_chunked = _is_chunked(request, headers)
    lengths = [value for name, value in headers if name == "content-length"]
    if len(lengths) > 1 or not all(_LENGTH.fullmatch(length.encode("latin-1")) for length in lengths):
        raise _bad_request("one Content-Length of at most seven digits is expected")
    body_bytes = int(lengths[0]) if lengths else 0
    if body_bytes > MAX_BODY_BYTES:
        raise HttpRefusal(413, "RequestEntityTooLarge", f"The body has more than {MAX_BODY_BYTES} bytes.")
    expectations = [value.lower() for name, value in headers if name == "expect"]
    if expectations not in ([], ["100-continue"]):
        raise HttpRefusal(417, "ExpectationFailed", "Expect: only 100-continue is supported.")
    options = [option.strip().lower() for name, value in headers if name == "connection" for option in value.split(",")]
    return Head(
        method=request.method.decode("ascii"),
        target=request.target.decode("ascii"),
        headers=headers,
        body_bytes=body_bytes,
        is_chunked=is_chunked,
        expects_continue=bool(expectations) and request.http_version == b"1.1",
        keep_alive=request.http_version == b"1.1" and "close" not in options,
        connection=connection,
    )


def _is_chunked(request: h11.Request, headers: list[tuple[str, str]]) -> bool:
    """Return whether the body is chunked. Raises `HttpRefusal` for another coding, and for two statements about the length."""
    codings = [value.lower() for name, value in headers if name == "transfer-encoding"]
    if not codings:
        return False
    has_length = any(name == "content-length" for name, _ in headers)
    if codings != ["chunked"] or has_length or request.http_version != b"1.1":
        raise HttpRefusal(
            411,
            "MissingContentLength",
            "Transfer-Encoding: only chunked is supported, in HTTP/1.1, and without Content-Length.",
        )
    return True


def _bad_request(why: str) -> HttpRefusal:
    return HttpRefusal(400, "BadRequest", f"The request is not valid HTTP/1.1: {why}.")
