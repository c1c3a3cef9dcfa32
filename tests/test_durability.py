"""Files that replace others survive a power failure: content is on the disk before it has its name, and the name after it."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from support.keyring import change, new_keyring, opened, run

from keyferry import new_files
from keyferry.files import replacing
from keyferry_agent.keyring.changes import log_of

CONTENT = b"content" * 1_000
Write: TypeAlias = Callable[[Path], None]


class Disk:
    """Records the syncs and renames of files; fails on request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[str, object]] = []
        self.fails_at: str | None = None
        for name in ("fsync", "link", "replace", "rename"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def watched(*arguments: Any, **more: Any) -> None:
            if name == "fsync":
                status = os.fstat(arguments[0])
                step = ("sync folder", None) if stat.S_ISDIR(status.st_mode) else ("sync file", status.st_size)
            else:
                step = ("name", os.path.basename(os.fspath(arguments[1])))
            if step[0] == self.fails_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.steps.append(step)
            real(*arguments, **more)

        return watched


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Watch this process's disk."""
    return Disk(monkeypatch)


@pytest.fixture(params=["unnamed", "named"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the kind of a file system: with files that have no name, and without."""
    name: str = request.param
    if name == "named":  # O_RDWR of a folder is refused, as O_TMPFILE is on such a file system
        monkeypatch.setattr(new_files, "_UNNAMED", os.O_RDWR)
    return name


def create(path: Path) -> None:
    """Write a new file, as a module or an identity is written."""
    new_files.create(path, CONTENT)


def replace(path: Path) -> None:
    """Write OUT of encrypt-file and decrypt-file."""
    with replacing(str(path)) as file:
        file.write(CONTENT)


@pytest.mark.parametrize("write", [create, replace])
def test_content_is_synced_then_named_then_the_folder(tmp_path: Path, disk: Disk, kind: str, write: Write) -> None:
    """A power failure between two of these steps leaves the old file, or the new one."""
    write(tmp_path / "file")
    assert disk.steps[0] == ("sync file", len(CONTENT))
    assert ("name", "file") in disk.steps
    assert disk.steps[-1] == ("sync folder", None)
    assert [step for step, _ in disk.steps].count("sync file") == 1


@pytest.mark.parametrize("write", [create, replace])
def test_a_disk_that_does_not_sync_leaves_the_old_file(tmp_path: Path, disk: Disk, kind: str, write: Write) -> None:
    """The file is not named before its content is safe; nothing is left beside it."""
    path = tmp_path / "file"
    if write is replace:
        path.write_bytes(b"old")
    before = sorted(os.listdir(tmp_path))
    disk.fails_at = "sync file"
    with pytest.raises(OSError, match="No space") as caught:
        write(path)
    assert caught.value.filename == str(path)
    assert sorted(os.listdir(tmp_path)) == before
    assert not path.exists() or path.read_bytes() == b"old"


def test_keyring_is_synced_renamed_and_its_folder_synced(tmp_path: Path, disk: Disk) -> None:
    """The first history entry is on the disk before the rename, and the second one after the folder's sync."""
    keyring = new_keyring(tmp_path)
    disk.steps.clear()
    change(keyring, "create-key", "--alias", "alias/b")
    log = log_of(keyring)
    *_, done = log.read_bytes().splitlines(keepends=True)
    assert disk.steps == [
        ("sync file", keyring.stat().st_size),
        ("sync file", log.stat().st_size - len(done)),
        ("name", "keyring.age"),
        ("sync folder", None),
        ("sync file", log.stat().st_size),
    ]


def test_a_folder_that_does_not_sync_is_an_error(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    """The keyring was changed, and the command says that a power failure may undo the change."""
    keyring = new_keyring(tmp_path)
    disk.fails_at = "sync folder"
    run("create-key", keyring, "--unseal", tmp_path / "identity", "--alias", "alias/b", code=1)
    assert "was changed, but a power failure may undo it: No space" in capsys.readouterr().err
    assert "alias/b" in opened(keyring).aliases
