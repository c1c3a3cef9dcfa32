"""Requests to a gateway: refused HTTP, the order of the checks and their codes, parameters, and answers as JSON and XML."""

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gateway import Credentials, acs3_headers, encode, v1_parameters
from support.gateway_in_process import CREDENTIALS, HttpClient, Served, gateway_served, new_state, request_of

from keyferry.errors import KmsError
from keyferry_agent.gateway.head import MAX_HEADER_BYTES, MAX_LINE_BYTES, HeadReader
from keyferry_agent.gateway.nonces import Nonces, Verdict
from keyferry_agent.gateway.parameters import canonical_query, decode_form, percent_encode
from keyferry_agent.gateway.refusals import HttpRefusal

HOST = "localhost"
ENVELOPE = ["HttpStatus", "Code", "Message", "RequestId", "HostId"]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """A gateway whose access key may do everything."""
    async with gateway_served(new_state(), hosts=("kms.internal",)) as gateway:
        yield gateway


async def error(client: HttpClient, request: bytes) -> dict[str, Any]:
    """Send a request, and return its error, which has the five keys of the cloud."""
    await client.send(request)
    status, head, body = await client.answer()
    fields = json.loads(body)
    assert [*fields] == ENVELOPE
    assert fields["HttpStatus"] == status
    assert f"x-acs-request-id: {fields['RequestId']}".encode() in head
    return dict(fields)


def get(parameters: dict[str, str], **headers: str) -> bytes:
    """Return a GET request with these parameters."""
    query = "&".join(f"{encode(name)}={encode(value)}" for name, value in parameters.items())
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in ({"host": HOST} | headers).items())
    return f"GET /?{query} HTTP/1.1\r\n{lines}\r\n".encode()


def signed(action: str = "ListKeys", credentials: Credentials = CREDENTIALS, **changed: str) -> bytes:
    """Return a signed request of version 1. `changed`: parameters with other values."""
    return get(v1_parameters(credentials, action, {}, **changed))


def acs3(action: str = "ListKeys", query: str = "", without: str = "", **changed: str) -> bytes:
    """Return a signed request of the second scheme. `changed`: headers with other values; `without`: one that is not signed."""
    pairs = dict(pair.split("=", 1) for pair in query.split("&") if pair)
    headers = acs3_headers(CREDENTIALS, HOST, action, pairs, b"", "GET", **changed)
    if without:
        headers["authorization"] = re.sub(f"(?<=[=;]){without};?", "", headers["authorization"])
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"GET /?{query} HTTP/1.1\r\n{lines}\r\n".encode()


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET / HTTP/1.1\r\n", 400),  # no Host
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nHost: {HOST}\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 1\r\nContent-Length: 1\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 1, 1\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: +1\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 00000001\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 262145\r\n", 413),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: gzip\r\n", 411),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n", 411),
        (f"GET / HTTP/1.0\r\nHost: {HOST}\r\nTransfer-Encoding: chunked\r\n", 411),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nA: b\r\n c\r\n", 400),  # folded
        (f"GET / HTTP/1.1\r\nHost : {HOST}\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nA: b\nC: d\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nA: b\rC: d\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nA: b\0\r\n", 400),
        (f"GET http://{HOST}/ HTTP/1.1\r\nHost: {HOST}\r\n", 400),
        (f"OPTIONS * HTTP/1.1\r\nHost: {HOST}\r\n", 400),
        (f"GET /#a HTTP/1.1\r\nHost: {HOST}\r\n", 400),
        (f"GET /\x7f HTTP/1.1\r\nHost: {HOST}\r\n", 400),
        (f"GET /é HTTP/1.1\r\nHost: {HOST}\r\n", 400),
        (f"get / HTTP/1.1\r\nHost: {HOST}\r\n", 400),
        (f"GET / HTTP/2.0\r\nHost: {HOST}\r\n", 505),
        (f"GET /  HTTP/1.1\r\nHost: {HOST}\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nExpect: 200-ok\r\n", 417),
        ("PRI * HTTP/2.0\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\n" + "A: b\r\n" * 64, 431),
        (f"GET / HTTP/1.1\r\nHost: {HOST}\r\nA: {'b' * 16_384}\r\n", 431),
        (f"GET /{'a' * 262_144} HTTP/1.1\r\nHost: {HOST}\r\n", 414),
    ],
)
async def test_invalid_http_is_refused_and_closed(served: Served, head: str, status: int) -> None:
    """A good request behind it, which a proxy may have meant as a body, is never answered."""
    async with await served.connect() as client:
        with trio.fail_after(20):
            refused = await error(client, head.encode() + b"\r\n" + request_of())
            assert (refused["HttpStatus"], refused["HostId"]) == (status, "")
            assert await client.is_closed()


async def test_limits_of_a_head_can_be_used_up(served: Served) -> None:
    """A request line of 256 KiB and 64 headers are served."""
    request = get(v1_parameters(CREDENTIALS, "Nothing", {"A": "a" * 200_000, "B": "b" * 61_000}))
    line, _, rest = request.partition(b" HTTP/1.1\r\n")
    line += b"&" * (262_144 - len(line) - len(" HTTP/1.1"))
    async with await served.connect() as client:
        await client.send(line + b" HTTP/1.1\r\n" + rest[:-2] + b"A: b\r\n" * 63 + b"\r\n")
        assert (await client.answer())[0] == 400  # too many separators, which is looked at last
        assert await client.call() == 200


@pytest.mark.parametrize("length", [0, 1])
def test_limits_hold_where_a_line_end_is_split(length: int) -> None:
    """CR may come before LF: a line and headers of exactly the limits are valid, one byte more is refused."""
    line = b"GET /".ljust(MAX_LINE_BYTES - 9 + length, b"a") + b" HTTP/1.1"
    fields = b"Host: x\r\nA: ".ljust(MAX_HEADER_BYTES - 2 + length, b"b")
    for pieces in ((line + b"\r", b"\nHost: x\r\n\r\n"), (b"GET / HTTP/1.1\r\n" + fields + b"\r\n\r", b"\n")):
        reader = HeadReader()
        with pytest.raises(HttpRefusal) if length else nullcontext():
            reader.feed(pieces[0])
            assert reader.take_head() is None
            reader.feed(pieces[1])
            assert reader.take_head() is not None


async def test_a_request_may_come_in_any_pieces(served: Served) -> None:
    """Byte by byte, behind empty lines, and several at once; the answers are in order."""
    async with await served.connect() as client:
        for byte in b"\r\n\r\n" + signed():
            await client.send(bytes([byte]))
        assert (await client.answer())[0] == 200
        await client.send(signed() + signed("Nothing") + signed())
        assert [(await client.answer())[0] for _ in range(3)] == [200, 404, 200]


async def test_http_1_0_and_close_end_the_connection(served: Served) -> None:
    """After the answer."""
    for change in ((b"HTTP/1.1", b"HTTP/1.0"), (b"\r\n\r\n", b"\r\nConnection: x, Close\r\n\r\n")):
        async with await served.connect() as client:
            await client.send(signed().replace(*change))
            assert (await client.answer())[0] == 200
            assert await client.is_closed()


async def test_a_form_is_read_after_100_continue(served: Served) -> None:
    """A client that waits for it gets it; parameters of query and body count together."""
    parameters = v1_parameters(CREDENTIALS, "ListKeys", {}, "POST")
    body = "&".join(f"{encode(name)}={encode(value)}" for name, value in parameters.items()).encode()
    head = (
        f"POST / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n"
        "Content-Type: application/x-www-form-urlencoded; charset=utf-8\r\n\r\n"
    ).encode()
    async with await served.connect() as client:
        await client.send(head)
        assert (await client.answer())[0] == 100
        await client.send(body)
        assert (await client.answer())[0] == 200
        await client.send(head.replace(b"x-www-form-urlencoded", b"json").replace(b"Expect", b"X") + body)
        assert b"UnsupportedContentType" in (await client.answer())[2]


@pytest.mark.parametrize(
    ("new_request", "code"),
    [
        (lambda: signed().replace(b"localhost", b"example.org"), "InvalidProduct.NotFound"),
        (lambda: get(v1_parameters(CREDENTIALS, "ListKeys", {}), origin="null"), "Forbidden.NoPermission"),
        (lambda: get(v1_parameters(CREDENTIALS, "ListKeys", {}), sec_fetch_site="none"), "Forbidden.NoPermission"),
        (lambda: signed().replace(b"GET", b"PUT"), "UnsupportedHTTPMethod"),
        (lambda: signed().replace(b"GET", b"OPTIONS"), "UnsupportedHTTPMethod"),
        (lambda: signed().replace(b"/?", b"/a?"), "InvalidAction.NotFound"),
        (lambda: signed().replace(b"/?", b"/?A=%4&"), "InvalidParameter"),
        (lambda: signed().replace(b"/?", b"/?A=%ff&"), "InvalidParameter"),
        (lambda: signed().replace(b"/?", b"/?Action=b&"), "InvalidParameter"),
        (lambda: signed().replace(b"/?", b"/?" + b"a&" * 64), "InvalidParameter"),
        (lambda: get({"Action": "ListKeys"}, authorization="Basic YQ=="), "InvalidSignatureMethod"),
        (lambda: signed(SignatureMethod="HMAC-SHA256"), "InvalidSignatureMethod"),
        (lambda: signed(SignatureVersion="2.0"), "InvalidSignatureMethod"),
        (lambda: signed(SignatureType="BEARERTOKEN"), "InvalidSignatureMethod"),
        (lambda: signed(Timestamp="", Version="x"), "MissingTimestamp"),
        (lambda: signed(SignatureNonce=""), "MissingSignatureNonce"),
        (lambda: signed(Version="2015-01-01", Timestamp="x"), "InvalidVersion"),
        (lambda: signed(Format="YAML", Timestamp="x"), "InvalidParameter.Format"),
        (lambda: signed(credentials=Credentials("x", "y"), Timestamp="yesterday"), "InvalidTimeStamp.Format"),
        (lambda: signed(Timestamp="٢٠٢٦-12-01T00:00:00Z"), "InvalidTimeStamp.Format"),
        (lambda: signed(Timestamp="2026-13-01T00:00:00Z"), "InvalidTimeStamp.Format"),
        (
            lambda: signed(credentials=Credentials("x", "y"), Timestamp="2020-01-01T00:00:00Z"),
            "InvalidAccessKeyId.NotFound",
        ),
        (lambda: signed(credentials=Credentials(CREDENTIALS.access_key_id, "y")), "SignatureDoesNotMatch"),
        (lambda: get(v1_parameters(CREDENTIALS, "ListKeys", {}) | {"Signature": "é"}), "SignatureDoesNotMatch"),
        (lambda: signed(Timestamp="2020-01-01T00:00:00Z", SecurityToken="x"), "InvalidSecurityToken.Malformed"),
        (lambda: signed("Nothing", Timestamp="2020-01-01T00:00:00Z"), "InvalidTimeStamp.Expired"),
        (lambda: signed(SignatureNonce="n" * 129), "InvalidParameter"),
        (lambda: signed("Nothing"), "InvalidAction.NotFound"),
        (lambda: signed("GetAgentStatus"), "InvalidAction.NotFound"),
        (lambda: signed("CreateKey"), "UnsupportedOperation"),
        (lambda: get(v1_parameters(CREDENTIALS, "Encrypt", {"EncryptionContext.b": "2"})), "InvalidParameter"),
        (lambda: signed(PageSize="٣"), "InvalidParameter"),
        (lambda: signed(PageSize="-1"), "InvalidParameter"),
        (lambda: acs3(without="x-acs-date"), "IncompleteSignature"),
        (lambda: acs3(without="host"), "IncompleteSignature"),
        (lambda: acs3(x_acs_other="a").replace(b"x-acs-other: a", b"x-acs-other: b"), "SignatureDoesNotMatch"),
        (lambda: acs3(x_acs_other="a", without="x-acs-other"), "IncompleteSignature"),
        (lambda: acs3().replace(b"SignedHeaders=", b"SignedHeaders=host;"), "IncompleteSignature"),
        (lambda: acs3().replace(b"SignedHeaders=host", b"SignedHeaders=Host"), "IncompleteSignature"),
        (lambda: acs3().replace(b"SHA256 Credential", b"MD5 Credential"), "InvalidSignatureMethod"),
        (lambda: acs3(x_acs_date=""), "Missingx-acs-date"),
        (lambda: acs3(query="Action=ListKeys"), "InvalidParameter"),
        (lambda: acs3(x_acs_content_sha256="0" * 64), "SignatureDoesNotMatch"),
    ],
)
async def test_each_check_has_its_code_and_its_place(
    served: Served, new_request: Callable[[], bytes], code: str
) -> None:
    """Where a request has two faults, the earlier check answers. The connection goes on after each answer."""
    async with await served.connect() as client:
        refused = await error(client, new_request())
        assert refused["Code"] == code
        assert refused["HostId"] == ("" if code == "InvalidProduct.NotFound" else HOST)
        assert await client.call() == 200


async def test_accepted_spellings_of_a_request(served: Served) -> None:
    """Spaces as plus signs, empty values, fractions of seconds, other allowed hosts, RegionId with either scheme."""
    fraction = v1_parameters(CREDENTIALS, "ListKeys", {})["Timestamp"][:-1] + ".123456789Z"
    accepted = [
        signed(Timestamp=fraction),
        signed(RegionId="cn-hangzhou", SignatureType="", PageSize=""),
        signed(SignatureNonce="a b").replace(b"a%20b", b"a+b"),
        signed().replace(b"localhost", b"KMS.internal:443"),
        signed().replace(b"localhost", b"[::1]:8461"),
        signed().replace(b"/?", b"/?&&"),
        acs3(query="RegionId=cn-hangzhou&Format=json"),
        acs3().replace(b",Signed", b", Signed"),
        acs3(content_type="application/octet-stream"),
    ]
    async with await served.connect() as client:
        for request in accepted:
            await client.send(request)
            status, _, body = await client.answer()
            assert status == 200, (request, body)


async def test_only_one_of_eight_copies_is_served(served: Served) -> None:
    """On eight connections at once."""
    recorded = signed()
    statuses = []

    async def send() -> None:
        async with await served.connect() as client:
            await client.send(recorded)
            statuses.append((await client.answer())[0])

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(send)
    assert sorted(statuses) == [200] + [400] * 7


async def test_head_is_answered_without_a_body(served: Served) -> None:
    """Its length is that of the error. The next answer follows directly."""
    async with await served.connect() as client:
        await client.send(signed().replace(b"GET", b"HEAD") + signed())
        with trio.fail_after(10):
            received = b""
            while received.count(b"HTTP/1.1 ") < 2:
                received += await client.stream.receive_some(65_536)
    assert received.startswith(b"HTTP/1.1 403")
    assert b"\r\n\r\nHTTP/1.1 200" in received


async def test_xml_by_parameter_or_accept(served: Served) -> None:
    """Lists are repeated elements; an error has the same five names."""
    async with await served.connect() as client:
        await client.send(signed(Format="xml"))
        _, head, body = await client.answer()
        assert b"text/xml;charset=utf-8" in head
        assert re.fullmatch(rb"<\?xml [^>]*\?><ListKeysResponse><Keys><Key><KeyId>.*</Keys>.*</ListKeysResponse>", body)
        parameters = v1_parameters(CREDENTIALS, "No<&>thing", {})
        del parameters["Format"]
        unsigned = get(parameters | {"Signature": "x"}, accept="text/xml")
        await client.send(unsigned)
        _, _, body = await client.answer()
        assert [name.decode() for name in re.findall(rb"<(\w+)>", body)] == ["Error", *ENVELOPE]


async def test_answers_forbid_storing_and_name_no_server(served: Served) -> None:
    """And allow no other origin."""
    async with await served.connect() as client:
        await client.send(signed())
        _, head, _ = await client.answer()
    names = {line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:]}
    assert {b"cache-control", b"date", b"content-length", b"x-content-type-options"} <= names
    assert not [name for name in names if name == b"server" or name.startswith(b"access-control")]


@given(st.dictionaries(st.text(min_size=1).filter(lambda text: text.isprintable()), st.text()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_decoding_reverses_encoding(parameters: dict[str, str]) -> None:
    """For all texts that UTF-8 can encode, up to the number of parameters."""
    pairs = [(name, value) for name, value in parameters.items() if len(parameters) < 64]
    text = "&".join(f"{percent_encode(name)}={percent_encode(value)}" for name, value in pairs)
    assert decode_form(text.encode()) == pairs
    assert canonical_query(pairs) == "&".join(f"{encode(name)}={encode(value)}" for name, value in sorted(pairs))


@given(st.binary(max_size=60))
def test_any_bytes_are_decoded_or_refused(text: bytes) -> None:
    """With the code of an invalid parameter."""
    code = "InvalidParameter"
    try:
        decode_form(text)
    except KmsError as refused:
        code = refused.code
    assert code == "InvalidParameter"


def test_the_oldest_nonces_become_the_floor() -> None:
    """No nonce is accepted twice, however many there are; what was signed before the agent's start is expired."""
    nonces = Nonces(started_at=1_000, skew=100, max_nonces=4)
    assert nonces.use("a", "early", 994, 1_000) == Verdict.EXPIRED
    assert nonces.use("a", "late", 1_101, 1_000) == Verdict.EXPIRED
    used = [(f"n{second}", second) for second in range(1_000, 1_004)]
    assert {nonces.use("a", nonce, second, 1_004) for nonce, second in used} == {Verdict.FRESH}
    assert nonces.use("a", "n1003", 1_002, 1_004) == Verdict.USED  # at another time, too
    assert nonces.use("b", "n1003", 1_003, 1_004) == Verdict.FRESH
    assert nonces.use("a", "n1004", 1_004, 1_004) == Verdict.FRESH
    assert nonces.use("a", "n1000", 1_000, 1_004) == Verdict.EXPIRED
    assert nonces.use("a", "other", 1_000, 1_004) == Verdict.EXPIRED
    assert nonces.use("a", "n1001", 1_001, 1_004) == Verdict.USED
    assert nonces.use("a", "n1002", 1_090, 1_190) == Verdict.FRESH  # out of the window, and forgotten
