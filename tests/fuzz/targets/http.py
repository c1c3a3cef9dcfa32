"""Requests as a gateway receives them, in any pieces, up to the signed values and the parameters of an operation."""

import json
from typing import Any

import h11

from keyferry.errors import KmsError
from keyferry_agent.gateway.answers import ResponseEncoder
from keyferry_agent.gateway.authentication import response_format
from keyferry_agent.gateway.head import HeadReader
from keyferry_agent.gateway.http_request import HttpRequest, Reception, check_host, check_target
from keyferry_agent.gateway.parameters import canonical_query, decode_form, to_operation
from keyferry_agent.gateway.refusals import HttpRefusal
from keyferry_agent.gateway.signatures import operation_parameters, read_signature


def http(data: bytes) -> None:
    """The same requests are read from any pieces, and h11 reads each of them in the same way."""
    receptions, is_refused = _received(data, len(data) or 1)
    assert (receptions, is_refused) == _received(data, 1)
    for reception in receptions:
        _beside_h11(reception)
        _decided(reception)


def _received(data: bytes, size: int) -> tuple[list[Reception], bool]:
    """Return the requests in pieces of `size` bytes, and whether the connection is closed after them.

    Which of several faults is found first, and so the code of the refusal, depends on the pieces.
    """
    reader, head = HeadReader(), None
    receptions: list[Reception] = []
    for start in range(0, len(data), size):
        reader.feed(data[start : start + size])
        try:
            while True:
                head = head or reader.take_head()
                body = None if head is None else reader.take_body(head)
                if head is None or body is None:
                    break
                receptions.append(Reception(head, body))
                head = None
        except HttpRefusal as refused:
            assert len(reader.buffer) <= len(data)
            assert refused.error.http_status >= 400
            return receptions, True
    return receptions, False


def _beside_h11(reception: Reception) -> None:
    head = reception.head
    lines = [f"{name}: {value}" for name, values in head.headers.items() for value in values]
    text = "\r\n".join([f"{head.method} {head.target} HTTP/1.1", *lines, "", ""]).encode("latin-1")
    body = b"%x\r\n%s\r\n" % (len(reception.body), reception.body) if reception.body else b""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=len(text) + 1)
    connection.receive_data(text + (body + b"0\r\n\r\n" if head.is_chunked else reception.body))
    request, content = connection.next_event(), b""
    assert isinstance(request, h11.Request)
    assert (request.method.decode(), request.target.decode()) == (head.method, head.target)
    while isinstance(event := connection.next_event(), h11.Data):
        content += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert content == reception.body


def _decided(reception: Reception) -> None:
    """Decode and encode parameters, up to the first refusal, which is an answer that can be read."""
    encoder = ResponseEncoder(reception.head, keep_alive=True)
    try:
        check_host(reception, ())
        encoder.host = reception.host
        check_target(reception)
        request = HttpRequest.of(reception)
        encoder.format = response_format(request.parameters.get("Format", ""), "")
        pairs = list(request.parameters.items())
        assert decode_form(canonical_query(pairs).encode("ascii")) == sorted(pairs)
        signed = read_signature(request)
        encoder.action = "Action"
        to_operation(signed.action, operation_parameters(request, signed))
    except KmsError as error:
        answer = encoder.refused(error, "0A")
        assert answer.startswith(b"HTTP/1.1 4")
        _assert_readable(answer, reception.head.method == "HEAD", encoder.format, error)


def _assert_readable(answer: bytes, is_head: bool, answer_format: str, error: KmsError) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\n" not in head.replace(b"\r\n", b"")
    if is_head or answer_format == "XML":
        return
    content: dict[str, Any] = json.loads(body)
    assert list(content) == ["HttpStatus", "Code", "Message", "RequestId", "HostId"]
    assert (content["Code"], content["HttpStatus"]) == (error.code, error.http_status)
