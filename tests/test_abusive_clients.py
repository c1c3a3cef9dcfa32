"""Peers that mean harm, beside an honest client that has to be served all the while: slow ones, many, and those that vanish."""

import hashlib
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.agent import PATIENCE, RawConnection, RunningAgent
from support.calls import call_ok, result
from support.keyring import serving
from support.keys import recipient
from support.peers import peers
from support.skip_unless import root
from support.stress import PING, AgentUnderTest, agent_under_stress, limits, scale, until_closed

from keyferry.protocol import wire


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentUnderTest]:
    """One agent for all that need no other limits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8_192)), hard))
    with agent_under_stress(
        tmp_path_factory.mktemp("peers"), "connections = 3000\nconnections_per_user = 3000"
    ) as target:
        yield target
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def target(agent: AgentUnderTest) -> Iterator[AgentUnderTest]:
    """The same, which has to be as it was after each test."""
    agent.set_baseline()
    yield agent
    agent.assert_recovered()


# --- slow ones --------------------------------------------------------------------------------------------------------


def test_slow_writers_are_answered_when_they_are_done(target: AgentUnderTest) -> None:
    """Clients that send single bytes are answered in the end, and another client is served between any two bytes."""
    with ExitStack() as stack:
        slow = [stack.enter_context(target.connect()) for _ in range(scale(100, 1_000))]
        for byte in PING:
            for connection in slow:
                connection.send(bytes([byte]))
            target.background.wait_served(1)
        for connection in slow:
            result(connection.response())


def test_byte_by_byte_request_has_the_usual_deadline(tmp_path: Path) -> None:
    """Single bytes do not extend the deadline of a request."""
    endless = b"\xda\xff\x00" + bytes(5_000)
    with agent_under_stress(tmp_path, "request_timeout = 1") as target, target.connect() as dribbling:

        def dribble() -> None:
            for byte in endless:
                dribbling.send(bytes([byte]))
                target.background.wait_served(1)

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            dribble()
        target.agent.wait_for("connection.slow_request")


def test_slow_readers_cost_their_own_answers_only(tmp_path: Path) -> None:
    """The agent closes connections that send requests and read nothing, and a repetition takes no more memory."""
    count = scale(12, 1_000)
    tables = "connections = 3000\nconnections_per_user = 3000\nrequest_timeout = 1"
    with agent_under_stress(tmp_path, tables) as target:
        for stop in (None, signal.SIGSTOP):
            with peers("deaf", target.socket, count) as deaf:
                assert deaf.stdout is not None
                deaf.stdout.readline()  # the buffers are full
                if stop is not None:
                    deaf.send_signal(stop)
                target.background.wait_served()
                target.agent.wait_for("connection.answers_not_taken", count if stop is None else 2 * count)
            target.assert_recovered(grows=scale(16, 400) * 2**20)
            target.set_baseline()


def test_flood_of_notifications_delays_no_other_client(target: AgentUnderTest) -> None:
    """Notifications have no answers that would make the agent yield; the audit log shows the order of service."""
    flood = wire.encode_notification("x", {}) * 1_000 + PING
    with target.connect() as loud, target.connect() as quiet:
        loud.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for _ in range(8):  # which of two that wait has the first turn is left to chance
            target.agent.signal(signal.SIGSTOP)
            loud.send(flood)
            quiet.send(PING)
            target.agent.signal(signal.SIGCONT)
            answers = quiet.response(), loud.response()
            ids = [answer.result["RequestId"] for answer in answers if answer and answer.result]
            text = target.record.read_text()
            assert text.index(ids[0]) < text.index(ids[1])


# --- many -------------------------------------------------------------------------------------------------------------


def test_short_lived_client_processes_leave_nothing(target: AgentUnderTest) -> None:
    """A fork bomb of clients that send nothing, part of a message or noise and exit leaves no connection behind."""
    with ExitStack() as stack:
        bombs = [stack.enter_context(peers("short", target.socket, scale(200, 5_000))) for _ in range(2)]
        target.background.wait_served()
        for bomb in bombs:
            assert bomb.wait(PATIENCE) == 0


def test_greedy_connections_delay_others_by_one_batch(target: AgentUnderTest) -> None:
    """A request waits at most for one batch of each connection that is full of requests."""
    with peers("greedy", target.socket, scale(30, 200)):
        while target.look()[0] < scale(30, 200):
            target.background.wait_served(1)
        for _ in range(5):
            before = target.count_audited()
            target.background.wait_served(1)
            # Two requests, and the rest of a turn that had begun: 16 for each of the others, twice, and some.
            assert target.count_audited() - before < 3 * 3 * 16 * scale(30, 200)


@root()
def test_slow_request_waits_for_few_jobs_of_another_user(shared_folder: Path) -> None:
    """The wait does not grow with the number of another user's full connections; counts of answers show it."""
    other = 12_345
    grant = f'[[grant]]\nname = "o"\nto = {{ uid = {other} }}\nactions = ["kms:*"]\nkeys = ["*"]\n'
    slow = wire.encode_request(1, "GenerateAndExportDataKey", {"KeyId": "alias/dev", **recipient("SM2PKE").params})
    with (
        agent_under_stress(shared_folder, grant, mode="0666") as target,
        target.connect() as mine,
        peers("greedy", target.socket, 30, user=other, ask=slow),
    ):
        while target.count_audited("GenerateAndExportDataKey") < 1_000:  # all of them are under way
            target.background.wait_served(1)
        mine.send(PING + slow)
        quick, late = result(mine.response()), result(mine.response())
        between = target.record.read_text().split(quick["RequestId"])[1].split(late["RequestId"])[0]
        assert between.count(f'"uid": {other},') < 64  # of 480 that wait


def test_connections_closed_before_accept_are_dropped(target: AgentUnderTest) -> None:
    """The agent drops a full queue of closed connections, and serves the next one."""
    target.agent.signal(signal.SIGSTOP)
    for number in range(200):
        with target.connect() as connection:
            connection.send(PING[: number % 3 * 10])
    target.agent.signal(signal.SIGCONT)
    with target.connect() as connection:
        connection.send(PING)
        assert connection.response() is not None


def test_requests_of_a_dead_process_are_not_processed(target: AgentUnderTest) -> None:
    """The requests of a process that exited before accept(2) are neither processed nor recorded."""
    target.agent.signal(signal.SIGSTOP)
    with peers("gone", target.socket, 50) as parent:
        assert parent.stdout is not None
        dead = parent.stdout.read().split()
    assert len(dead) == 50
    target.agent.signal(signal.SIGCONT)
    target.assert_recovered()
    record = target.record.read_bytes()
    assert not [pid for pid in dead if b'"pid": %s,' % pid in record]


# --- those that vanish ------------------------------------------------------------------------------------------------


def test_a_peer_may_hang_up_after_any_byte_of_a_request(target: AgentUnderTest) -> None:
    """A peer may close, reset or shut down its connection after any byte of a request."""
    for length in range(len(PING)):
        for how in (None, socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR):
            with target.connect() as connection:
                if how is not None and length % 2:
                    connection.socket.shutdown(how)  # before it says anything, too
                if how not in (socket.SHUT_WR, socket.SHUT_RDWR) or not length % 2:
                    connection.socket.send(PING[:length])
                if how is not None:
                    connection.socket.shutdown(how)
    target.background.wait_served()


def test_a_peer_may_hang_up_after_any_byte_of_an_answer(target: AgentUnderTest) -> None:
    """The agent records a request before its answer, so each answered request has its entry."""
    with target.connect() as connection:
        connection.send(PING)
        size = len(connection.socket.recv(65_536))
    before = target.count_audited("DescribeKey")
    for length in range(size):
        with target.connect() as connection:
            connection.send(PING)
            if length:
                assert connection.socket.recv(length, socket.MSG_WAITALL)
            else:
                connection.socket.shutdown(socket.SHUT_RD)
    target.assert_recovered()
    assert target.count_audited("DescribeKey") - before in (
        size - 1,
        size,
    )  # who reads nothing may be gone before it is looked at


def test_descriptors_sent_by_a_peer_are_closed(target: AgentUnderTest) -> None:
    """The kernel closes passed descriptors with the message that they came with, or with the connection."""
    reading, writing = os.pipe()
    with open(reading, "rb") as end, target.connect() as connection:
        for data in (PING, PING[:10], PING[10:], b"\xc1"):
            socket.send_fds(connection.socket, [data], [writing] * 100)
            target.background.wait_served(1)
        os.close(writing)
        assert end.read() == b""  # the other end is closed
        assert len(until_closed(connection)) == 3


def test_bytes_out_of_band_harm_their_own_connection_only(target: AgentUnderTest) -> None:
    """The protocol has no out-of-band bytes, so the agent closes a connection with such bytes."""
    with target.connect() as urgent:
        urgent.socket.send(b"!", socket.MSG_OOB)
        target.background.wait_served()
        assert until_closed(urgent) == []
    with target.connect() as urgent:
        urgent.socket.send(PING + b"!", socket.MSG_OOB)
        assert urgent.response() is not None
        target.background.wait_served()


@pytest.mark.parametrize("name", [b"", b"\0keyferry-hostile-\xff\n", b"named-\xff\n"])
def test_a_peer_may_have_any_socket_address(target: AgentUnderTest, tmp_path: Path, name: bytes) -> None:
    """A peer's socket may have a path, no address or an abstract name."""
    with socket.socket(socket.AF_UNIX) as odd:
        if name:
            odd.bind(name if name.startswith(b"\0") else os.fsencode(tmp_path) + b"/" + name)
        odd.connect(str(target.socket))
        odd.sendall(b"")
        odd.sendall(PING)
        assert odd.recv(65_536)


def test_a_socket_of_another_kind_does_not_connect(target: AgentUnderTest) -> None:
    """Datagram sockets do not connect, and the abstract namespace has no agent under the socket's name."""
    for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as other, pytest.raises(OSError, match="wrong type"):
            other.connect(str(target.socket))
    with socket.socket(socket.AF_UNIX) as abstract, pytest.raises(ConnectionRefusedError):
        abstract.connect(b"\0" + os.fsencode(target.socket))


# --- an agent that is stopped -----------------------------------------------------------------------------------------


def test_requests_sent_to_a_stopped_agent_are_answered_later(tmp_path: Path) -> None:
    """The rest of a half request arrived in time, although its deadline passed while the agent was stopped."""
    with (
        agent_under_stress(tmp_path, "request_timeout = 1") as target,
        target.connect() as half,
        target.connect() as whole,
    ):
        half.send(PING[:-1])
        target.background.wait_served(2)  # the agent has read the half
        target.agent.signal(signal.SIGSTOP)
        half.send(PING[-1:])
        whole.send(PING * 20)
        half.socket.settimeout(1.2)
        with pytest.raises(TimeoutError):  # longer than a request may take
            half.response()
        half.socket.settimeout(PATIENCE)
        target.agent.signal(signal.SIGCONT)
        assert half.response() is not None
        for _ in range(20):
            assert whole.response() is not None


def test_drain_ends_while_clients_send_without_end(tmp_path: Path) -> None:
    """New and full connections do not prolong a drain; every answer is recorded."""
    path = tmp_path / "agent.sock"
    with (
        RunningAgent(limits(tmp_path, "request_timeout = 1"), path) as agent,
        RawConnection(path) as honest,
        peers("greedy", path, 8),
        peers("short", path, 10_000),
        peers("deaf", path, 2) as deaf,
    ):
        assert deaf.stdout is not None
        deaf.stdout.readline()
        honest.send(PING * 100)
        assert honest.response() is not None
        agent.signal(signal.SIGTERM)
        assert len(until_closed(honest)) == 99
        assert agent.wait() == 0
    assert not path.exists()
    assert agent.log[-1]["event"] == "agent.stopped"


# --- a program that is to be hashed -----------------------------------------------------------------------------------


def test_huge_program_delays_neither_other_hashes_nor_a_drain(keyring: Path, socket_path: Path, tmp_path: Path) -> None:
    """A program file with a hole of 64 GiB gets no hash, and its connections use no thread that others need."""
    huge = tmp_path / "huge"
    shutil.copy(os.path.realpath(sys.executable), huge)
    this = hashlib.sha256(huge.read_bytes()).hexdigest()
    os.truncate(huge, 64 << 30)
    with (
        serving(keyring, socket_path, to=f'uid={os.getuid()}, sha256="sha256:{this}"') as agent,
        peers("once", socket_path, 45, program=huge) as endless,
    ):
        assert endless.stdout is not None
        endless.stdout.readline()
        with RawConnection(socket_path) as connection:
            call_ok(connection, "DescribeKey", {"KeyId": "alias/a"})
        assert agent.stop() == 0
