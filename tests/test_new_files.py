"""New files with keys: a full disk or SIGKILL leaves nothing that stands in the way of the next attempt."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.agent import PATIENCE, RunningAgent
from support.quick_scrypt import QUICK_SCRYPT
from support.secrets import secret_file
from support.skip_unless import root

from keyferry import command, new_files
from keyferry.module import SoftwareModule
from keyferry_agent.cli.main import main as agent_main

CLIENT, AGENT = "keyferry.command", "keyferry_agent.cli.main"
MAKING = {
    "module": (CLIENT, "module", "init", "{}/module", "--passphrase-file", "{}/../passphrase"),
    "module and passphrase": (
        *(CLIENT, "module", "init", "{}/module", "--generate-passphrase"),
        *("--passphrase-file", "{}/phrase"),
    ),
    "keyring and identity": (AGENT, "keyring", "init", "{}/keyring", "--new-identity", "{}/identity"),
    "keyring and passphrase": (
        *(AGENT, "keyring", "init", "{}/keyring", "--generate-passphrase"),
        *("--passphrase-file", "{}/phrase"),
    ),
}
KILLED = f"""{QUICK_SCRYPT}
import os, signal, sys
from importlib import import_module

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

name, count = sys.argv[1], int(sys.argv[2])
real = getattr(os, name)

def counted(*arguments, **more):
    global count
    count -= 1
    if count < 0:
        kill()
    return real(*arguments, **more)

setattr(os, name, counted)
sys.exit(import_module(sys.argv[3]).main(sys.argv[4:]))
"""


pytestmark = pytest.mark.usefixtures("quick_scrypt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where keys are made, with a passphrase beside it."""
    secret_file(tmp_path / "passphrase", "correct horse battery")
    (tmp_path / "keys").mkdir()
    return tmp_path / "keys"


def words(making: tuple[str, ...], folder: Path) -> list[str]:
    """The command that makes keys in a folder."""
    return [word.format(folder) for word in making]


def ends(command: list[str]) -> int:
    """Run a command in this process."""
    return (agent_main if command[0] == AGENT else command_main)(command[1:])


command_main = command.main


@pytest.mark.parametrize("making", MAKING.values(), ids=MAKING)
@pytest.mark.parametrize("killed_at", ["fsync", "link"])
def test_a_kill_at_the_first_write_leaves_nothing_in_the_way(
    folder: Path, making: tuple[str, ...], killed_at: str
) -> None:
    """A second attempt after the kill succeeds."""
    killing = [sys.executable, "-c", KILLED, killed_at, "0", *words(making, folder)]
    ended = subprocess.run(killing, capture_output=True, timeout=PATIENCE, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = {name for name in os.listdir(folder) if not name.startswith(".")}
    assert left <= {"keyring.changes.jsonl"}  # the next attempt continues it
    assert ends(words(making, folder)) == 0


@pytest.mark.parametrize("making", MAKING.values(), ids=MAKING)
@root()
def test_a_full_disk_leaves_nothing_in_the_way(
    folder: Path, making: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A second attempt with free space succeeds."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=True)
    try:
        (folder / "fill").write_bytes(bytes(64 << 10))
        assert ends(words(making, folder)) == 1
        assert "No space left on device" in capsys.readouterr().err
        assert os.listdir(folder) == ["fill"]
        (folder / "fill").unlink()
        assert ends(words(making, folder)) == 0
    finally:
        subprocess.run(["umount", folder], check=True)


@root()
def test_a_store_on_a_full_disk_is_made_when_there_is_room(folder: Path, agent: RunningAgent) -> None:
    """The folder of the store may already exist from the failed attempt."""
    store = ["--store", f"sqlite:///{folder}/new/records.sqlite", "--socket", str(agent.socket)]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=True)
    try:
        (folder / "fill").write_bytes(bytes(64 << 10))
        assert command.main(["records", "add", "a", "--KeyId", "alias/dev", *store]) == 1
        (folder / "fill").unlink()
        assert command.main(["records", "add", "a", "--KeyId", "alias/dev", *store]) == 0
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(params=["unnamed", "named", "without links"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with files that have no name, one without, and one without hard links either."""
    name: str = request.param
    if name != "unnamed":
        monkeypatch.setattr(new_files, "_UNNAMED", os.O_RDWR)
    if name == "without links":

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    return name


def test_a_new_file_is_whole_private_and_alone(tmp_path: Path, kind: str) -> None:
    """The file has its content and mode 0600, and no file beside it, on every kind of file system."""
    path = tmp_path / "new"
    with new_files.creating(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"content", 0o600)
    assert os.listdir(tmp_path) == ["new"]


def test_a_new_file_replaces_nothing(tmp_path: Path, kind: str) -> None:
    """An existing file or dangling symlink stays, also one that appears during the write."""
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "link").symlink_to("none")
    for name in ("old", "link"):
        with pytest.raises(FileExistsError) as caught:
            new_files.create(tmp_path / name, b"new")
        assert caught.value.filename == str(tmp_path / name)
    with pytest.raises(FileExistsError), new_files.creating(tmp_path / "late"):
        (tmp_path / "late").write_bytes(b"old")
    assert (tmp_path / "late").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["late", "link", "old"]


def test_a_block_that_raises_leaves_no_file(tmp_path: Path, kind: str) -> None:
    """Any exception in the block removes the new file."""

    def fail(error: BaseException) -> None:
        with new_files.creating(tmp_path / "new") as file:
            file.write(b"x")
            raise error

    for error in (OSError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
    assert os.listdir(tmp_path) == []


def test_errors_name_the_target_and_not_the_temporary_file(tmp_path: Path) -> None:
    """A missing folder and a folder that is a file are named."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "new", tmp_path / "file" / "new", Path("/proc/new")):
        with pytest.raises(OSError, match=r".") as caught:
            new_files.create(path, b"")
        assert caught.value.filename == str(path)


def test_a_module_is_saved_whole_by_the_library_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command saves with `SoftwareModule.save`."""
    module = SoftwareModule.generate("EC_SM2")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            module.save(tmp_path / "m", "correct horse battery")
    module.save(tmp_path / "m", "correct horse battery")
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("path", ["/dev/stdout", "/proc/self/fd/1", "link"])
def test_a_keyring_is_never_made_or_changed_through_a_descriptor(
    tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file behind it may be a log."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("/dev/stdout")
    assert agent_main(["keyring", "init", "k", "--new-identity", "i"]) == 0
    assert agent_main(["keyring", "init", path, "--new-identity", "j"]) == 1
    assert agent_main(["keyring", "create-key", path, "--unseal", "i"]) == 1
    assert "leads to an open descriptor" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["i", "k", "k.changes.jsonl", "link"]
