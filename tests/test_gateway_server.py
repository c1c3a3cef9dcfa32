"""The gateway's server in time and under limits: deadlines, idle connections, places, drain, reload, certificates."""

import ssl
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.agent import PATIENCE
from support.gateway import Credentials, new_certificate
from support.gateway_in_process import (
    CREDENTIALS,
    gateway_served,
    keyring_with_access_key,
    new_state,
    request_of,
)

from keyferry_agent.config.gateways import Gateway, certificate_context
from keyferry_agent.gateway import connection, server
from keyferry_agent.gateway.client import Client
from keyferry_agent.gateway.http_request import Reception
from keyferry_agent.gateway.sampling import ENTRIES_PER_SECOND
from keyferry_agent.server.dispatch import CompletedRequest, Dispatcher, Encode

WRONG = Credentials(CREDENTIALS.access_key_id, "another-secret")
STRANGER = Credentials("LTAIStranger", "whatever")


async def test_an_idle_connection_ends_after_its_time(autojump_clock: trio.testing.MockClock) -> None:
    """Ten seconds without a verified signature, and 75 after one; the server sends nothing before it closes."""
    async with gateway_served(new_state()) as served, await served.connect() as client:
        begin = trio.current_time()
        assert await client.is_closed()
        assert trio.current_time() - begin == pytest.approx(10, abs=1)
        async with await served.connect() as proven:
            assert await proven.call() == 200
            begin = trio.current_time()
            assert await proven.is_closed()
            assert trio.current_time() - begin == pytest.approx(75, abs=1)


async def test_a_wrong_signature_does_not_prolong_idle_time(autojump_clock: trio.testing.MockClock) -> None:
    """Only an accepted request does: a recorded one, sent again, does not either."""
    recorded = request_of()
    async with gateway_served(new_state()) as served:
        async with await served.connect() as client:
            await client.send(recorded)
            assert (await client.answer())[0] == 200
        async with await served.connect() as client:
            assert await client.call(credentials=WRONG) == 400
            await client.send(recorded)
            assert b"SignatureNonceUsed" in (await client.answer())[2]
            begin = trio.current_time()
            assert await client.is_closed()
            assert trio.current_time() - begin == pytest.approx(10, abs=1)


async def test_a_slow_head_is_answered_408(autojump_clock: trio.testing.MockClock) -> None:
    """The time counts from the first byte, however often another one comes."""
    async with gateway_served(new_state(request_timeout=10)) as served, await served.connect() as client:
        begin = trio.current_time()
        for byte in b"GET /":
            await client.send(bytes([byte]))
            await trio.sleep(1.9)
        status, head, body = await client.answer()
        assert status == 408
        assert trio.current_time() - begin == pytest.approx(10, abs=1)
        assert b"connection: close" in head.lower()
        assert b'"Code":"RequestTimeout"' in body
        assert await client.is_closed()


async def test_a_slow_body_is_answered_408(autojump_clock: trio.testing.MockClock) -> None:
    """It has the same time again, after the head."""
    async with gateway_served(new_state(request_timeout=10)) as served, await served.connect() as client:
        await client.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nabc")
        begin = trio.current_time()
        assert (await client.answer())[0] == 408
        assert trio.current_time() - begin == pytest.approx(10, abs=1)


async def test_a_late_request_after_an_answer_is_only_closed(autojump_clock: trio.testing.MockClock) -> None:
    """A client could take 408 for the answer to its next request."""
    async with gateway_served(new_state()) as served, await served.connect() as client:
        assert await client.call() == 200
        await client.send(b"GET /")
        assert await client.is_closed()


async def test_a_client_that_does_not_read_is_closed(autojump_clock: trio.testing.MockClock) -> None:
    """The answer has request_timeout to be taken; then the connection ends, and the server serves others."""
    async with gateway_served(new_state(request_timeout=5)) as served, await served.connect() as client:
        with suppress(trio.BrokenResourceError), trio.fail_after(60):
            while True:  # the kernel's buffers fill up, first those of the answers
                await client.send(b"".join(request_of() for _ in range(64)))
        async with await served.connect() as other:
            assert await other.call() == 200


async def test_a_handshake_has_a_deadline(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    """A client that connects to https and says nothing is closed."""
    tls = new_certificate(tmp_path)
    async with gateway_served(new_state(request_timeout=10), tls=tls) as served, await served.connect() as client:
        begin = trio.current_time()
        assert await client.is_closed()
        assert trio.current_time() - begin == pytest.approx(10, abs=1)


async def test_unproven_clients_have_half_of_all_places(autojump_clock: trio.testing.MockClock) -> None:
    """A connection above the limit is closed at once; a proven one makes room for another unproven one."""
    agent = new_state(gateway_connections=4)
    async with (
        gateway_served(agent) as served,
        await served.connect() as first,
        await served.connect() as second,
        await served.connect() as third,
    ):
        begin = trio.current_time()
        assert await third.is_closed()
        assert trio.current_time() - begin < 1
        assert (agent.counters.gateway_connections, agent.counters.connections_refused) == (2, 1)
        assert await first.call() == 200
        async with await served.connect() as fourth:
            assert await fourth.call() == 200
            assert await second.call() == 200
            async with await served.connect() as fifth:
                assert await fifth.call() == 200
                async with await served.connect() as sixth:
                    assert await sixth.is_closed()  # all places are taken, by proven clients
        assert agent.counters.connections == agent.counters.gateway_connections


async def test_sixteen_wrong_signatures_end_a_connection() -> None:
    """The last answer says that the connection closes. Good ones between them change nothing."""
    async with gateway_served(new_state()) as served, await served.connect() as client:
        for _ in range(15):
            assert await client.call(credentials=WRONG) == 400
        assert await client.call() == 200
        await client.send(request_of(credentials=WRONG))
        status, head, _ = await client.answer()
        assert (status, b"connection: close" in head.lower()) == (400, True)
        assert await client.is_closed()


async def test_unfinished_requests_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that would exceed it is answered 503 and closed; finished and closed ones do not count."""
    monkeypatch.setattr(connection, "MAX_HELD_BYTES", 100_000)
    half = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90000\r\n\r\n" + bytes(60_000)
    async with gateway_served(new_state()) as served, await served.connect() as first:
        await first.send(half)
        await trio.testing.wait_all_tasks_blocked(0.01)
        async with await served.connect() as second:
            await second.send(half)
            status, _, body = await second.answer()
            assert (status, b"ServiceUnavailableTemporary" in body) == (503, True)
        await trio.aclose_forcefully(first.stream)
        for _ in range(3):
            async with await served.connect() as third:
                await third.send(half + bytes(30_000))
                assert (await third.answer())[0] == 400  # its type is unknown


async def test_strangers_have_ten_audit_entries_a_second(autojump_clock: trio.testing.MockClock) -> None:
    """Further refusals are counted in one entry; requests with a verified signature are always recorded."""
    agent = new_state()
    async with gateway_served(agent) as served, await served.connect() as client:
        for _ in range(3 * ENTRIES_PER_SECOND):
            assert await client.call(credentials=STRANGER) == 404
        assert await client.call() == 200
        await trio.sleep(2)
        audit = served.audit
    claimed = [request for request in audit.requests if request.outcome == "InvalidAccessKeyId.NotFound"]
    assert ENTRIES_PER_SECOND <= len(claimed) <= 2 * ENTRIES_PER_SECOND  # the real second may have changed once
    assert sum(count for _, count in audit.omitted) == 3 * ENTRIES_PER_SECOND - len(claimed)
    assert {name for name, _ in audit.omitted} == {"gateway"}
    origin = claimed[0].peer.http
    assert origin is not None
    assert (claimed[0].peer.access_key, origin.claimed_access_key) == ("", STRANGER.access_key_id)
    assert (claimed[0].entry.operation, audit.requests[-1].entry.operation) == ("", "ListKeys")
    assert agent.counters.requests_refused == 3 * ENTRIES_PER_SECOND


async def test_drain_answers_requests_and_closes_idle_ones(autojump_clock: trio.testing.MockClock) -> None:
    """A request that comes before the client could know of it is answered, with `Connection: close`."""
    agent = new_state()
    async with gateway_served(agent) as served, await served.connect() as idle, await served.connect() as client:
        await trio.testing.wait_all_tasks_blocked()
        agent.draining = True
        served.server.drain()
        await client.send(request_of())
        status, head, _ = await client.answer()
        assert (status, b"connection: close" in head.lower()) == (200, True)
        assert await idle.is_closed()
        with pytest.raises(OSError, match="connect"):
            await served.connect()


async def test_a_drain_during_a_request_reads_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer was begun without `Connection: close`, so that the client may have sent its next request."""
    agent = new_state()
    async with gateway_served(agent) as served, await served.connect() as client:
        endpoint = served.server._endpoints["gateway"]
        answer = endpoint.answer

        async def draining(who: Client, reception: Reception) -> tuple[bytes, bool]:
            answered = await answer(who, reception)
            if not agent.draining:
                agent.draining = True
                served.server.drain()
            return answered

        monkeypatch.setattr(endpoint, "answer", draining)
        assert await client.call() == 200
        await client.send(request_of())
        status, head, _ = await client.answer()
        assert (status, b"connection: close" in head.lower()) == (200, True)


async def test_a_refused_request_leaves_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answered error is not the raised one, whose traceback leads to the request's parameters."""
    answered = []
    packed = Dispatcher._packed

    def noted(dispatcher: Dispatcher, request: CompletedRequest, encode: Encode) -> bytes:
        answered.append(request.outcome)
        return packed(dispatcher, request, encode)

    monkeypatch.setattr(Dispatcher, "_packed", noted)
    async with gateway_served(new_state()) as served, await served.connect() as client:
        assert await client.call("Encrypt", Plaintext="c2VjcmV0", Unknown="x") == 400
        assert await client.call("Encrypt", Plaintext="c2VjcmV0", NumberOfBytes="x") == 400
        assert await client.call("Nothing", Plaintext="c2VjcmV0") == 404
        assert await client.call("Encrypt", credentials=WRONG, Plaintext="c2VjcmV0") == 400
    assert [error.__traceback__ for error in answered] == [None] * 4


async def test_a_drain_ends_after_its_grace(autojump_clock: trio.testing.MockClock) -> None:
    """Half a request does not keep the agent from stopping."""
    agent = new_state(request_timeout=600)
    async with gateway_served(agent) as served, await served.connect() as client:
        await client.send(b"GET / HT")
        await trio.testing.wait_all_tasks_blocked()
        begin = trio.current_time()
        served.server.drain(grace=3)
        assert await client.is_closed()
        assert trio.current_time() - begin == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize(
    ("change", "status"), [({"enabled": False}, 403), ({"secret": "another-secret-of-24-char"}, 400)]
)
async def test_a_reload_changes_access_keys_at_once(change: dict[str, Any], status: int) -> None:
    """An open connection with a proven client has no advantage."""
    agent = new_state()
    async with gateway_served(agent) as served, await served.connect() as client:
        assert await client.call() == 200
        agent.adopt(agent.settings, keyring_with_access_key(**change))
        assert await client.call() == status


async def test_a_new_certificate_serves_new_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reload. A certificate that does not fit its key is logged, and the old one stays."""
    agent = new_state()
    read = threading.Semaphore(0)

    def noted(gateway: Gateway) -> ssl.SSLContext | None:
        try:
            return certificate_context(gateway)
        finally:
            read.release()

    async def reload() -> None:
        agent.adopt(agent.settings, agent.keyring)
        assert await trio.to_thread.run_sync(lambda: read.acquire(timeout=PATIENCE)), "the certificate was not read"
        await trio.testing.wait_all_tasks_blocked(0.05)

    monkeypatch.setattr(server, "certificate_context", noted)
    tls = new_certificate(tmp_path)
    old = ssl.create_default_context(cafile=str(tls / "ca.pem"))
    async with gateway_served(agent, tls=tls) as served:
        async with await served.connect(old) as kept:
            assert await kept.call() == 200
            for name in ("ca.pem", "tls.pem", "tls.key"):
                (tls / name).unlink()
            new_certificate(tmp_path)
            await reload()
            async with await served.connect(ssl.create_default_context(cafile=str(tls / "ca.pem"))) as client:
                assert await client.call() == 200
            assert await kept.call() == 200
        async with await served.connect(old) as client:
            with pytest.raises(trio.BrokenResourceError):
                await client.call()
        (tls / "tls.pem").write_text("no certificate")
        await reload()
        async with await served.connect(ssl.create_default_context(cafile=str(tls / "ca.pem"))) as client:
            assert await client.call() == 200


async def test_an_error_in_one_connection_leaves_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged, the connection is closed, and the server goes on."""
    async with gateway_served(new_state()) as served, await served.connect() as client:
        endpoint = served.server._endpoints["gateway"]
        with monkeypatch.context() as broken:
            broken.setattr(endpoint, "answer", None)
            await client.send(request_of())
            assert await client.is_closed()
        async with await served.connect() as other:
            assert await other.call() == 200
