"""Faults inside the agent: a failing handler, audit log or system call does not spread."""

import errno
import gc
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
import trio.testing
from support.calls import error
from support.inside import new_agent, new_audit_log

from keyferry.errors import KmsError
from keyferry.protocol import wire
from keyferry_agent import handlers
from keyferry_agent.audit import AuditLog
from keyferry_agent.config.settings import Audit
from keyferry_agent.handlers.status import get_agent_status
from keyferry_agent.server.server import Server
from keyferry_agent.state import ServerState

STATUS = ("GetAgentStatus", dict[str, Any]())


@pytest.fixture
def agent() -> ServerState:
    """An agent's state, in this process, that grants everything to this user."""
    return new_agent()


@pytest.fixture
def audit(tmp_path: Path) -> AuditLog:
    """A record of requests in a file."""
    return new_audit_log(tmp_path)


@asynccontextmanager
async def served(agent: ServerState, audit: AuditLog, path: Path) -> AsyncIterator[Server]:
    """A server of this agent, on a real socket, for the time of a block."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    server = Server(agent, audit)
    async with trio.open_nursery() as nursery:
        listeners = [("default", trio.SocketListener(trio.socket.from_stdlib_socket(listening)))]
        await nursery.start(server.serve, listeners)
        yield server
        server.drain(grace=5)


async def ask(stream: trio.SocketStream, method: str, params: dict[str, Any]) -> wire.Response:
    """One request, one answer."""
    await stream.send_all(wire.encode_request(1, method, params))
    decoder = wire.Decoder()
    while True:
        received = await stream.receive_some()
        assert received
        decoder.feed(received)
        for message in decoder.messages():
            assert isinstance(message, wire.Response)
            return message


@pytest.mark.parametrize("slow", [False, True])
async def test_failing_handler_affects_only_its_request(
    agent: ServerState, audit: AuditLog, socket_path: Path, monkeypatch: pytest.MonkeyPatch, *, slow: bool
) -> None:
    """The caller gets InternalFailure and the log the traceback, for work on the loop and in a thread."""

    def fails() -> None:
        raise RuntimeError("key material in an exception's text")

    monkeypatch.setitem(handlers.HANDLERS, "DescribeKey", lambda _request: handlers.Job(fails, slow))
    async with served(agent, audit, socket_path):
        first, other = await trio.open_unix_socket(str(socket_path)), await trio.open_unix_socket(str(socket_path))
        async with first, other:
            with structlog.testing.capture_logs() as logged:
                response = await ask(first, "DescribeKey", {"KeyId": "alias/dev"})
            assert response.error is not None
            assert (response.error["Code"], response.error["HttpStatus"]) == ("InternalFailure", 500)
            assert "material" not in str(response.error)
            assert [entry["event"] for entry in logged] == ["request.failed"]
            assert logged[0]["request_id"] == response.error["RequestId"]
            for stream in (first, other):
                assert (await ask(stream, *STATUS)).error is None


async def test_fault_of_a_handler_keeps_the_audit_fields(
    agent: ServerState,
    audit: AuditLog,
    socket_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The audit entry of an internal error names the grant and the key, if they were known before the fault."""

    def fails(*_arguments: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("keyferry_agent.handlers.encryption.require_usable", fails)
    async with served(agent, audit, socket_path), await trio.open_unix_socket(str(socket_path)) as stream:
        with structlog.testing.capture_logs() as logged:
            response = await ask(stream, "Encrypt", {"KeyId": "alias/dev", "Plaintext": "AAAA"})
    assert error(response)["Code"] == "InternalFailure"
    assert [(entry["event"], entry["operation"]) for entry in logged] == [("request.failed", "Encrypt")]
    (entry,) = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert entry["outcome"] == "InternalFailure"
    assert entry["key_id"] in agent.keyring.keys
    assert entry["grant"]


async def test_agents_time_does_not_count_against_a_request(
    agent: ServerState,
    audit: AuditLog,
    socket_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mock_clock: trio.testing.MockClock,
) -> None:
    """A request is not late if its rest waits in the socket while the agent answers the one before it."""

    def takes_long(request: Any) -> handlers.Job:
        mock_clock.jump(2 * agent.settings.limits.request_timeout)
        return get_agent_status(request)

    monkeypatch.setitem(handlers.HANDLERS, "DescribeKey", takes_long)
    async with served(agent, audit, socket_path), await trio.open_unix_socket(str(socket_path)) as stream:
        second = wire.encode_request(2, *STATUS)
        await stream.send_all(wire.encode_request(1, "DescribeKey", {"KeyId": "alias/dev"}) + second[:5])
        decoder, answers = wire.Decoder(), []
        for rest in (second[5:], b""):
            received = await stream.receive_some()
            assert received
            decoder.feed(received)
            answers += list(decoder.messages())
            await stream.send_all(rest)
        assert [answer.msgid for answer in answers if isinstance(answer, wire.Response)] == [1, 2]


async def test_a_refusal_keeps_nothing_of_its_request_alive(
    agent: ServerState, audit: AuditLog, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No exception keeps the frames of a request alive until the next garbage collection."""

    def fails(_request: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setitem(handlers.HANDLERS, "DescribeKey", fails)
    gc.collect()
    gc.disable()
    before = {id(each) for each in gc.get_objects() if isinstance(each, KmsError)}  # of other tests
    try:
        async with served(agent, audit, socket_path), await trio.open_unix_socket(str(socket_path)) as stream:
            for method, params in (
                ("Encrypt", {"KeyId": "alias/none", "Plaintext": "AAAA"}),
                ("Decrypt", {"CiphertextBlob": "AAAA"}),
                ("Encrypt", {"KeyId": "alias/dev", "Plaintext": "AAAA", "DryRun": True}),
                ("DescribeKey", {"KeyId": "alias/dev"}),
                ("Explode", {}),
            ):
                assert (await ask(stream, method, params)).error is not None
            assert not [
                each for each in gc.get_objects() if type(each).__name__ == "Request" and hasattr(each, "caller")
            ]
            errors = [each for each in gc.get_objects() if isinstance(each, KmsError) and each.__traceback__]
            assert not [each for each in errors if id(each) not in before]
    finally:
        gc.enable()


async def test_a_request_that_cannot_be_recorded_is_refused(
    agent: ServerState, audit: AuditLog, socket_path: Path
) -> None:
    """The answer is not sent; requests are answered again when the disk has room."""
    full = AuditLog(Audit("/dev/full"))
    async with served(agent, full, socket_path) as server, await trio.open_unix_socket(str(socket_path)) as stream:
        response = await ask(stream, "DescribeKey", {"KeyId": "alias/dev"})
        assert error(response)["Code"] == "ServiceUnavailableTemporary"
        assert response.result is None
        server.context.audit = audit
        assert (await ask(stream, *STATUS)).error is None


async def test_nothing_follows_a_truncated_answer(
    agent: ServerState, audit: AuditLog, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client would read the answer of an offloaded job as the rest of the truncated one."""
    begun, go_on = threading.Event(), threading.Event()

    def takes_long() -> None:
        begun.set()
        assert go_on.wait(10)

    def cut_off(descriptor: int, data: bytes) -> int:
        return real(descriptor, data[:5] if bytes(data[:2]) == b"\x94\x01" else data)  # audit entries are written whole

    async def no_memory(_stream: trio.SocketStream, _data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        monkeypatch.undo()
        go_on.set()
        raise trio.BrokenResourceError

    real = os.write
    monkeypatch.setitem(handlers.HANDLERS, "DescribeKey", lambda _request: handlers.Job(takes_long, offload=True))
    async with served(agent, audit, socket_path), await trio.open_unix_socket(str(socket_path)) as stream:
        await stream.send_all(wire.encode_request(1, "DescribeKey", {"KeyId": "alias/dev"}))
        await trio.to_thread.run_sync(begun.wait)
        monkeypatch.setattr("keyferry_agent.server.rounds.os.write", cut_off)
        monkeypatch.setattr(trio.SocketStream, "send_all", no_memory)
        stream.socket._sock.send(wire.encode_request(2, *STATUS))  # type: ignore[attr-defined]
        received = b""
        while more := await stream.receive_some():
            received += more
        assert len(received) == 5


async def test_accepting_continues_after_a_lack_of_memory(
    agent: ServerState, audit: AuditLog, socket_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """The agent logs the failure, waits, and accepts again."""
    real = trio.SocketListener.accept
    failures = [OSError(errno.ENOMEM, "Cannot allocate memory")]

    async def accept(self: trio.SocketListener) -> trio.SocketStream:
        if failures:
            await trio.lowlevel.checkpoint()
            raise failures.pop()
        return await real(self)

    monkeypatch.setattr(trio.SocketListener, "accept", accept)
    with structlog.testing.capture_logs() as logged:
        async with served(agent, audit, socket_path), await trio.open_unix_socket(str(socket_path)) as stream:
            assert (await ask(stream, *STATUS)).error is None
    assert [entry["error"] for entry in logged if entry["event"] == "accept.failed"] == ["Cannot allocate memory"]


async def test_process_that_exited_before_identification_is_refused(
    agent: ServerState, audit: AuditLog, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection without a process to hold is closed, and is not a fault."""

    def gone(*_: Any) -> None:
        raise ProcessLookupError

    async with served(agent, audit, socket_path):
        monkeypatch.setattr("keyferry_agent.server.server.evidence", gone)
        with structlog.testing.capture_logs() as logged:
            async with await trio.open_unix_socket(str(socket_path)) as stream:
                assert await stream.receive_some() == b""
        assert [(line["event"], line["log_level"]) for line in logged] == [("connection.process_ended", "info")]
        monkeypatch.undo()
        async with await trio.open_unix_socket(str(socket_path)) as stream:
            assert (await ask(stream, *STATUS)).error is None


async def test_unexpected_failure_ends_only_its_connection(
    agent: ServerState, audit: AuditLog, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outermost function of a connection catches every exception."""
    async with served(agent, audit, socket_path), await trio.open_unix_socket(str(socket_path)) as other:
        assert (await ask(other, *STATUS)).error is None
        with monkeypatch.context() as patch, structlog.testing.capture_logs() as logged:
            patch.setattr("keyferry_agent.server.line.wire.Decoder.feed", lambda _self, _data: 1 / 0)
            async with await trio.open_unix_socket(str(socket_path)) as stream:
                await stream.send_all(b"x")
                assert await stream.receive_some() == b""
        assert [entry["event"] for entry in logged] == ["connection.failed"]
        assert (await ask(other, *STATUS)).error is None


async def test_partly_sent_answer_is_finished_before_the_next(
    agent: ServerState, audit: AuditLog, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the rest of an answer is sent, the answer of an offloaded job waits; when sending ends, it is sent behind it."""
    begun, go_on = threading.Event(), threading.Event()

    def takes_long() -> None:
        begun.set()
        assert go_on.wait(10)

    def half(descriptor: int, data: bytes) -> int:
        return real(descriptor, data[: len(data) // 2] if bytes(data[:2]) == b"\x94\x01" else data)

    async def send_all(stream: trio.SocketStream, data: bytes) -> None:
        go_on.set()
        monkeypatch.undo()
        await trio.to_thread.run_sync(time.sleep, 0)  # so that the job's answer may come
        await trio.testing.wait_all_tasks_blocked(0.05)
        await stream.send_all(data)

    real = os.write
    monkeypatch.setitem(handlers.HANDLERS, "DescribeKey", lambda _request: handlers.Job(takes_long, offload=True))
    async with served(agent, audit, socket_path), await trio.open_unix_socket(str(socket_path)) as stream:
        stream.socket._sock.send(wire.encode_request(1, "DescribeKey", {"KeyId": "alias/dev"}))  # type: ignore[attr-defined]
        await trio.to_thread.run_sync(begun.wait)
        monkeypatch.setattr("keyferry_agent.server.rounds.os.write", half)
        monkeypatch.setattr(trio.SocketStream, "send_all", send_all)
        stream.socket._sock.send(wire.encode_request(2, *STATUS))  # type: ignore[attr-defined]
        decoder = wire.Decoder()
        answers: list[wire.Message] = []
        while len(answers) < 2:
            received = await stream.receive_some()
            assert received
            decoder.feed(received)
            answers += list(decoder.messages())
    assert [answer.msgid for answer in answers if isinstance(answer, wire.Response)] == [2, 1]
