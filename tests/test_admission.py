"""The admission of connections at the limits."""

import functools
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.agent import RawConnection, RunningAgent
from support.keyring import serving
from support.other_user import line_of, running_as
from support.skip_unless import root

from keyferry.protocol import wire
from keyferry_agent.authz.caller import Caller
from keyferry_agent.authz.grants import Grant
from keyferry_agent.config.settings import Limits, Settings
from keyferry_agent.keyring.keyring import development_keyring
from keyferry_agent.peer import Peer
from keyferry_agent.server.admission import Admission, NoRoomError, Place
from keyferry_agent.state import ServerState

GRANTED, NAMED, STRANGER = 1, 2, os.geteuid() + 1_000  # not the user that runs the tests
KEEP = """
connections = []
for _ in range(int(sys.argv[2])):
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(sys.argv[1])
    except OSError:
        break
    connections.append(connection)
print(len(connections), flush=True)
sys.stdin.read()
"""
"""Connect so often, and keep all connections."""
ASK = """
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(bytes.fromhex(sys.argv[2]))
print(connection.recv(65536), flush=True)
"""


@root()
def test_subordinate_users_take_no_place_that_others_need(keyring: Path, shared_socket: Path) -> None:
    """Subordinate uids with their maximum of connections each do not keep out callers with grants, or probes."""
    more = 'mode = "0666"\n[limits]\nconnections = 400\nconnections_per_user = 100\n'
    with serving(keyring, shared_socket, more=more, to="uid=4300") as agent, ExitStack() as stack:
        for user in range(4_207, 4_215):
            keeping = stack.enter_context(running_as(KEEP, shared_socket, 100, uid=user))
            assert line_of(keeping) == "100"
        request = wire.encode_request(1, "DescribeKey", {"KeyId": "alias/a"})
        for user, answer in ((4_300, b"KeyMetadata"), (4_301, b"NoPermission"), (0, b"NoPermission")):
            with running_as(ASK, shared_socket, request.hex(), uid=user) as asking:
                assert answer.decode() in line_of(asking), user
        with RawConnection(shared_socket) as probe:
            status = probe.call("GetAgentStatus", {})
            assert status.error is None
        agent.wait_for("connection.closed_for_another")
        assert agent.stop() == 0


class Room:
    """An agent's admission, with callers who come and go."""

    def __init__(self, connections: int, per_user: int) -> None:
        self.agent = ServerState(
            self._settings(connections, per_user, GRANTED), development_keyring(backing="auto", require=False)
        )
        self.admission = Admission(self.agent)
        self.closed: list[str] = []
        self.places: dict[str, Place] = {}

    def _settings(self, connections: int, per_user: int, granted: int) -> Settings:
        grants = (
            Grant("g", {"uid": granted}, ("kms:*",), ("*",)),
            Grant("p", {"uid": NAMED, "exe": "/bin/true"}, ("kms:*",), ("*",)),
            Grant("l", {"listener": "default", "exe": "/bin/false"}, ("kms:*",), ("*",)),
        )
        return Settings(memory="prefer", grants=grants, limits=Limits(connections, per_user))

    def enter(self, name: str, uid: int, *, exe: str | None = None, seen: bool = True) -> None:
        """A connection comes."""
        caller = Caller(Peer(uid, frozenset(), 1, "default", exe=exe))
        self.places[name] = self.admission.enter(caller, seen=seen, close=functools.partial(self.closed.append, name))

    def leave(self, name: str) -> None:
        """It goes."""
        self.admission.leave(self.places.pop(name))


def test_strangers_share_half_of_the_places_oldest_closed_first() -> None:
    """Callers with a grant take the places of strangers, one after the other."""
    room = Room(connections=4, per_user=4)
    room.enter("s1", STRANGER)
    room.enter("s2", STRANGER + 1)
    room.enter("s3", STRANGER + 2)
    assert room.closed == ["s1"]
    for number in range(4):
        room.enter(f"g{number}", GRANTED)
    assert room.closed == ["s1", "s2", "s3"]
    assert room.agent.counters.connections == 4
    with pytest.raises(NoRoomError, match="one user"):
        room.enter("g5", GRANTED)
    with pytest.raises(NoRoomError, match="all the connections it may have"):
        room.enter("s4", STRANGER)
    room.leave("g0")
    room.enter("s5", STRANGER)
    room.enter("p", NAMED)
    assert room.closed[3:] == ["s5"]


def test_the_user_with_most_connections_makes_room() -> None:
    """The agent closes a connection of the stranger with the most; a stranger with one keeps it."""
    room = Room(connections=8, per_user=8)
    room.enter("quiet", STRANGER)
    for number in range(20):
        room.enter(f"loud{number}", STRANGER + 1)
    assert "quiet" not in room.closed
    assert room.closed == [f"loud{number}" for number in range(17)]


def test_operators_and_granted_users_are_not_strangers() -> None:
    """Root, the agent's user and users whom a grant names are not strangers; a root whose process is hidden is one."""
    room = Room(connections=2, per_user=2)
    room.enter("root", 0)
    room.enter("own", os.geteuid())
    for name, uid, seen in (("elsewhere", 0, False), ("stranger", STRANGER, True), ("named", NAMED, True)):
        with pytest.raises(NoRoomError):
            room.enter(name, uid, seen=seen)
    assert not room.closed
    room.leave("own")
    room.enter("named", NAMED)
    assert not room.closed
    room.leave("named")
    room.enter("elsewhere", 0, seen=False)
    room.enter("named", NAMED)
    assert room.closed == ["elsewhere"]


def test_a_caller_is_a_stranger_until_its_program_is_known() -> None:
    """A grant to a program matches only after the agent has identified the caller's program."""
    room = Room(connections=2, per_user=2)
    room.enter("program", STRANGER)
    place = room.places["program"]
    assert not place.granted
    place.caller.know(place.caller.peer._replace(exe="/bin/false"))
    room.admission.judge(place)
    assert place.granted
    room.enter("g", GRANTED)
    with pytest.raises(NoRoomError):
        room.enter("h", GRANTED)
    place.caller.know(place.caller.peer._replace(exe="/bin/echo"))
    room.admission.judge(place)
    room.enter("h", GRANTED)
    assert room.closed == ["program"]
    room.admission.judge(place)  # which has lost its place
    room.leave("program")
    assert room.agent.counters.connections == 2


def test_reload_changes_which_callers_are_strangers() -> None:
    """The change counts as soon as there are too few places."""
    room = Room(connections=2, per_user=2)
    room.enter("before", GRANTED)
    room.enter("after", STRANGER)
    room.agent.adopt(room._settings(2, 2, STRANGER), room.agent.keyring)
    room.enter("new", STRANGER)
    assert room.closed == ["before"]


def test_caller_over_its_quota_displaces_no_other(agent: RunningAgent) -> None:
    """The refusal of a connection closes no other connection."""
    with ExitStack() as stack:
        first = stack.enter_context(RawConnection(agent.socket))
        assert first.call("GetAgentStatus", {}).error is None
        for _ in range(200):
            stack.enter_context(RawConnection(agent.socket))
        assert first.call("GetAgentStatus", {}).error is None
