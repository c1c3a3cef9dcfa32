"""The outermost exception handler of both commands: one line and an exit code, and never a traceback."""

import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.agent import PATIENCE, RunningAgent
from support.interrupting import interrupted
from support.skip_unless import root

from keyferry import command, guard
from keyferry.arguments import seconds, whole_number
from keyferry.store import StoreError
from keyferry.store.location import resolve_url
from keyferry.store.sqlite import sqlite_file
from keyferry_agent.cli.main import main as agent_main

NOT_TEXT = "an argument, or a file that it names, is not valid UTF-8 text"


def end(error: BaseException) -> int:
    """How a command ends that raises an error."""

    def run() -> int:
        raise error

    return guard.guarded("keyferry", run)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (BaseExceptionGroup("", [ExceptionGroup("", [ValueError()]), KeyboardInterrupt()]), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 74, ""),
        (FileNotFoundError(2, "No such file or directory", "/x"), 1, "keyferry: /x: No such file or directory\n"),
        (FileNotFoundError(2, "No such file or directory", b"/x\xff"), 1, "keyferry: /x\\udcff: No such file or directory\n"),
        (OSError("AF_UNIX path too long"), 1, "keyferry: AF_UNIX path too long\n"),
        (MemoryError(), 1, "keyferry: not enough memory\n"),
        (StoreError("why"), 1, "keyferry: why\n"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, ""), 1, f"keyferry: {NOT_TEXT}\n"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_every_error_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    """The line has the file's name, if the error has one."""
    assert end(error) == code
    assert capsys.readouterr().err.replace("\udcff", "\\udcff") == message


def test_an_internal_error_asks_for_a_report_without_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of an internal error may be secret; an environment variable adds the lines of code."""
    for error in (ValueError("s3cret"), ExceptionGroup("s3cret", [KeyError("s3cret")])):
        monkeypatch.delenv(guard.TRACEBACK, raising=False)
        assert end(error) == 1
        said = capsys.readouterr().err
        assert said.startswith("keyferry: internal error: ")
        assert (said.count("\n"), "please report it" in said, "s3cret" in said) == (1, True, False)
        monkeypatch.setenv(guard.TRACEBACK, "1")
        assert end(error) == 1
        said = capsys.readouterr().err
        assert "s3cret" not in said
    monkeypatch.setenv(guard.TRACEBACK, "1")
    assert end(ValueError("s3cret")) == 1
    assert "in run\n" in capsys.readouterr().err


def test_usage_errors_pass() -> None:
    """A usage error is an exception of its own."""
    with pytest.raises(SystemExit) as ended:
        end(SystemExit(2))
    assert ended.value.code == 2


@pytest.mark.parametrize(
    "words", [["list", "{0}/k", "--unseal", "{0}/fifo"], ["create-key", "{0}/k", "--unseal", "{0}/fifo"]]
)
def test_control_c_ends_the_agents_commands_silently(tmp_path: Path, words: list[str]) -> None:
    """The exit code is the one that shells report for SIGINT."""
    assert agent_main(["keyring", "init", f"{tmp_path}/k", "--new-identity", f"{tmp_path}/i"]) == 0
    os.mkfifo(tmp_path / "fifo")
    command = [sys.executable, "-m", "keyferry_agent", "keyring", *(word.format(tmp_path) for word in words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + PATIENCE
        writer = None
        while writer is None:
            assert time.monotonic() < deadline
            try:
                writer = os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                time.sleep(0.01)
        ended = interrupted(process)
        os.close(writer)
    assert ended == (130, b"", b"")


@pytest.mark.parametrize(
    "words", [["fingerprint", "{0}/fifo"], ["fingerprint", "{0}"], ["check", "{0}"], ["check", "{0}/none"]]
)
def test_unusable_files_are_one_line_errors(tmp_path: Path, words: list[str]) -> None:
    """A folder, a missing file and a pipe that ends have one line each."""
    os.mkfifo(tmp_path / "fifo")
    command = [sys.executable, "-m", "keyferry_agent", *(word.format(tmp_path) for word in words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if "fifo" in words[-1]:
            (tmp_path / "fifo").write_bytes(b"")
        _, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, error.count(b"\n"), str(tmp_path).encode() in error) == (1, 1, True)


@root()
def test_agent_needs_proc_and_client_commands_do_not(tmp_path: Path, agent: RunningAgent) -> None:
    """A chroot may lack /proc; the agent's message names it."""
    python = f"{sys.executable} -m"
    script = (
        f"umount -l /proc; {python} keyferry_agent run --dev --socket {tmp_path}/s; echo code $?;"
        f"{python} keyferry_agent keyring init {tmp_path}/k --new-identity {tmp_path}/i 2>{tmp_path}/warning && "
        f"{python} keyferry module init {tmp_path}/m --generate-passphrase && "
        f"{python} keyferry status --socket {agent.socket}"
    )
    ended = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (ended.returncode, "code 1\n" in ended.stdout) == (0, True), ended.stderr
    assert ended.stderr.startswith("keyferry-agent: /proc/self/fd: No such file or directory: ")
    assert ended.stderr.count("\n") == 1


def test_deleted_working_directory_is_one_line_error(tmp_path: Path) -> None:
    """Relative names do not resolve in a deleted directory."""
    script = f"mkdir {tmp_path}/x && cd {tmp_path}/x && rmdir {tmp_path}/x && {sys.executable} -m keyferry records list --store sqlite:///r"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 1
    assert "the working directory does not exist" in ended.stderr.splitlines()[-1]


# --- a user without a home folder -------------------------------------------------------------------------------------


def test_without_a_home_folder_there_is_no_default_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the default store nor a path with ~ is guessed."""

    def unknown(_uid: int) -> pwd.struct_passwd:
        raise KeyError

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("KEYFERRY_STORE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for home in (None, "", "relative"):
        monkeypatch.delenv("HOME", raising=False)
        if home is not None:
            monkeypatch.setenv("HOME", home)
        for store in (None, "sqlite:///~/x.db", "sqlite:///~nobody-of-that-name/x.db"):
            with pytest.raises(StoreError, match=r"set \$KEYFERRY_STORE|no such user"):
                resolve_url(store)
    monkeypatch.setenv("HOME", "/home/a")
    assert str(sqlite_file(resolve_url("sqlite:///~/x.db"))) == "/home/a/x.db"
    assert resolve_url(None).database == "/home/a/.local/share/keyferry/records.sqlite"


def test_an_empty_environment_is_enough(agent: RunningAgent, tmp_path: Path) -> None:
    """Commands that need no setting work without any environment variable."""
    for words in (
        ["keyferry", "status", "--socket", str(agent.socket)],
        ["keyferry_agent", "keyring", "init", f"{tmp_path}/k", "--new-identity", f"{tmp_path}/i"],
        ["keyferry", "module", "init", f"{tmp_path}/m", "--generate-passphrase"],
    ):
        ended = subprocess.run(
            ["env", "-i", sys.executable, "-m", *words], capture_output=True, timeout=PATIENCE, check=False
        )
        warnings = b"is sealed to one recipient" if "init" in words and words[0] == "keyferry_agent" else b""
        assert (ended.returncode, warnings in ended.stderr, ended.stderr.count(b"\n")) == (0, True, len(warnings) > 0)


# --- sockets, numbers, times ------------------------------------------------------------------------------------------


def test_socket_may_have_every_common_form(
    agent: RunningAgent, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """$KEYFERRY_SOCKET and --socket accept paths and unix: URLs, and name abstract sockets as unsupported."""
    path = str(agent.socket)
    monkeypatch.setenv("HOME", str(agent.socket.parent))
    for form in (path, f"unix://{path}", f"unix:{path}", f"~/{agent.socket.name}", f"unix://~/{agent.socket.name}"):
        monkeypatch.setenv("KEYFERRY_SOCKET", form)
        assert command.main(["status"]) == 0, form
        monkeypatch.delenv("KEYFERRY_SOCKET")
        assert command.main(["status", "--socket", form]) == 0, form
    capsys.readouterr()
    for form, why in (
        ("@name", "abstract socket"),
        ("unix://@name", "abstract socket"),
        ("unix://", "does not name a socket"),
    ):
        monkeypatch.setenv("KEYFERRY_SOCKET", form)
        assert command.main(["status"]) == 3
        said = capsys.readouterr().err
        assert form in said
        assert why in said
        with pytest.raises(SystemExit) as ended:
            command.main(["status", "--socket", form])
        assert ended.value.code == 2
        assert why in capsys.readouterr().err
    assert agent_main(["run", "--dev"]) == 1
    assert "does not name a socket" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "why"),
    [("folder", "is a folder, not a socket"), ("file", "is a regular file"), ("fifo", "is not a socket")],
)
def test_path_that_is_not_a_socket_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, why: str
) -> None:
    """Container runtimes create a folder where the socket does not exist yet."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    assert command.main(["status", "--socket", str(tmp_path / kind)]) == 3
    assert f"{tmp_path / kind} {why}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["call", "Encrypt"],
        ["status"],
        ["records", "add"],
        ["records", "recover"],
        ["records", "rewrap"],
        ["encrypt-file"],
        ["decrypt-file"],
    ],
    ids=" ".join,
)
def test_every_client_command_has_a_socket_option(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each command that connects to an agent accepts --socket."""
    with pytest.raises(SystemExit):
        command.main([*words, "--help"])
    assert "--socket PATH" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["1_6", "１６", " 16", "16 ", "0x10", "", "1e3", "²"])
def test_numbers_are_read_strictly(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Python's int and float accept more forms than the commands do."""
    for words in (
        ["call", "GenerateDataKey", "--KeyId", "alias/dev", "--NumberOfBytes", text],
        ["status", "--wait", text if text != "1e3" else "1e999"],
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(words)
        assert ended.value.code == 2
        assert "expected" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        agent_main(["keyring", "schedule-deletion", "k", "alias/a", "--unseal", "i", "--days", text])
    assert "an integer is expected" in capsys.readouterr().err


def test_common_numbers_are_read() -> None:
    """Numbers may have a fraction."""
    assert [whole_number(text) for text in ("0", "16", "-1", "+2")] == [0, 16, -1, 2]
    assert [seconds(text) for text in ("0", "30", "0.5", ".5", "5.")] == [0, 30, 0.5, 0.5, 5]


def test_invalid_time_is_explained_by_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("soon", "0001-01-01", "2026-13-01"):
        with pytest.raises(SystemExit):
            agent_main(["audit", "who", "file", "--key", "k", "--since", text])
        assert "like 2026-01-31" in capsys.readouterr().err
