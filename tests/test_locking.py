"""Locks between processes: only the owner of the files can take one, and every wait has a bound."""

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.agent import PATIENCE, RunningAgent, dev_agent
from support.keyring import change, run
from support.other_user import line_of, running_as
from support.skip_unless import root

from keyferry_agent.config.settings import Listener
from keyferry_agent.keyring import file
from keyferry_agent.keyring.document import KeyringError
from keyferry_agent.locking import Lock, LockError, lock_file_of
from keyferry_agent.server.unix_sockets import ListeningError, open_listeners

HOLD = """
import fcntl, os, sys
held = []
for path in sys.argv[1:]:
    try:
        held.append(os.open(path, os.O_RDONLY))
        fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("locked", path, flush=True)
    except OSError as error:
        print(error.strerror, path, flush=True)
sys.stdin.read()
"""
"""Lock the named files, as far as the kernel lets this user, and keep them locked."""


@root()
def test_another_user_cannot_keep_an_agent_from_starting(shared_folder: Path) -> None:
    """flock(2) on the socket's folder, or on its lock file, does not block the agent."""
    lock_file_of(shared_folder / "agent.sock").touch(mode=0o600)  # as a killed agent leaves it
    with running_as(HOLD, shared_folder, lock_file_of(shared_folder / "agent.sock")) as other:
        assert line_of(other) == f"locked {shared_folder}"
        assert line_of(other) == f"Permission denied {lock_file_of(shared_folder / 'agent.sock')}"
        with dev_agent(shared_folder / "agent.sock") as agent:
            assert agent.stop() == 0


@root()
def test_another_user_cannot_keep_a_keyring_from_changing(shared_folder: Path, keyring: Path) -> None:
    """flock(2) on the keyring's folder does not block a command."""
    for name in ("keyring.age", "identity"):
        os.rename(keyring.parent / name, shared_folder / name)
    with running_as(HOLD, shared_folder) as other:
        assert line_of(other) == f"locked {shared_folder}"
        change(shared_folder / "keyring.age", "rotate", "alias/a")


@root()
def test_a_lock_file_of_another_user_is_named_and_not_used(shared_folder: Path) -> None:
    """Another user can create any file first in a folder with the sticky bit."""
    shared_folder.chmod(0o1777)
    made = lock_file_of(shared_folder / "agent.sock")
    with running_as(f"open({str(made)!r}, 'w'); print('made', flush=True)") as other:
        assert line_of(other) == "made"
    agent = RunningAgent(["--dev"], shared_folder / "agent.sock")
    assert agent.wait() == 1
    assert f"{made}: not a lock file of this user" in "".join(agent.output)
    agent.kill()


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """Following it would create a file wherever another user points it."""
    lock_file_of(tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LockError, match="symbolic link"), Lock(tmp_path / "a", seconds=0):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_is_tried_for_a_bounded_time_and_named(tmp_path: Path) -> None:
    """The message says which file, and the lock is free again after its holder."""
    with Lock(tmp_path / "a", seconds=0):
        with pytest.raises(LockError, match=r"\.a\.lock: another process holds"), Lock(tmp_path / "a", seconds=0.1):
            pass
        with Lock(tmp_path / "b", seconds=0):
            pass
    with Lock(tmp_path / "a", seconds=0):
        pass


@pytest.mark.parametrize("mode", [0o644, 0o620])
def test_a_lock_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    """Any user who can open a lock file can keep it locked."""
    lock_file_of(tmp_path / "a").touch()
    lock_file_of(tmp_path / "a").chmod(mode)
    with pytest.raises(LockError, match=f"mode {mode:04o}"), Lock(tmp_path / "a", seconds=0):
        pass


def test_a_keyring_verb_says_which_lock_it_waited_for(keyring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another verb that hangs is named by the lock it holds."""
    monkeypatch.setattr(file, "_LOCK_SECONDS", 0)
    with (
        Lock(keyring, seconds=0),
        pytest.raises(KeyringError, match=r"\.keyring\.age\.lock"),
        file._locked(keyring),
    ):
        pass


@root()
def test_a_lock_file_that_root_makes_is_the_owners(tmp_path: Path) -> None:
    """Root changes a keyring of the agent's user; the agent's user waits for the same lock meanwhile."""
    (tmp_path / "a").touch()
    os.chown(tmp_path / "a", 4_208, 4_208)
    with Lock(tmp_path / "a", seconds=0, with_owner=True):
        status = lock_file_of(tmp_path / "a").stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (4_208, 4_208, 0o600)


@root()
def test_a_file_of_another_user_is_not_given_away_as_a_lock_file(tmp_path: Path) -> None:
    """The owner of a folder may rename any file into it."""
    (tmp_path / "a").touch()
    os.chown(tmp_path / "a", 4_208, 4_208)
    lock_file_of(tmp_path / "a").touch(mode=0o600)
    with Lock(tmp_path / "a", seconds=0, with_owner=True):
        assert lock_file_of(tmp_path / "a").stat().st_uid == 0


@root()
def test_root_gives_nothing_away_in_a_folder_of_another_user(
    keyring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's owner could replace the new keyring with a link to a file of root's."""
    victim, fsync = tmp_path / "victim", os.fsync
    victim.write_text("root's")
    os.chown(keyring, 4_208, 4_208)
    beside = keyring.with_name(f".{keyring.name}.new")

    def swap(descriptor: int) -> None:
        fsync(descriptor)
        if beside.exists() and not beside.is_symlink():
            beside.unlink()
            beside.symlink_to(victim)

    monkeypatch.setattr(os, "fsync", swap)
    run("rotate", keyring, "alias/a", "--unseal", keyring.parent / "identity", code=1)
    assert (victim.stat().st_uid, victim.read_text()) == (0, "root's")


def test_a_listener_whose_queue_is_full_is_alive(socket_path: Path) -> None:
    """connect(2) would block for as long as the other process likes."""
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as waiting:
        listening.bind(str(socket_path))
        listening.listen(0)
        waiting.connect(str(socket_path))
        with pytest.raises(ListeningError, match="another agent is serving there"):
            open_listeners([Listener("default", socket_path)], [])
    assert socket_path.is_socket()


def test_a_lock_ends_with_its_descriptor(tmp_path: Path) -> None:
    """The descriptor is closed on exec, so no child keeps the lock."""
    with Lock(tmp_path / "a", seconds=0):
        descriptor = os.open(lock_file_of(tmp_path / "a"), os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    assert list(tmp_path.iterdir()) == []


def test_twenty_processes_never_hold_a_lock_together(tmp_path: Path) -> None:
    """Each holder removes the lock file, and a waiter for a removed file opens the path again."""
    (tmp_path / "count").write_text("0")
    code = (
        "import sys; from pathlib import Path; from keyferry_agent.locking import Lock; path = Path(sys.argv[1])\n"
        "for _ in range(20):\n"
        "    with Lock(path, seconds=60): path.write_text(str(int(path.read_text()) + 1))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "count")]) for _ in range(20)]
    assert [process.wait(PATIENCE) for process in processes] == [0] * 20
    assert (tmp_path / "count").read_text() == "400"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]
