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
from support.calls import ok
from support.keyring import serving
from support.keys import recipient
from support.peers import peers
from support.skip_unless import root
from support.stress import PING, Siege, besieged, limits, many, until_closed

from keyferry.protocol import wire


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    """One agent for all that need no other limits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8_192)), hard))
    with besieged(tmp_path_factory.mktemp("peers"), "connections = 3000\nconnections_per_user = 3000") as siege:
        yield siege
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def siege(agent: Siege) -> Iterator[Siege]:
    """The same, which has to be as it was after each test."""
    agent.begins_here()
    yield agent
    agent.is_over()


# --- slow ones --------------------------------------------------------------------------------------------------------


def test_slow_writers_are_answered_when_they_are_done(siege: Siege) -> None:
    """A byte from each, and another byte from each; somebody else is served between any two."""
    with ExitStack() as stack:
        slow = [stack.enter_context(siege.connect()) for _ in range(many(100, 1_000))]
        for byte in PING:
            for connection in slow:
                connection.send(bytes([byte]))
            siege.honest.is_served(1)
        for connection in slow:
            answer = connection.response()
            assert answer is not None
            assert answer.error is None


def test_a_request_that_comes_byte_by_byte_has_no_longer_than_any_other(tmp_path: Path) -> None:
    """Each byte in time does not make the whole of it so."""
    endless = b"\xda\xff\x00" + bytes(5_000)
    with besieged(tmp_path, "request_timeout = 1") as siege, siege.connect() as dribbling:

        def dribble() -> None:
            for byte in endless:
                dribbling.send(bytes([byte]))
                siege.honest.is_served(1)

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            dribble()
        siege.agent.wait_for("connection.slow_request")


def test_slow_readers_cost_their_own_answers_only(tmp_path: Path) -> None:
    """Those that ask without end and read nothing, stopped by a signal or not, are hung up on; the same again takes no more."""
    count = many(12, 1_000)
    tables = "connections = 3000\nconnections_per_user = 3000\nrequest_timeout = 1"
    with besieged(tmp_path, tables) as siege:
        for stop in (None, signal.SIGSTOP):
            with peers("deaf", siege.socket, count) as deaf:
                assert deaf.stdout is not None
                deaf.stdout.readline()  # nobody takes any more
                if stop is not None:
                    deaf.send_signal(stop)
                siege.honest.is_served()
                siege.agent.wait_for("connection.answers_not_taken", count if stop is None else 2 * count)
            siege.is_over(grows=many(16, 400) * 2**20)
            siege.begins_here()


def test_a_flood_of_notifications_lets_others_have_their_turns(siege: Siege) -> None:
    """Nobody is answered, so nothing else would make the agent look at others: the record tells who was first."""
    flood = wire.encode_notification("x", {}) * 1_000 + PING
    with siege.connect() as loud, siege.connect() as quiet:
        loud.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for _ in range(8):  # which of two that wait has the first turn is left to chance
            siege.agent.signal(signal.SIGSTOP)
            loud.send(flood)
            quiet.send(PING)
            siege.agent.signal(signal.SIGCONT)
            answers = quiet.response(), loud.response()
            ids = [answer.result["RequestId"] for answer in answers if answer and answer.result]
            text = siege.record.read_text()
            assert text.index(ids[0]) < text.index(ids[1])


# --- many -------------------------------------------------------------------------------------------------------------


def test_processes_that_connect_say_something_and_end_leave_nothing(siege: Siege) -> None:
    """A fork bomb of them: some say nothing, some half a thing, some nonsense; nobody reads an answer."""
    with ExitStack() as stack:
        bombs = [stack.enter_context(peers("short", siege.socket, many(200, 5_000))) for _ in range(2)]
        siege.honest.is_served()
        for bomb in bombs:
            assert bomb.wait(PATIENCE) == 0


def test_greedy_connections_by_the_dozen_keep_nobody_out(siege: Siege) -> None:
    """Each is full of requests, and reads all answers: an honest request waits for a turn of each, and no longer."""
    with peers("greedy", siege.socket, many(30, 200)):
        while siege.look()[0] < many(30, 200):
            siege.honest.is_served(1)
        for _ in range(5):
            before = siege.answered()
            siege.honest.is_served(1)
            # Two requests, and the rest of a turn that had begun: 16 for each of the others, twice, and some.
            assert siege.answered() - before < 3 * 3 * 16 * many(30, 200)


@root()
def test_a_slow_request_waits_for_a_few_of_another_users_and_not_for_all(shared_folder: Path) -> None:
    """However many connections are full of them: what was answered before it and after one that is not slow is counted."""
    other = 12_345
    grant = f'[[grant]]\nname = "o"\nto = {{ uid = {other} }}\nactions = ["kms:*"]\nkeys = ["*"]\n'
    slow = wire.encode_request(1, "GenerateAndExportDataKey", {"KeyId": "alias/dev", **recipient("SM2PKE").params})
    with (
        besieged(shared_folder, grant, mode="0666") as siege,
        siege.connect() as mine,
        peers("greedy", siege.socket, 30, user=other, ask=slow),
    ):
        while siege.answered("GenerateAndExportDataKey") < 1_000:  # all of them are under way
            siege.honest.is_served(1)
        mine.send(PING + slow)
        quick, late = mine.response(), mine.response()
        assert quick is not None
        assert late is not None
        assert quick.result is not None
        assert late.result is not None
        between = siege.record.read_text().split(quick.result["RequestId"])[1].split(late.result["RequestId"])[0]
        assert between.count(f'"uid": {other},') < 64  # of 480 that wait


def test_connections_that_are_closed_before_they_are_accepted_are_none(siege: Siege) -> None:
    """Each of a full queue; the next one is served."""
    siege.agent.signal(signal.SIGSTOP)
    for number in range(200):
        with siege.connect() as connection:
            connection.send(PING[: number % 3 * 10])
    siege.agent.signal(signal.SIGCONT)
    with siege.connect() as connection:
        connection.send(PING)
        assert connection.response() is not None


def test_who_died_before_it_was_accepted_is_not_served(siege: Siege) -> None:
    """What it had asked is neither done nor recorded: nobody is there whom that could be for."""
    siege.agent.signal(signal.SIGSTOP)
    with peers("gone", siege.socket, 50) as parent:
        assert parent.stdout is not None
        dead = parent.stdout.read().split()
    assert len(dead) == 50
    siege.agent.signal(signal.SIGCONT)
    siege.is_over()
    record = siege.record.read_bytes()
    assert not [pid for pid in dead if b'"pid": %s,' % pid in record]


# --- those that vanish ------------------------------------------------------------------------------------------------


def test_a_peer_may_hang_up_after_any_byte_of_a_request(siege: Siege) -> None:
    """In any of the ways to hang up."""
    for length in range(len(PING)):
        for how in (None, socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR):
            with siege.connect() as connection:
                if how is not None and length % 2:
                    connection.socket.shutdown(how)  # before it says anything, too
                if how not in (socket.SHUT_WR, socket.SHUT_RDWR) or not length % 2:
                    connection.socket.send(PING[:length])
                if how is not None:
                    connection.socket.shutdown(how)
    siege.honest.is_served()


def test_a_peer_may_hang_up_after_any_byte_of_an_answer(siege: Siege) -> None:
    """Whatever was answered was recorded before: each has its line."""
    with siege.connect() as connection:
        connection.send(PING)
        size = len(connection.socket.recv(65_536))
    before = siege.answered("DescribeKey")
    for length in range(size):
        with siege.connect() as connection:
            connection.send(PING)
            if length:
                assert connection.socket.recv(length, socket.MSG_WAITALL)
            else:
                connection.socket.shutdown(socket.SHUT_RD)
    siege.is_over()
    assert siege.answered("DescribeKey") - before in (
        size - 1,
        size,
    )  # who reads nothing may be gone before it is looked at


def test_descriptors_that_are_sent_along_are_nobodys(siege: Siege) -> None:
    """They are closed with the message that they came with, before, in and after requests; or with the connection."""
    reading, writing = os.pipe()
    with open(reading, "rb") as end, siege.connect() as connection:
        for data in (PING, PING[:10], PING[10:], b"\xc1"):
            socket.send_fds(connection.socket, [data], [writing] * 100)
            siege.honest.is_served(1)
        os.close(writing)
        assert end.read() == b""  # nobody has the other end
        assert len(until_closed(connection)) == 3


def test_bytes_out_of_band_harm_their_own_connection_only(siege: Siege) -> None:
    """The protocol has none."""
    with siege.connect() as urgent:
        urgent.socket.send(b"!", socket.MSG_OOB)
        siege.honest.is_served()
        assert until_closed(urgent) == []
    with siege.connect() as urgent:
        urgent.socket.send(PING + b"!", socket.MSG_OOB)
        assert urgent.response() is not None
        siege.honest.is_served()


@pytest.mark.parametrize("name", [b"", b"\0keyferry-hostile-\xff\n", b"named-\xff\n"])
def test_a_peer_may_be_called_anything(siege: Siege, tmp_path: Path, name: bytes) -> None:
    """Or nothing; also in the abstract namespace."""
    with socket.socket(socket.AF_UNIX) as odd:
        if name:
            odd.bind(name if name.startswith(b"\0") else os.fsencode(tmp_path) + b"/" + name)
        odd.connect(str(siege.socket))
        odd.sendall(b"")
        odd.sendall(PING)
        assert odd.recv(65_536)


def test_a_socket_of_another_kind_does_not_connect(siege: Siege) -> None:
    """Nor is there an agent in the abstract namespace under its socket's name."""
    for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as other, pytest.raises(OSError, match="wrong type"):
            other.connect(str(siege.socket))
    with socket.socket(socket.AF_UNIX) as abstract, pytest.raises(ConnectionRefusedError):
        abstract.connect(b"\0" + os.fsencode(siege.socket))


# --- an agent that is stopped -----------------------------------------------------------------------------------------


def test_what_was_sent_to_an_agent_that_was_stopped_is_answered_when_it_goes_on(tmp_path: Path) -> None:
    """Half a request, too, whose time was up meanwhile: its rest lay there in time."""
    with besieged(tmp_path, "request_timeout = 1") as siege, siege.connect() as half, siege.connect() as whole:
        half.send(PING[:-1])
        siege.honest.is_served(2)  # the agent has read the half
        siege.agent.signal(signal.SIGSTOP)
        half.send(PING[-1:])
        whole.send(PING * 20)
        half.socket.settimeout(1.2)
        with pytest.raises(TimeoutError):  # longer than a request may take
            half.response()
        half.socket.settimeout(PATIENCE)
        siege.agent.signal(signal.SIGCONT)
        assert half.response() is not None
        for _ in range(20):
            assert whole.response() is not None


def test_a_drain_ends_while_others_ask_without_end(tmp_path: Path) -> None:
    """New connections, and full ones: it ends by itself, with every answer recorded, and nothing is left."""
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


def test_a_program_without_end_holds_up_nobody_elses_hash_and_no_drain(
    keyring: Path, socket_path: Path, tmp_path: Path
) -> None:
    """With a hole of 64 GiB behind it. It has no hash, and its connections take no thread that others need."""
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
            ok(connection, "DescribeKey", {"KeyId": "alias/a"})
        assert agent.stop() == 0
