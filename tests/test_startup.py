"""The start before the first request: socket files, and the hardening of the process. All with real agents."""

import ctypes
import errno
import json
import os
import resource
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.agent import PATIENCE, RawConnection, RunningAgent, configured, dev_agent
from support.audit_log import requests
from support.calls import error
from support.waiting import is_served, wait_until

from keyferry import hardening
from keyferry.protocol import wire
from keyferry_agent import process_hardening
from keyferry_agent.cli.main import main
from keyferry_agent.config.options import Options, StartError
from keyferry_agent.config.settings import Listener
from keyferry_agent.crypto.selftest import SelfTestError
from keyferry_agent.daemon.daemon import run_daemon
from keyferry_agent.server import unix_sockets
from keyferry_agent.telemetry import logging_setup

PING = ("DescribeKey", {"KeyId": "alias/dev"})


def is_alive(connection: RawConnection) -> bool:
    """Whether a connection answers."""
    return connection.call(*PING).error is None


def test_second_agent_replaces_only_a_dead_socket(socket_path: Path) -> None:
    """Only a connection shows whether an agent listens, not the file."""
    with dev_agent(socket_path) as first:
        second = RunningAgent(["--dev"], socket_path)
        assert second.wait() == 1
        assert "another agent is serving there" in "".join(second.output)
        second.kill()
        with RawConnection(first.socket) as connection:
            assert is_alive(connection)
        first.process.kill()
        first.wait()
        assert socket_path.is_socket()
        with dev_agent(socket_path) as third:
            with RawConnection(third.socket) as connection:
                assert is_alive(connection)
            assert third.stop() == 0
    assert not socket_path.exists()


def test_other_file_at_the_socket_path_is_kept(socket_path: Path) -> None:
    """The agent refuses to start and does not remove the file."""
    socket_path.write_text("precious")
    agent = RunningAgent(["--dev"], socket_path)
    assert agent.wait() == 1
    agent.kill()
    assert socket_path.read_text() == "precious"


def test_world_writable_directory_is_refused(tmp_path: Path) -> None:
    """Any user who can replace the socket can impersonate the agent."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    agent = RunningAgent(["--dev"], folder / "agent.sock")
    assert agent.wait() == 1
    assert "writable by all users" in "".join(agent.output)
    agent.kill()


def test_socket_has_the_configured_mode(socket_path: Path) -> None:
    """The default is 0660 under any umask."""
    with dev_agent(socket_path):
        assert socket_path.stat().st_mode & 0o777 == 0o660
    arguments = configured(socket_path, 'mode = "0600"\n')
    with RunningAgent(arguments, socket_path):
        assert socket_path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_a_socket_opens_to_others_with_its_mode_only(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """Between bind(2) and chmod(2) only its owner can open the socket, under any umask."""
    modes, chmod = [], os.chmod

    def watched(path: str, wanted: int) -> None:
        modes.append(stat.S_IMODE(socket_path.stat().st_mode))
        chmod(path, wanted)
        modes.append(stat.S_IMODE(socket_path.stat().st_mode))

    monkeypatch.setattr(os, "chmod", watched)
    mask = os.umask(0)
    try:
        (made,) = unix_sockets.open_listeners([Listener(path=socket_path, mode=mode)], [])
        assert os.umask(0) == 0  # as it was
    finally:
        os.umask(mask)
    made.close()
    assert modes == [0o600, mode]


def test_the_process_is_hardened(agent: RunningAgent) -> None:
    """The agent has no core dumps and no new privileges."""
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    limits = Path(f"/proc/{agent.process.pid}/limits").read_text().splitlines()
    assert ["0", "0"] in [line.split()[4:6] for line in limits if line.startswith("Max core file size")]


def test_hardening_makes_a_process_undumpable_and_without_core() -> None:
    """An undumpable process keeps its memory from other processes of the same user."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)  # it closes all others
        assert process_hardening.harden() == []
        libc = ctypes.CDLL(None)
        os.write(1, json.dumps([libc.prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)]).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as said:
        assert json.load(said) == [0, [0, 0]]
    os.waitpid(child, 0)


def test_several_listeners_have_separate_grants(tmp_path: Path) -> None:
    """A grant to one listener does not apply to another."""
    config = tmp_path / "agent.toml"
    config.write_text(
        "".join(f'[[listener]]\nname = "{name}"\npath = "{tmp_path / name}"\nmode = "0600"\n' for name in ("a", "b"))
        + '[[grant]]\nname = "g"\nto = { listener = "a" }\nactions = ["kms:DescribeKey"]\nkeys = ["*"]\n'
    )
    keyring, identity = tmp_path / "k.age", tmp_path / "identity"
    assert main(["keyring", "init", str(keyring), "--new-identity", str(identity)]) == 0
    assert main(["keyring", "create-key", str(keyring), "--unseal", str(identity), "--alias", "alias/dev"]) == 0
    arguments = ["--config", str(config), "--keyring", str(keyring), "--unseal", str(identity)]
    with RunningAgent(arguments, None) as agent:
        with RawConnection(tmp_path / "a") as a, RawConnection(tmp_path / "b") as b:
            assert is_alive(a)
            assert error(b.call(*PING))["Code"] == "Forbidden.NoPermission"
        assert agent.stop() == 0
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_one_failed_listener_leaves_no_other_socket(tmp_path: Path) -> None:
    """An agent serves all its listeners or none."""
    config = tmp_path / "agent.toml"
    config.write_text(
        f'[[listener]]\nname = "a"\npath = "{tmp_path}/a"\n[[listener]]\nname = "b"\npath = "{tmp_path}/none/b"\n'
    )
    agent = RunningAgent(["--dev", "--config", str(config)], None)
    assert agent.wait() == 1
    agent.kill()
    assert not (tmp_path / "a").exists()


def test_failed_socket_creation_is_named(tmp_path: Path) -> None:
    """The message has the system's own reason."""
    with pytest.raises(unix_sockets.ListeningError, match="too long"):
        unix_sockets.open_listeners([Listener(path=tmp_path / ("x" * 200))], [])
    (made,) = unix_sockets.open_listeners([Listener(path=tmp_path / "sock")], [])
    assert not made.was_replaced()
    (tmp_path / "sock").unlink()
    assert made.was_replaced()
    (tmp_path / "sock").write_text("somebody else's")
    made.close()
    assert (tmp_path / "sock").read_text() == "somebody else's"


@pytest.mark.parametrize("when", ["before it is made", "after it was made"])
def test_uninspectable_socket_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A folder with read and without search permission is an example; no other socket is left."""
    first, second = tmp_path / "first", tmp_path / "second"
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        if path == second and (when == "before it is made" or second in first.parent.iterdir()):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return real(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(unix_sockets.ListeningError, match="second: Permission denied"):
        unix_sockets.open_listeners([Listener("first", first), Listener("second", second)], [])
    monkeypatch.undo()
    assert not first.exists()
    assert not second.exists()


def test_failed_hardening_steps_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed standard descriptors are opened, so that no key file becomes one."""
    monkeypatch.setattr(hardening, "_PR_SET_DUMPABLE", 10_000)
    monkeypatch.setattr(process_hardening, "_close_inherited", lambda _keep: None)  # this process needs its own
    monkeypatch.setattr("os.umask", lambda mode: mode)
    monkeypatch.setattr("resource.setrlimit", lambda _which, _limits: None)
    monkeypatch.setattr(hardening, "_PR_SET_NO_NEW_PRIVS", 10_001)
    assert [failure.split(":")[0] for failure in process_hardening.harden()] == ["no new privileges", "not dumpable"]


DESCRIPTORS_AT_EXIT = """
import atexit, json, os, sys

def report():
    files = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in (0, 1)]
    print(json.dumps({"event": "descriptors", "files": files}), file=sys.stderr)

atexit.register(report)
from keyferry_agent.__main__ import main
sys.exit(main())
"""
"""An agent that logs its own standard descriptors when it exits: for other processes, only root can read them."""


def test_an_agent_starts_with_its_standard_descriptors_closed(socket_path: Path) -> None:
    """The agent opens /dev/null in their place."""
    command = ("-c", DESCRIPTORS_AT_EXIT)
    with RunningAgent(["--dev"], socket_path, preexec=lambda: os.closerange(0, 2), command=command) as agent:
        assert agent.stop() == 0
        assert agent.wait_for("descriptors")["files"] == ["/dev/null", "/dev/null"]


def test_removed_socket_file_is_logged(socket_path: Path) -> None:
    """New clients cannot connect without the file."""
    with dev_agent(socket_path) as agent, RawConnection(socket_path) as connection:
        socket_path.unlink()
        assert agent.wait_for("socket.lost")["path"] == str(socket_path)
        assert connection.call("GetAgentStatus", {}).error is None


def test_agent_without_descriptors_refuses_with_a_reason(socket_path: Path) -> None:
    """The agent keeps one descriptor for the refusal, and serves again when others are free."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    with RunningAgent(["--dev"], socket_path, preexec=few) as agent:
        with ExitStack() as stack:
            refused = None
            while refused is None:
                connection = stack.enter_context(RawConnection(socket_path))
                connection.send(wire.encode_request(1, "GetAgentStatus", {}))
                refused = connection.answer().error
            assert refused["Code"] == "Rejected.Throttling"
            assert "descriptor" in refused["Message"]
            agent.wait_for("accept.failed")
        with agent.client() as kms:
            wait_until("the agent serves again", lambda: is_served(kms))  # it has not seen all of them leave yet


def test_inherited_descriptors_are_closed(socket_path: Path) -> None:
    """An inherited connection or secret of another process is not the agent's."""
    reading, writing = os.pipe()
    with open(reading, "rb") as end, RunningAgent(["--dev"], socket_path, pass_fds=[writing]):
        os.close(writing)
        assert end.read() == b""  # the other end is closed


def test_agent_restarts_once_in_its_own_process(agent: RunningAgent) -> None:
    """The process ID is the one that the service manager knows, and the arguments are the same."""
    command = Path(f"/proc/{agent.process.pid}/cmdline").read_bytes().split(b"\0")
    assert command[1:4] == [b"-m", b"keyferry_agent", b"run"]
    assert [line["event"] for line in agent.log].count("agent.serving") == 1
    assert not [line for line in agent.log if line["event"] == "startup.not_hardened"]


def test_audit_log_is_appended_to_its_file(socket_path: Path, tmp_path: Path) -> None:
    """The file has mode 0600 and a JSON line for each request, refused ones included."""
    record, config = tmp_path / "audit.jsonl", tmp_path / "agent.toml"
    record.write_text("{}\n")
    config.write_text(f'[audit]\npath = "{record}"\n')
    with (
        RunningAgent(["--dev", "--config", str(config)], socket_path) as agent,
        RawConnection(agent.socket) as connection,
    ):
        assert is_alive(connection)
        connection.call("Explode", {})
        connection.call("DescribeKey", {"KeyId": "alias/none"})
    assert [(line["operation"], line["outcome"]) for line in requests(record)] == [
        ("DescribeKey", "OK"),
        ("Explode", "InvalidAction.NotFound"),
        ("DescribeKey", "Forbidden.AliasNotFound"),
    ]


def test_unopenable_audit_log_stops_the_start(socket_path: Path, tmp_path: Path) -> None:
    """The message has the file's name."""
    config = tmp_path / "agent.toml"
    config.write_text(f'[audit]\npath = "{tmp_path}/none/audit.jsonl"\n')
    agent = RunningAgent(["--dev", "--config", str(config)], socket_path)
    assert agent.wait() == 1
    agent.kill()
    assert "none/audit.jsonl: No such file" in "".join(agent.output)


@pytest.mark.parametrize("path", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1"])
def test_audit_log_on_a_socket_advises_stderr(socket_path: Path, tmp_path: Path, path: str) -> None:
    """Standard output of a systemd unit is a socket, which cannot be opened by a path."""
    config = tmp_path / "agent.toml"
    config.write_text(f'memory = "prefer"\n[audit]\npath = "{path}"\n')
    here, there = socket.socketpair()
    with here, there:
        ended = subprocess.run(
            [
                sys.executable,
                "-m",
                "keyferry_agent",
                "run",
                "--dev",
                "--config",
                str(config),
                "--socket",
                str(socket_path),
            ],
            stdout=there.fileno(),
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last == f'keyferry-agent: {path}: is a socket, as standard output is under systemd; use "stderr"'


@pytest.mark.parametrize("what", ["the record's file", "a descriptor in reserve"])
def test_exhausted_descriptors_stop_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """The message is one line, without a traceback."""
    config = tmp_path / "agent.toml"
    config.write_text(f'memory = "prefer"\n[audit]\npath = "{tmp_path / "audit.jsonl"}"\n')
    real = os.open
    last = os.fspath(tmp_path / "audit.jsonl") if what == "the record's file" else os.devnull

    def open_(path: Any, *arguments: Any, **more: Any) -> int:
        if path == last:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *arguments, **more)

    monkeypatch.setattr(process_hardening, "harden", lambda *_, **__: [])
    monkeypatch.setattr(logging_setup, "configure", lambda: None)
    monkeypatch.setattr(os, "open", open_)
    assert main(["run", "--dev", "--config", str(config), "--socket", str(tmp_path / "agent.sock")]) == 1
    assert "keyferry-agent: Too many open files" in capsys.readouterr().err


def test_a_wrong_self_test_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent exits before it creates a socket."""

    def wrong(_scratch: object, *, sm2_fallback: bool) -> list[str]:
        raise SelfTestError("Aliyun_SM4: wrong")

    monkeypatch.setattr("keyferry_agent.crypto.selftest.run", wrong)
    monkeypatch.setattr("keyferry_agent.process_hardening.harden", lambda *_, **__: [])
    options = Options(config=None, socket=Path("/nowhere"), keyring=None, unseal=None, dev=True)
    with pytest.raises(StartError, match="Aliyun_SM4: wrong"):
        run_daemon(options)


@pytest.mark.parametrize(
    ("text", "arguments", "why"),
    [
        ('keyring = "/k.age"\n', ["--dev"], "--dev makes a keyring of its own"),
        (
            '[[listener]]\nname="a"\npath="/a"\n[[listener]]\nname="b"\npath="/b"\n',
            ["--dev", "--socket", "/s"],
            "several",
        ),
    ],
)
def test_options_that_contradict_the_configuration_are_refused(
    tmp_path: Path, text: str, arguments: list[str], why: str
) -> None:
    """Neither the option nor the setting wins silently."""
    config = tmp_path / "agent.toml"
    config.write_text(text)
    agent = RunningAgent([*arguments, "--config", str(config)], None)
    assert agent.wait() == 1
    agent.kill()
    assert why in "".join(agent.output)
