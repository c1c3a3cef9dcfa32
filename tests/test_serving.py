"""Connections: pipelines, faults that stay where they are, deadlines, limits, slow jobs, drain. All with real agents."""

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from support.agent import RawConnection, RunningAgent, configured, dev_agent
from support.calls import error, result
from support.keyring import serving
from support.keys import recipient
from support.scrape import scraped
from support.server_in_process import Batches, connected, granting_all, served
from support.waiting import is_served, wait_until

from keyferry import AgentUnavailable
from keyferry.protocol import wire
from keyferry_agent.server import server

GENERATE = {"KeyId": "alias/dev", **recipient("RSAES_OAEP_SHA_256").params}
GENERATE_SM2 = {"KeyId": "alias/dev", **recipient("SM2PKE").params}
PING = wire.encode_request(1, "DescribeKey", {"KeyId": "alias/dev"})


def answers(connection: RawConnection, count: int) -> dict[int | None, wire.Response]:
    """The next answers, by msgid."""
    made: dict[int | None, wire.Response] = {}
    for _ in range(count):
        response = connection.answer()
        made[response.msgid] = response
    return made


def is_alive(connection: RawConnection) -> bool:
    """Whether a connection still answers."""
    return connection.call("DescribeKey", {"KeyId": "alias/dev"}).error is None


def test_long_pipeline_is_answered_by_msgid(agent: RunningAgent) -> None:
    """The client sends hundreds of fast and slow requests before it reads an answer."""
    with RawConnection(agent.socket) as connection:
        requests = [
            wire.encode_request(i, "GenerateAndExportDataKey", GENERATE_SM2 if i % 10 == 0 else GENERATE)
            for i in range(300)
        ]
        connection.send(b"".join(requests))
        received = answers(connection, 300)
    assert set(received) == set(range(300))
    for msgid, response in received.items():
        assert len(result(response)["ExportedDataKey"]) == (172 if (msgid or 0) % 10 == 0 else 344)


def test_requests_may_arrive_in_any_pieces(agent: RunningAgent) -> None:
    """Requests arrive byte by byte, or several in one write with half of the next."""
    with RawConnection(agent.socket) as connection:
        for byte in PING:
            connection.send(bytes([byte]))
        assert answers(connection, 1)
        connection.send(PING * 3 + PING[:10])
        for _ in range(3):
            assert answers(connection, 1)
        connection.send(PING[10:])
        assert answers(connection, 1)


def test_sm2_jobs_delay_no_other_connection(agent: RunningAgent) -> None:
    """An RSA request is answered before another connection's SM2 pipeline has left the threads."""
    with RawConnection(agent.socket) as slow, RawConnection(agent.socket) as quick:
        slow.send(b"".join(wire.encode_request(i, "GenerateAndExportDataKey", GENERATE_SM2) for i in range(400)))
        assert slow.response() is not None
        assert quick.call("GenerateAndExportDataKey", GENERATE).error is None
        slow.socket.setblocking(False)  # so far only a part has arrived
        received = bytearray()
        try:
            while chunk := slow.socket.recv(65_536):
                received += chunk
        except BlockingIOError:
            pass
        assert received.count(b"ExportedDataKey") < 399


def test_an_answer_that_is_ready_overtakes_a_slow_one(agent: RunningAgent) -> None:
    """Answers on one connection are sent as soon as they are ready."""
    with RawConnection(agent.socket) as connection:
        connection.send(
            wire.encode_request(1, "GenerateAndExportDataKey", GENERATE_SM2)
            + wire.encode_request(2, "GetAgentStatus", {})
        )
        assert connection.answer().msgid == 2
        assert answers(connection, 1).keys() == {1}


@pytest.mark.parametrize(
    "garbage",
    [b"\xc1", b"GET / HTTP/1.1\r\n\r\n", b"\x94\0\x01\xa1x\x91\x81\xa1k\xca\0\0\0\0", b"\xdd\xff\xff\xff\xff"],
)
def test_protocol_error_ends_only_its_connection(agent: RunningAgent, garbage: bytes) -> None:
    """Earlier requests are answered, then the error with msgid nil, and the connection is closed. Others go on."""
    with RawConnection(agent.socket) as other, RawConnection(agent.socket) as connection:
        connection.send(PING + garbage + PING)
        result(connection.response())
        last = connection.answer()
        assert (last.msgid, error(last)["Code"], error(last)["HttpStatus"]) == (None, "ProtocolError", 400)
        assert connection.response() is None
        assert is_alive(other)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"\x94\0\x05\x2a\x91\x80", "InvalidParameter"),
        (b"\x94\0\x05\xaeGetAgentStatus\x90", "InvalidParameter"),
        (b"\x94\0\x05\xaeGetAgentStatus\x91\x93\1\2\3", "InvalidParameter"),
        (b"\x93\0\x05\xa1x", "InvalidParameter"),
        (b"\x94\0\x05\xa1x\x91\x80", "InvalidAction.NotFound"),
    ],
)
def test_invalid_request_is_answered_on_an_open_connection(agent: RunningAgent, body: bytes, code: str) -> None:
    """Well-formed MessagePack with a msgid never closes a connection."""
    with RawConnection(agent.socket) as connection:
        connection.send(body)
        response = connection.answer()
        assert (response.msgid, error(response)["Code"]) == (5, code)
        assert is_alive(connection)


def test_notification_has_no_answer_and_no_effect(agent: RunningAgent) -> None:
    with RawConnection(agent.socket) as connection:
        connection.send(wire.encode_notification("Decrypt", {}) + wire.encode_request(9, "GetAgentStatus", {}))
        assert connection.answer().msgid == 9


def test_a_client_that_stops_sending_still_gets_its_answers(agent: RunningAgent) -> None:
    """A half-closed connection gets all its answers."""
    with RawConnection(agent.socket) as connection:
        connection.send(wire.encode_request(2, "GenerateAndExportDataKey", GENERATE_SM2) + PING)
        connection.socket.shutdown(socket.SHUT_WR)
        assert {response.msgid for response in answers(connection, 2).values()} == {1, 2}
        assert connection.response() is None


def test_timeout_closes_half_a_request_and_no_idle_connection(socket_path: Path) -> None:
    """The deadline is on a request that has begun, not on an idle connection."""
    arguments = configured(socket_path, "[limits]\nrequest_timeout = 0.2\n")
    with RunningAgent(arguments, socket_path) as agent, RawConnection(agent.socket) as idle:
        assert is_alive(idle)
        with RawConnection(agent.socket) as half:
            half.send(PING[:-1])
            assert half.response() is None
        agent.wait_for("connection.slow_request")
        assert is_alive(idle)


def test_client_that_does_not_read_is_dropped(socket_path: Path) -> None:
    """The agent does not read from it meanwhile, so it cannot pile up work; others are served."""
    arguments = configured(socket_path, "[limits]\nrequest_timeout = 0.5\n")
    with RunningAgent(arguments, socket_path) as agent, RawConnection(agent.socket) as other:
        with RawConnection(agent.socket) as deaf:
            deaf.socket.settimeout(0)
            try:
                while True:
                    deaf.socket.send(PING * 100)
            except BlockingIOError:
                pass  # its own buffer is full: the agent reads no more
            assert is_alive(other)
            agent.wait_for("connection.answers_not_taken")
        assert is_alive(other)


def test_refused_client_can_finish_its_write_and_read_the_error(agent: RunningAgent) -> None:
    """Earlier answers and the last one reach a client that was still sending when the agent refused it."""
    for _ in range(20):
        with RawConnection(agent.socket) as connection:
            connection.send(PING + b"\xc6\x00\x05\x00\x00" + bytes(300_000))
            first, last = connection.response(), connection.response()
            result(first)
            assert error(last)["Code"] == "ProtocolError"
            assert connection.response() is None


def test_connections_over_the_limit_are_refused(socket_path: Path) -> None:
    """Every client understands the refusal, which ends as soon as a connection is free."""
    arguments = configured(socket_path, "[limits]\nconnections_per_user = 2\n")
    with RunningAgent(arguments, socket_path) as agent:
        with RawConnection(agent.socket) as one, RawConnection(agent.socket) as two:
            assert is_alive(one)
            assert is_alive(two)
            with RawConnection(agent.socket) as three:
                assert error(three.response())["Code"] == "Rejected.Throttling"
                assert three.response() is None
        agent.wait_for("connection.refused")
        with agent.client() as client:
            wait_until("the agent notices that the others are gone", lambda: is_served(client))


def test_refused_user_does_not_block_other_users(socket_path: Path) -> None:
    """A refused connection takes no place that other users need."""
    arguments = configured(socket_path, "[limits]\nconnections = 3\nconnections_per_user = 2\n")
    with (
        RunningAgent(arguments, socket_path) as agent,
        RawConnection(agent.socket) as one,
        RawConnection(agent.socket) as two,
    ):
        assert is_alive(one)
        assert is_alive(two)
        refused = [RawConnection(agent.socket) for _ in range(40)]
        assert is_alive(one)
        assert result(two.call("GetAgentStatus", {}))["Counters"]["Connections"] == 2
        for connection in refused:
            connection.socket.close()
        agent.stop()
    assert len([line for line in agent.log if line["event"] == "connection.refused"]) < 40


def test_requests_over_the_rate_are_throttled(socket_path: Path) -> None:
    """Rejected.Throttling with status 429 leaves the connection open."""
    arguments = configured(socket_path, "[limits]\nrequests_per_second = 5\n")
    with RunningAgent(arguments, socket_path) as agent, RawConnection(agent.socket) as connection:
        connection.send(PING * 50)
        errors = [response.error for response in [connection.response() for _ in range(50)] if response]
        throttled = [error for error in errors if error]
        assert {(error["Code"], error["HttpStatus"]) for error in throttled} == {("Rejected.Throttling", 429)}
        assert 5 <= len(errors) - len(throttled) < 50


def test_drain_answers_received_requests_and_exits(socket_path: Path) -> None:
    """After SIGTERM in a pipeline, each received request is answered, the socket is removed, and the exit code is 0."""
    with (
        dev_agent(socket_path) as agent,
        RawConnection(agent.socket) as connection,
        RawConnection(agent.socket) as idle,
    ):
        assert is_alive(idle)
        connection.send(b"".join(wire.encode_request(i, "GenerateAndExportDataKey", GENERATE_SM2) for i in range(50)))
        assert connection.response() is not None
        agent.signal(signal.SIGTERM)
        assert len(answers(connection, 49)) == 49
        assert connection.response() is None
        assert idle.response() is None
        assert agent.wait() == 0
        assert not socket_path.exists()
        assert agent.log[-1]["event"] == "agent.stopped"


def test_a_request_half_sent_at_the_drain_may_be_finished(socket_path: Path) -> None:
    """A request that has begun is answered within the grace period."""
    with dev_agent(socket_path) as agent, RawConnection(agent.socket) as connection:
        assert is_alive(connection)
        connection.send(wire.encode_request(1, "GetAgentStatus", {})[:-1])
        status = wire.encode_request(1, "GetAgentStatus", {})
        with RawConnection(agent.socket) as other:
            assert is_alive(other)  # the half request has been read by now
        agent.signal(signal.SIGTERM)
        agent.wait_for("agent.draining")
        connection.send(status[-1:])
        assert result(connection.response())["State"] == "Draining"
        assert agent.wait() == 0


def test_slow_requests_are_answered_before_a_protocol_error(agent: RunningAgent) -> None:
    """Requests that run in threads are among them."""
    with RawConnection(agent.socket) as connection:
        requests = [wire.encode_request(i, "GenerateAndExportDataKey", GENERATE_SM2) for i in range(20)]
        connection.send(b"".join(requests) + b"\xc1")
        assert answers(connection, 20).keys() == set(range(20))
        assert connection.answer().msgid is None


PATIENT = """
import sys
from keyferry_agent.server import server
from keyferry_agent.cli.main import main

server.Server.drain.__defaults__ = (3_600.0,)
sys.exit(main())
"""
"""An agent whose grace period is an hour."""


def test_second_signal_skips_the_grace_period(socket_path: Path) -> None:
    """Half a request would hold the drain open for its grace period, which is an hour here."""
    with (
        RunningAgent(["--dev"], socket_path, command=("-c", PATIENT)) as agent,
        RawConnection(agent.socket) as connection,
    ):
        connection.send(PING[:-1])
        with RawConnection(agent.socket) as other:
            assert is_alive(other)
        agent.signal(signal.SIGTERM)
        agent.wait_for("agent.draining")
        agent.signal(signal.SIGTERM)
        assert agent.wait() == 0
        agent.wait_for("drain.grace_over")
        assert connection.response() is None


def test_the_log_is_json_and_holds_nothing_secret(socket_path: Path) -> None:
    """Neither log nor audit log has context values, blobs or keys."""
    to = recipient("RSAES_OAEP_SHA_256")
    with dev_agent(socket_path) as agent:
        with agent.client() as client:
            made = client.generate_and_export_data_key(
                key_id="alias/dev", encryption_context={"tenant": "very-private"}, **to.arguments
            )
            plaintext = client.decrypt(
                ciphertext_blob=made.ciphertext_blob, encryption_context={"tenant": "very-private"}
            )
        agent.stop()
        output = "".join(agent.output)
    records = [line for line in agent.log if line["event"] == "audit"]
    assert [record["operation"] for record in records] == ["GenerateAndExportDataKey", "Decrypt"]
    expected: dict[str, Any] = {
        "request_id": made.request_id,
        "uid": os.getuid(),
        "grant": "dev",
        "key_id": made.key_id,
        "key_version_id": made.key_version_id,
        "context_keys": ["tenant"],
        "outcome": "OK",
    }
    assert expected.items() <= records[0].items()
    assert records[0]["recipient"].startswith("sha256:")
    for secret in ("very-private", plaintext.plaintext, made.ciphertext_blob[60:], made.exported_data_key):
        assert secret not in output
    assert plaintext.plaintext not in repr(plaintext)


def test_client_without_an_agent_names_the_reason(socket_path: Path) -> None:
    """A missing file and a socket without a listener raise AgentUnavailable with different texts."""
    from keyferry import Client  # noqa: PLC0415

    with pytest.raises(AgentUnavailable, match="does not exist"):
        Client(socket_path).get_agent_status()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(socket_path))
    with pytest.raises(AgentUnavailable, match="no process listens"):
        Client(socket_path).get_agent_status()


def test_notifications_count_as_requests_of_the_rate(keyring: Path, socket_path: Path) -> None:
    """Over the rate, the agent closes the connection with a reason; another user's goes on."""
    notification = wire.encode_notification("Decrypt", {})
    with serving(keyring, socket_path, more="[limits]\nrequests_per_second = 5\n") as agent:
        with RawConnection(agent.socket) as connection:
            connection.send(notification * 1_000)
            last = connection.answer()
            assert (last.msgid, error(last)["Code"]) == (None, "Rejected.Throttling")
            assert "notifications" in error(last)["Message"]
            assert connection.response() is None
        agent.has_logged("connection.protocol_error", why="more notifications than this user may send")


def test_notifications_without_a_rate_are_counted(keyring: Path, socket_path: Path, tmp_path: Path) -> None:
    """Five hundred at once are below the limit."""
    metrics = tmp_path / "metrics.sock"
    with serving(keyring, socket_path, more=f'[metrics]\nlisten = "{metrics}"\n'), RawConnection(socket_path) as loud:
        notification = wire.encode_notification("x", {})
        loud.send(notification * 500 + wire.encode_request(1, "GetAgentStatus", {}))
        result(loud.response())
        # The thread that answers scrapes may be faster than the count behind the answer.
        wait_until("500 notifications are counted", lambda: scraped(metrics)["keyferry_notifications_total"] == 500)


async def test_notifications_without_a_rate_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is 10,000 a second. A busy machine takes fewer in that time, so the test lowers it."""
    assert server._NOTIFICATIONS_PER_SECOND == 10_000
    monkeypatch.setattr(server, "_NOTIFICATIONS_PER_SECOND", 1)
    path = tmp_path / "agent.sock"
    async with served(granting_all(), path, Batches()), connected(path, 1) as (loud,):
        loud.send(wire.encode_notification("x", {}) * 1_000)
        received = b""
        with trio.fail_after(30):
            while b"Rejected.Throttling" not in received:
                await trio.lowlevel.wait_readable(loud)
                data = loud.recv(65_536)
                assert data, f"the server closed the connection after {received!r}"
                received += data
