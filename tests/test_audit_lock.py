"""One agent for one audit log: a second agent does not start, and nothing that an agent leaves behind stops the next."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import structlog
from support.agent import PATIENCE, RawConnection, RunningAgent
from support.audit_log import AT_START
from support.calls import call_ok
from support.other_user import OTHER_USER
from support.skip_unless import root

from keyferry_agent.audit import AuditLog, writer_lock
from keyferry_agent.chained_log import chain
from keyferry_agent.config.settings import Audit
from keyferry_agent.locking import Lock, LockError, lock_file_of

DESCRIBE = ("DescribeKey", {"KeyId": "alias/dev"})


def agent_of(socket: Path, log: Path | str, **more: object) -> RunningAgent:
    """An agent that writes to this audit log; enter it to wait until it serves."""
    config = socket.with_suffix(".toml")
    config.write_text(f'[audit]\npath = "{log}"\n')
    return RunningAgent(["--dev", "--config", str(config)], socket, **more)  # type: ignore[arg-type]


def refusal(agent: RunningAgent) -> str:
    """Return the message of an agent that must not start."""
    assert agent.wait() == 1
    agent.kill()
    (message,) = [line for line in agent.output if line.startswith("keyferry-agent: ")]
    assert "Traceback" not in "".join(agent.output)
    return message


@pytest.mark.parametrize("name", ["audit.jsonl", "a link to it", "a link to its folder"])
def test_a_second_agent_does_not_write_to_the_same_log(tmp_path: Path, name: str) -> None:
    """The message names the file; the first agent serves on, and the chain is whole."""
    folder = tmp_path / "folder"
    folder.mkdir()
    log = folder / "audit.jsonl"
    (tmp_path / "file link").symlink_to(log)
    (tmp_path / "folder link").symlink_to(folder)
    named = {"audit.jsonl": log, "a link to it": tmp_path / "file link"}.get(name, tmp_path / "folder link/audit.jsonl")
    with agent_of(tmp_path / "first.sock", log) as first, RawConnection(first.socket) as connection:
        call_ok(connection, *DESCRIBE)
        message = refusal(agent_of(tmp_path / "second.sock", named))
        assert str(named) in message
        assert "another agent" in message
        assert not (tmp_path / "second.sock").exists()
        call_ok(connection, *DESCRIBE)
        assert lock_file_of(log).stat().st_mode & 0o777 == 0o600
        assert first.stop() == 0
    assert chain.verify([log]).lines == AT_START + 2
    assert not lock_file_of(log).exists()


def test_the_lock_outlives_a_rotation(tmp_path: Path) -> None:
    """The lock holds also while the new file does not exist yet."""
    log = tmp_path / "audit.jsonl"
    with agent_of(tmp_path / "first.sock", log) as first, RawConnection(first.socket) as connection:
        for count in (1, 2):
            call_ok(connection, *DESCRIBE)
            log.rename(tmp_path / f"audit.jsonl.{count}")
            first.signal(signal.SIGHUP)
            first.wait_for("audit.reopened", count)
            assert str(log) in refusal(agent_of(tmp_path / "second.sock", log))


def test_a_killed_agent_does_not_stop_the_next(tmp_path: Path) -> None:
    """The lock file of a killed agent stays, and the kernel has released the lock."""
    log = tmp_path / "audit.jsonl"
    with agent_of(tmp_path / "first.sock", log) as first:
        first.process.kill()
        first.wait()
    assert lock_file_of(log).exists()
    with agent_of(tmp_path / "second.sock", log) as second:
        assert second.stop() == 0
    assert not lock_file_of(log).exists()


def test_a_restart_waits_for_its_predecessor(tmp_path: Path) -> None:
    """The previous agent may still be exiting."""
    log = tmp_path / "audit.jsonl"
    lock = Lock(log, seconds=0)
    threading.Timer(1.0, lock.release).start()
    with agent_of(tmp_path / "agent.sock", log) as agent:
        assert agent.stop() == 0


def test_two_agents_with_logs_of_their_own_share_a_folder(tmp_path: Path) -> None:
    """The lock is on the file, not on its folder."""
    with (
        agent_of(tmp_path / "first.sock", tmp_path / "a.jsonl"),
        agent_of(tmp_path / "second.sock", tmp_path / "b.jsonl"),
    ):
        assert sorted(path.name for path in tmp_path.glob(".*.jsonl.lock")) == [".a.jsonl.lock", ".b.jsonl.lock"]


@pytest.mark.parametrize("path", ["stderr", "/dev/null", "/dev/stderr"])
def test_devices_and_standard_error_are_not_locked(tmp_path: Path, path: str) -> None:
    """Any number of agents may write to a device or to standard error."""
    with agent_of(tmp_path / "first.sock", path), agent_of(tmp_path / "second.sock", path):
        pass
    assert not list(tmp_path.glob(".*.lock"))
    assert not lock_file_of(Path("/dev/null")).exists()


def test_a_named_pipe_has_one_writer_too(tmp_path: Path) -> None:
    """Two chains in one pipe would be one broken chain for its reader."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with agent_of(tmp_path / "first.sock", fifo):
        assert str(fifo) in refusal(agent_of(tmp_path / "second.sock", fifo))


def test_a_start_that_fails_leaves_no_lock(tmp_path: Path) -> None:
    """The agent releases the lock after any failure."""
    log = tmp_path / "audit.jsonl"
    (tmp_path / "agent.sock").write_text("not a socket")
    refusal(agent_of(tmp_path / "agent.sock", log))
    assert not lock_file_of(log).exists()
    assert "none/audit.jsonl: No such file" in refusal(agent_of(tmp_path / "b.sock", tmp_path / "none/audit.jsonl"))


@root()
def test_a_folder_that_takes_no_lock_file_is_a_warning(tmp_path: Path) -> None:
    """The agent's user cannot create a lock file in a folder where only root creates the audit log."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    folder = tmp_path / "log"
    folder.mkdir(mode=0o755)
    log = folder / "audit.jsonl"
    log.touch(mode=0o600)
    os.chown(log, OTHER_USER, OTHER_USER)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setresuid(OTHER_USER, OTHER_USER, OTHER_USER)
            with structlog.testing.capture_logs() as logged:
                assert writer_lock.lock(str(log)) is None
            assert [line["event"] for line in logged] == ["startup.limited"]
            assert str(log) in logged[0]["what"]
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert not lock_file_of(log).exists()


@root()
def test_an_agent_starts_on_a_full_disk(tmp_path: Path) -> None:
    """A lock file that cannot be written does not stop an agent which on_failure = "serve" lets serve on a full disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k,nr_inodes=3", "none", disk], check=True)
    try:
        (disk / "audit.jsonl").touch()
        (disk / "other").touch()  # the last inode
        with agent_of(tmp_path / "agent.sock", disk / "audit.jsonl") as agent:
            assert agent.has_logged("startup.limited")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_lock_file_of_another_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open mode, or a symbolic link, was made by another process: the agent does not start without the lock."""
    monkeypatch.setattr(writer_lock, "LOCK_SECONDS", 0)
    log = tmp_path / "audit.jsonl"
    lock_file_of(log).touch()
    lock_file_of(log).chmod(0o666)
    with pytest.raises(LockError, match=r"audit\.jsonl"):
        writer_lock.lock(str(log))
    lock_file_of(log).unlink()
    lock_file_of(log).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LockError, match="symbolic link"):
        writer_lock.lock(str(log))


def test_a_start_waits_two_seconds_at_most(tmp_path: Path) -> None:
    """A service manager would kill an agent that waits longer."""
    with Lock(tmp_path / "audit.jsonl", seconds=0):
        began = time.monotonic()
        with pytest.raises(LockError, match="another agent"):
            writer_lock.lock(str(tmp_path / "audit.jsonl"))
        assert time.monotonic() - began < PATIENCE / 10


def test_a_hanging_write_keeps_the_lock(tmp_path: Path) -> None:
    """The entry that is still to be written would fork the chain of the next agent."""
    log = tmp_path / "audit.jsonl"
    audit = AuditLog(Audit(str(log)), writer_lock.lock(str(log)))
    hanging = threading.Event()
    with pytest.raises(OSError, match="does not answer"):
        audit._writer.call(hanging.wait)
    audit.close()
    with pytest.raises(LockError):
        Lock(log, seconds=0)
    hanging.set()
    with Lock(log, seconds=PATIENCE):
        pass
