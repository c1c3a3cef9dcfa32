"""The gateway's reader of heads beside h11: whatever the gateway accepts, h11 reads in the same way. So are its answers."""

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from keyferry_agent.gateway.answers import ResponseEncoder
from keyferry_agent.gateway.head import Head, HeadReader
from keyferry_agent.gateway.refusals import HttpRefusal

LINES = [
    b"GET / HTTP/1.1",
    b"POST /?A=1&B=%20 HTTP/1.1",
    b"GET / HTTP/1.0",
    b"GET  / HTTP/1.1",
    b"GET / HTTP/1.1 ",
    b"get / HTTP/1.1",
    b"GET /#a HTTP/1.1",
    b"GET * HTTP/1.1",
    b"GET / HTTP/2.0",
    b"\r\nGET / HTTP/1.1",
]
FIELDS = [
    b"Host: localhost",
    b"host:localhost:80",
    b"Host: a",
    b"Content-Length: 3",
    b"Content-Length: 03",
    b"Content-Length: +3",
    b"Content-Length: 3, 3",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: CHUNKED",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding : chunked",
    b" folded",
    b"\tfolded",
    b"Connection: close",
    b"Connection: keep-alive, Close",
    b"Expect: 100-continue",
    b"x-acs-action: ListKeys",
    b"X-Empty:",
    b"X-Spaces:  \t a b \t ",
    b"X-Odd: \xff\xa0\x85",
    b"X-Control: a\x0bb",
    b"X-Nul: \0",
    b"X: a\rb",
    b"X: a\nY: b",
    b"no colon",
    b": no name",
    b"X@: a",
    b"X-Del: \x7f",
]
ENDS = [b"\r\n", b"\n", b"\r"]


def joined(line: bytes, host: list[bytes], fields: list[bytes], ends: list[bytes]) -> bytes:
    """Return the lines of a head, without the empty one at its end."""
    return b"".join([line, b"\r\n", *(field + end for field, end in zip(host + fields, ends, strict=False))])


heads = st.builds(
    joined,
    st.sampled_from([LINES[0]] * 12 + [LINES[1]] * 12 + LINES),
    st.sampled_from([FIELDS[:1]] * 12 + [[]]),
    st.lists(st.sampled_from(FIELDS), max_size=4, unique=True),
    st.lists(st.sampled_from([b"\r\n"] * 60 + ENDS), min_size=5, max_size=5),
)


def accepted(head: bytes) -> Head | None:
    """Return the head that the gateway reads, or None if it refuses it or waits for more."""
    reader = HeadReader()
    reader.feed(head)
    try:
        return reader.take_head()
    except HttpRefusal:
        return None


@given(
    head=st.one_of(
        heads, heads.flatmap(lambda head: st.binary(max_size=2).map(lambda odd: head[:40] + odd + head[40:]))
    )
)
@example(head=b"GET / HTTP/1.1\r\nHost: localhost\r\n")
def test_h11_reads_what_the_gateway_accepts_in_the_same_way(head: bytes) -> None:
    """Method, target, headers, and how long the body is."""
    read = accepted(head + b"\r\n")
    if read is None:
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data((head + b"\r\n").lstrip(b"\r\n"))
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    assert (request.method, request.target) == (read.method.encode(), read.target.encode())
    headers: dict[str, list[str]] = {}
    for name, value in request.headers:
        headers.setdefault(name.decode(), []).append(value.decode("latin-1"))
    lower = {"transfer-encoding": ["chunked"]} if read.is_chunked else {}
    assert headers == {**read.headers, **lower}  # h11 writes this value in lower case
    assert [int(length) for length in headers.get("content-length", ["0"])] == [read.body_bytes]
    assert (headers.get("transfer-encoding") is not None) == read.is_chunked
    body = b"3\r\nabc\r\n0\r\n\r\n" if read.is_chunked else b"x" * read.body_bytes
    if body:
        connection.receive_data(body)
    events = [connection.next_event() for _ in range(2 if body else 1)]
    assert isinstance(events[-1], h11.EndOfMessage)


@pytest.mark.parametrize("head", LINES)
@pytest.mark.parametrize("keep_alive", [True, False])
def test_h11_reads_the_answers_of_the_gateway(head: bytes, keep_alive: bool) -> None:
    """Status, headers, the length of the body, and whether the connection goes on."""
    request = accepted(head + b"\r\nHost: localhost\r\n\r\n")
    encoder = ResponseEncoder(request, keep_alive=keep_alive)
    encoder.action, encoder.format = "ListKeys", "JSON"
    result = {"RequestId": "0A", "Text": "磁盘"}
    answer = encoder(0, None, result)
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "localhost")]))
    client.send(h11.EndOfMessage())
    client.receive_data(answer)
    response, body, end = (client.next_event() for _ in range(3))
    assert isinstance(response, h11.Response)
    assert isinstance(body, h11.Data)
    assert isinstance(end, h11.EndOfMessage)
    assert (response.status_code, response.reason) == (200, b"OK")
    headers = dict(response.headers)
    assert headers[b"x-acs-request-id"] == b"0A"
    assert headers[b"content-length"] == str(len(body.data)).encode()
    assert body.data.decode() == '{"RequestId":"0A","Text":"磁盘"}'
    assert (client.our_state is h11.DONE) is keep_alive
