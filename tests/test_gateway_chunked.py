"""Chunked bodies: decoded from any pieces, strict about their form, bounded, and served like other bodies."""

import json
from pathlib import Path
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.gateway import UNKNOWN_ID, Credentials, connect, prepare, serving_gateway, v1_parameters

from keyferry_agent.gateway.chunked import MAX_OVERHEAD_BYTES, ChunkedBody
from keyferry_agent.gateway.head import MAX_BODY_BYTES, HeadReader
from keyferry_agent.gateway.refusals import HttpRefusal

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def chunked(*parts: bytes) -> bytes:
    """Return the encoding of parts, with the last, empty chunk."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


@pytest.mark.parametrize("parts", [[], [b"a"], [b"Action=ListKeys", b"&Format=JSON"], [b"x" * 8_192] * 32])
def test_a_chunked_body_is_decoded_in_any_pieces(parts: list[bytes]) -> None:
    """Whole, or byte by byte; bytes after it stay in the buffer."""
    encoded, content = chunked(*parts), b"".join(parts)
    whole = bytearray(encoded + b"POST")
    assert ChunkedBody(MAX_BODY_BYTES).take(whole) == content
    assert whole == b"POST"
    body, buffer = ChunkedBody(MAX_BODY_BYTES), bytearray()
    step = max(1, len(encoded) // 100)
    for start in range(0, len(encoded) - 1, step):
        buffer += encoded[start : min(start + step, len(encoded) - 1)]
        assert body.take(buffer) is None
    buffer += encoded[-1:]
    assert body.take(buffer) == content
    assert not buffer


@pytest.mark.parametrize(
    "encoded",
    [
        b"0\n\n",
        b"\r\n",
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\na\r\n",
        b"0x1\r\na\r\n",
        b" 1\r\na\r\n",
        b"1 \r\na\r\n",
        b"1;extension=1\r\na\r\n",
        b"0000001\r\na\r\n",
        b"1\r\nab\r\n",
        b"1\r\na\n\n",
        b"0\r\nTrailer: 1\r\n\r\n",
    ],
)
def test_another_form_of_a_chunk_is_refused(encoded: bytes) -> None:
    """Two programs in a row must not read one body in two ways."""
    with pytest.raises(HttpRefusal) as refused:
        ChunkedBody(MAX_BODY_BYTES).take(bytearray(encoded))
    assert refused.value.error.http_status == 400


@pytest.mark.parametrize(
    "encoded",
    [b"40001\r\n", b"ffffff\r\n", chunked(b"x" * MAX_BODY_BYTES, b"x"), chunked(*[b"x"] * (MAX_OVERHEAD_BYTES // 5))],
    ids=["announced", "far-too-large", "in-the-second-chunk", "too-many-chunks"],
)
def test_a_chunked_body_is_bounded(encoded: bytes) -> None:
    """A chunk that would be too much is refused before its content arrives."""
    with pytest.raises(HttpRefusal) as refused:
        ChunkedBody(MAX_BODY_BYTES).take(bytearray(encoded))
    assert refused.value.error.http_status == 413


@given(
    encoded=st.one_of(
        st.binary(max_size=40), st.lists(st.sampled_from([b"1", b"a", b"0", b"\r\n", b"\n"])).map(b"".join)
    )
)
def test_any_bytes_are_a_body_or_a_refusal(encoded: bytes) -> None:
    """In pieces, the outcome is the same as at once."""
    outcomes = []
    for size in (max(1, len(encoded)), 1):
        body, buffer = ChunkedBody(16), bytearray()
        outcome: bytes | int | None = None
        for start in range(0, len(encoded), size):
            buffer += encoded[start : start + size]
            try:
                outcome = body.take(buffer)
            except HttpRefusal as refused:
                outcome = refused.error.http_status
            if outcome is not None:
                break
        outcomes.append(outcome)
    assert outcomes[0] == outcomes[1]


def test_a_head_says_whether_the_body_is_chunked() -> None:
    """The reader returns the decoded body, and then the next head."""
    reader = HeadReader()
    reader.feed(CHUNKED + chunked(b"ab", b"c") + CHUNKED + chunked() + HEAD + b"Content-Length: 1\r\n\r\nd")
    bodies = []
    for is_chunked in (True, True, False):
        head = reader.take_head()
        assert head is not None
        assert head.is_chunked is is_chunked
        bodies.append(reader.take_body(head))
    assert bodies == [b"abc", b"", b"d"]


@pytest.mark.parametrize(
    "headers",
    [
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
    ],
)
def test_another_transfer_coding_is_refused(headers: bytes) -> None:
    """So is a second statement about the length of the body."""
    reader = HeadReader()
    reader.feed(HEAD + headers + b"\r\n")
    with pytest.raises(HttpRefusal) as refused:
        reader.take_head()
    assert refused.value.error.http_status in (400, 411)


def test_http_1_0_has_no_chunks() -> None:
    """Programs that speak HTTP/1.0 do not know the coding."""
    reader = HeadReader()
    reader.feed(CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0"))
    with pytest.raises(HttpRefusal):
        reader.take_head()


def test_a_chunked_request_is_served(tmp_path: Path) -> None:
    """The connection goes on after it; a chunk that breaks the form ends it."""
    prepared = prepare(tmp_path)

    def form(credentials: Credentials) -> bytes:
        return urlencode(v1_parameters(credentials, "ListKeys", {"PageSize": "1"}, "POST")).encode()

    stranger = Credentials(UNKNOWN_ID, "a secret")
    with serving_gateway(prepared):
        connection = connect(prepared)
        outcomes = []
        for credentials in (prepared.credentials, stranger, prepared.credentials):
            body, headers = form(credentials), {"content-type": "application/x-www-form-urlencoded"}
            connection.request("POST", "/", iter([body[:10], body[10:]]), headers, encode_chunked=True)
            with connection.getresponse() as response:
                outcomes.append((response.status, "Keys" in json.loads(response.read())))
        connection.close()
    assert outcomes == [(200, True), (404, False), (200, True)]
