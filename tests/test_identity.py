"""The identity of callers: evidence about processes, and real processes that impersonate others."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.agent import PATIENCE, RawConnection, RunningAgent
from support.keyring import serving
from support.other_user import line_of, running_as
from support.skip_unless import root

from keyferry.protocol import wire
from keyferry_agent.authz.grants import Grant, Policy
from keyferry_agent.peer import Groups, Peer, Process, evidence, inspect
from keyferry_agent.peer.process import pod_of, unit_of

POD = "3f1d2a77-0b6e-4a0e-9f0a-2f7b6f0c1d22"
POD_ = POD.replace("-", "_")


@pytest.mark.parametrize(
    ("cgroups", "unit"),
    [
        ("0::/system.slice/orders.service\n", "orders.service"),
        ("0::/system.slice/system-getty.slice/getty@tty1.service\n", "getty@tty1.service"),
        ("0::/system.slice/orders.service/worker/1\n", "orders.service"),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", "session-3.scope"),
        # A user's own manager may give its unit any name.
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/orders.service\n", "user@1000.service"),
        ("5:devices:/x\n1:name=systemd:/system.slice/orders.service\n0::/\n", "orders.service"),
        ("5:devices:/system.slice/orders.service\n0::/\n", None),
        ("0::/\n", None),
        ("0::/init.scope\n", "init.scope"),
        ("0::/made/by/hand/orders.service\n", None),
        ("0::/../../system.slice/orders.service\n", None),  # outside this agent's control-group namespace
        ("", None),
    ],
)
def test_unit_is_the_first_part_of_the_path_that_is_not_a_slice(cgroups: str, unit: str | None) -> None:
    """The path is of the unified hierarchy, or of systemd's own hierarchy of version 1."""
    assert unit_of(cgroups) == unit


@pytest.mark.parametrize(
    ("cgroups", "pod"),
    [
        (
            f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD_}.slice/cri-containerd-ab.scope\n",
            POD,
        ),
        (f"0::/kubepods.slice/kubepods-pod{POD_}.slice/crio-ab.scope\n", POD),
        (f"0::/kubepods/besteffort/pod{POD}/ab\n", POD),
        (f"9:memory:/kubepods/burstable/pod{POD}/ab\n1:name=systemd:/kubepods/burstable/pod{POD}/ab\n", POD),
        (f"0::/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-pod{POD_}.slice/x\n", None),
        ("0::/kubepods/besteffort/podnonsense/ab\n", None),
        ("0::/system.slice/orders.service\n", None),
    ],
)
def test_pod_is_identified_below_the_roots_kubepods(cgroups: str, pod: str | None) -> None:
    """Pods have systemd's names or cgroupfs's."""
    assert pod_of(cgroups) == pod


def test_grants_of_every_selector_are_found_in_order() -> None:
    """Grants to users and to other evidence are found; equal evidence is answered from the cache."""
    grants = [
        Grant("listener", {"listener": "default"}, ("kms:*",), ("*",)),
        Grant("me", {"uid": 1}, ("kms:*",), ("*",)),
        Grant("you", {"uid": 2}, ("kms:*",), ("*",)),
        Grant("unit", {"user": 1, "unit": "orders.service"}, ("kms:*",), ("*",)),
    ]
    policy = Policy(grants)
    peer = evidence_of_this_process()._replace(uid=1, unit="orders.service")
    assert [grant.name for grant in policy.granted(peer).grants] == ["listener", "me", "unit"]
    assert [grant.name for grant in policy.granted(peer._replace(unit=None)).grants] == ["listener", "me"]
    assert policy.granted(peer._replace(pid=99)) is policy.granted(peer)


def evidence_of_this_process() -> Peer:
    """Return the evidence that an agent would have of this process."""
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        peer, process = evidence(here, "default")
        assert process is not None
        process.close()
        return peer


# --- real processes ---------------------------------------------------------------------------------------------------


@contextmanager
def granting(keyring: Path, socket_path: Path, to: str) -> Iterator[RunningAgent]:
    """An agent with one grant, of everything to such callers."""
    config = keyring.parent / "agent.toml"
    with serving(keyring, socket_path) as agent:
        text = config.read_text().replace(f"to={{uid={os.getuid()}}}", f"to={{{to}}}")
        assert to in text
        config.write_text(text)
        agent.wait_for("reload.done")
        yield agent


def outcome(path: Path) -> str:
    """Return the outcome of this process's DescribeKey: OK, or a code."""
    with RawConnection(path) as connection:
        error = connection.call("DescribeKey", {"KeyId": "alias/a"}).error
        return error["Code"] if error else "OK"


def this_program() -> tuple[str, str]:
    """The path and the hash of the interpreter that runs this."""
    path = os.path.realpath("/proc/self/exe")
    return path, hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("matches", [True, False])
@pytest.mark.parametrize("selector", ["exe", "sha256"])
def test_program_is_identified_by_path_and_by_hash(
    keyring: Path, socket_path: Path, selector: str, matches: bool
) -> None:
    """A grant to one program does not match another program."""
    path, digest = this_program()
    to = {
        ("exe", True): f'uid={os.getuid()}, exe="{path}"',
        ("exe", False): f'uid={os.getuid()}, exe="/usr/bin/true"',
        ("sha256", True): f'uid={os.getuid()}, sha256="sha256:{digest}"',
        ("sha256", False): f'uid={os.getuid()}, sha256="sha256:{"0" * 64}"',
    }[selector, matches]
    with granting(keyring, socket_path, to):
        assert outcome(socket_path) == ("OK" if matches else "Forbidden.NoPermission")


CONNECTING = """
import os, socket, sys
handover = socket.socket(fileno=int(sys.argv[2]))
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
socket.send_fds(handover, [b"x"], [connection.fileno()])
handover.recv(1)
if sys.argv[3] == "exec":
    os.execv("/bin/sleep", ["sleep", "60"])
"""


@contextmanager
def connected_by_another(
    path: Path, then: str
) -> Iterator[tuple[RawConnection, "subprocess.Popen[bytes]", socket.socket]]:
    """A connection that another process made and passed to this one; that process waits for a byte."""
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        arguments = [sys.executable, "-c", CONNECTING, str(path), str(there.fileno()), then]
        process = subprocess.Popen(arguments, pass_fds=[there.fileno()])
        try:
            _, (descriptor,), _, _ = socket.recv_fds(here, 1, 1)
            connection = RawConnection.__new__(RawConnection)
            connection.socket = socket.socket(fileno=descriptor)
            connection.socket.settimeout(PATIENCE)
            connection._decoder, connection._messages = wire.Decoder(), []
            with connection:
                yield connection, process, here
        finally:
            process.kill()
            process.wait()


def test_a_connection_ends_with_the_process_that_made_it(keyring: Path, socket_path: Path) -> None:
    """A process that inherits the socket was never identified, so the agent closes the connection."""
    with (
        granting(keyring, socket_path, f'uid={os.getuid()}, exe="{this_program()[0]}"') as agent,
        connected_by_another(socket_path, "exit") as (connection, process, handover),
    ):
        assert connection.call("DescribeKey", {"KeyId": "alias/a"}).error is None
        handover.send(b"x")
        assert process.wait(PATIENCE) == 0
        assert connection.response() is None
        agent.wait_for("connection.process_ended")


def test_exec_of_another_program_ends_the_connection(keyring: Path, socket_path: Path) -> None:
    """The agent closes the connection at its next request."""
    with (
        granting(keyring, socket_path, f'uid={os.getuid()}, exe="{this_program()[0]}"') as agent,
        connected_by_another(socket_path, "exec") as (connection, process, handover),
    ):
        assert connection.call("DescribeKey", {"KeyId": "alias/a"}).error is None
        handover.send(b"x")
        deadline = time.monotonic() + PATIENCE
        while os.path.realpath(f"/proc/{process.pid}/exe") == this_program()[0]:
            assert time.monotonic() < deadline
        connection.send(wire.encode_request(1, "DescribeKey", {"KeyId": "alias/a"}))
        assert connection.response() is None
        agent.wait_for("connection.program_changed")


def test_exited_process_has_no_evidence(tmp_path: Path) -> None:
    """The number of an exited process may already belong to another one."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        code = f"import socket; socket.socket(socket.AF_UNIX).connect({str(tmp_path / 's')!r})"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
        connection, _ = listening.accept()
        with connection:
            peer, process = evidence(connection, "default")
            assert (peer.unit, peer.pod, peer.exe, peer.sha256) == (None, None, None, None)
            assert peer.uid == os.getuid()
            if process is not None:
                assert not process.alive()
                with pytest.raises(OSError, match="No such"):
                    inspect(process.pid, with_hash=True)
                process.close()


def test_process_that_exits_during_inspection_has_no_evidence(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files read after the exit may be of another process with the same number."""
    text = f"0::/kubepods/besteffort/pod{POD}/ab\n"
    code = f"import socket, sys; s = socket.socket(1); s.connect({str(socket_path)!r}); sys.stdin.read()"

    def read_and_end(_process: Process) -> str:
        child.kill()
        child.wait(PATIENCE)
        return text

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(socket_path))
        listening.listen()
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
            connection, _ = listening.accept()
            with connection:
                for read, pod in ((lambda _process: text, POD), (read_and_end, None)):
                    monkeypatch.setattr(Process, "cgroups", read)
                    peer, process = evidence(connection, "default")
                    assert process is not None
                    process.close()
                    assert peer.pod == pod


def test_process_without_a_visible_number_has_no_evidence() -> None:
    """The kernel reports 0 for a process of a pid namespace that is not below the agent's."""
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        assert Process.of(here, None) is None


@root()
def test_program_of_another_mount_namespace_has_no_path(
    tmp_path: Path,
) -> None:
    """Any user can have a mount namespace, so a path there proves nothing, and only the hash of the file counts."""
    trusted, forged = tmp_path / "trusted", tmp_path / "forged"
    shutil.copy("/bin/true", trusted)
    shutil.copy("/bin/sleep", forged)
    script = f"mount --bind {forged} {trusted} && exec {trusted} 60"
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", script]) as other:
        try:
            deadline = time.monotonic() + PATIENCE
            while os.readlink(f"/proc/{other.pid}/exe") != str(trusted):
                assert time.monotonic() < deadline
            program = inspect(other.pid, with_hash=True)
            assert program is not None
            assert program.path is None
            assert program.sha256 == f"sha256:{hashlib.sha256(forged.read_bytes()).hexdigest()}"
            assert program.runs_in(inspect(other.pid))
        finally:
            other.kill()


def test_replaced_program_has_no_path(tmp_path: Path) -> None:
    """The file at the path is not the one that the process runs."""
    shutil.copy("/bin/sleep", tmp_path / "program")
    with subprocess.Popen([tmp_path / "program", "60"]) as other:
        try:
            before = inspect(other.pid, with_hash=True)
            assert before is not None
            assert before.path == str(tmp_path / "program")
            (tmp_path / "program").unlink()
            shutil.copy("/bin/true", tmp_path / "program")
            now = inspect(other.pid, with_hash=True)
            assert now is not None
            assert now.path is None
            assert now.sha256 == before.sha256
            assert not before.runs_in(now)
        finally:
            other.kill()


GROUPED = """
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    connection.sendall(bytes.fromhex(sys.argv[2]))
    print(connection.recv(65536).hex(), flush=True)
"""


@root()
@pytest.mark.parametrize("number", [0, 255, 256, 257, 5_000, 65_535])
def test_all_groups_of_a_peer_are_read(tmp_path: Path, number: int) -> None:
    """The kernel's limit is above the number of groups that Python's socket option returns."""
    numbers = range(100_000, 100_000 + number)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        child = os.fork()
        if child == 0:
            os.setgroups(list(numbers))
            os.setresgid(4_207, 4_207, 4_207)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(tmp_path / "s"))
                connection.recv(1)
            os._exit(0)
        connection, _ = listening.accept()
        with connection:
            peer, process = evidence(connection, "default")
            assert peer.gids == {4_207, *numbers}
            assert peer.gids == Groups([*numbers, 4_207])
            assert process is not None
            process.close()
        os.waitpid(child, 0)


@root()
def test_one_of_thousands_of_groups_matches_a_grant(keyring: Path, shared_socket: Path) -> None:
    """Users of a directory service can have thousands of groups."""
    groups = tuple(range(20_000, 22_000))
    request = wire.encode_request(1, "DescribeKey", {"KeyId": "alias/a"})
    with (
        serving(keyring, shared_socket, to="gid=21999", more='mode = "0666"'),
        running_as(GROUPED, shared_socket, request.hex(), groups=groups) as member,
        running_as(GROUPED, shared_socket, request.hex(), groups=groups[:-1]) as stranger,
    ):
        assert b"KeyMetadata" in bytes.fromhex(line_of(member))
        assert b"Forbidden.NoPermission" in bytes.fromhex(line_of(stranger))


def test_groups_take_four_bytes_each() -> None:
    """A Python set would take ninety bytes for each group."""
    groups = Groups([3, 1, 2, 2, 4_294_967_294])
    assert groups == {1, 2, 3, 4_294_967_294}
    assert groups == Groups([3, 1, 2, 2, 4_294_967_294])
    assert groups == Groups([1, 2, 3], packed=(4_294_967_294).to_bytes(4, sys.byteorder))
    assert hash(groups) == hash(Groups([3, 1, 2, 2, 4_294_967_294]))
    assert groups != Groups([1])
    assert groups.size == 20
    assert 2 in groups
    for absent in (5, -1, 2**32, None):
        assert absent not in groups
    assert 0x0200_0000 not in Groups([0x0000_0002, 0x0000_0000])  # across two numbers
    assert 7 not in Groups([7, 8], excluded_gid=7)
    assert Groups([7, 8], excluded_gid=7) == {8}
    assert sorted(groups) == [1, 2, 2, 3, 4_294_967_294]
    assert repr(Groups([1])) == "Groups([1])"


@root()
def test_event_loop_creates_no_object_per_group() -> None:
    """Forty-five callers a second with 65,535 groups each once stopped the event loop."""
    here, there = socket.socketpair()
    before = os.getgroups()
    with here, there:
        os.setgroups(list(range(100_000, 165_535)))
        try:
            many, its = socket.socketpair()
        finally:
            os.setgroups(before)
        with many, its:
            evidence(here, "default")[1].close()  # type: ignore[union-attr]
            tracemalloc.start()
            peer, process = evidence(many, "default")
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert process is not None
            process.close()
            assert 165_534 in peer.gids
            assert 99_999 not in peer.gids
            assert peak < 2**20
