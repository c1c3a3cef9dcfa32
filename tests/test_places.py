"""The targets of a file command's result: descriptors are written to, and replaced files keep their attributes."""

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.agent import PATIENCE, RunningAgent
from support.quick_scrypt import QUICK_CLIENT_IN_SHELL, make_scrypt_quick
from support.secrets import secret_file
from support.skip_unless import root

from keyferry import command, descriptors
from keyferry.files import FileError, replacing
from keyferry.files.attributes import Attributes
from keyferry.module import SoftwareModule

PASSPHRASE = "correct horse battery"
PLAINTEXT = b"line\n" * 50_000


class Place(NamedTuple):
    """A folder with a module, a store with the record a, and `sealed`, in which PLAINTEXT is encrypted."""

    folder: Path
    options: list[str]

    def run(self, script: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
        """Run a shell script in the folder: $decrypt IN OUT and $encrypt IN OUT are the commands."""
        program = QUICK_CLIENT_IN_SHELL
        options = " ".join(self.options)
        functions = (
            f'decrypt() {{ {program} decrypt-file "$@" {options}; }}\n'
            f'encrypt() {{ {program} encrypt-file "$@" --record a {options}; }}\n'
        )
        return subprocess.run(
            ["bash", "-c", functions + script],
            cwd=self.folder,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
            env={**os.environ, **environment},
        )


@pytest.fixture(scope="module")
def place(agent: RunningAgent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One for all tests of this file, in processes of their own."""
    folder = tmp_path_factory.mktemp("places")
    secret_file(folder / "passphrase", PASSPHRASE)
    with pytest.MonkeyPatch.context() as patch:
        make_scrypt_quick(patch)
        SoftwareModule.generate("RSA_2048").save(folder / "module", PASSPHRASE)
        patch.setenv("KEYFERRY_SOCKET", str(agent.socket))
        patch.setenv("KEYFERRY_STORE", f"sqlite:///{folder / 'records.sqlite'}")
        assert command.main(["records", "add", "a", "--KeyId", "alias/dev"]) == 0
        made = Place(folder, ["--module", "module", "--passphrase-file", "passphrase"])
        (folder / "plain").write_bytes(PLAINTEXT)
        ended = made.run("encrypt plain sealed")
        assert (ended.returncode, ended.stderr) == (0, b"")
        yield made


# --- paths that lead to descriptors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out",
    [
        "/dev/stdout",
        "/dev/fd/1",
        "/proc/self/fd/1",
        "/proc/thread-self/fd/1",
        "/proc/$$/fd/1",
        "link",
        "all.txt",
        "-",
    ],
)
def test_out_that_leads_to_standard_output_is_written_to(place: Place, out: str) -> None:
    """The content of a shell's log stays, and a later line comes after the result."""
    log = place.folder / "all.txt"
    log.write_bytes(b"first\n")
    (place.folder / "link").unlink(missing_ok=True)
    (place.folder / "link").symlink_to("/dev/stdout")
    ended = place.run(f"{{ decrypt sealed {out}; echo later; }} >> all.txt")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert log.read_bytes() == b"first\n" + PLAINTEXT + b"later\n"
    ended = place.run(f"{{ encrypt plain {out}; }} > all.txt; decrypt all.txt -")
    assert (ended.returncode, ended.stdout) == (0, PLAINTEXT)


@pytest.mark.parametrize(("out", "number"), [("/dev/stderr", 2), ("/dev/fd/7", 7), ("/proc/self/fd/7", 7)])
def test_out_that_leads_to_another_descriptor_is_written_to(place: Place, out: str, number: int) -> None:
    log = place.folder / "other.txt"
    log.write_bytes(b"first\n")
    assert place.run(f"{{ decrypt sealed {out}; echo later >&{number}; }} {number}>>other.txt").returncode == 0
    assert log.read_bytes() == b"first\n" + PLAINTEXT + b"later\n"


def test_nothing_reaches_a_descriptor_before_all_was_authentic(place: Place) -> None:
    """A descriptor gets its output like standard output: after all of it was authenticated."""
    content = (place.folder / "sealed").read_bytes()
    (place.folder / "damaged").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for out in ("/dev/stdout", "/dev/fd/1", "-"):
        ended = place.run(f"decrypt damaged {out}")
        assert (ended.returncode, ended.stdout, b"damaged, cut off" in ended.stderr) == (1, b"", True)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("decrypt sealed /dev/fd/77", "/dev/fd/77: not an open descriptor of this process"),
        ("sleep 9 5>x & decrypt sealed /proc/$!/fd/5; code=$?; kill $!; exit $code", "not an open descriptor of this"),
        ("decrypt sealed /dev/fd/5 5<plain", "/dev/fd/5: this descriptor is not open for writing"),
        ("encrypt /dev/fd/5 x 5>y", "/dev/fd/5: this descriptor is not open for reading"),
        ("decrypt sealed - >&-", "-: standard output is closed"),
        ("encrypt - x <&-", "-: standard input is closed"),
        ("encrypt plain - >>plain", "OUT is the same file as IN"),
        ("encrypt plain /dev/stdout >>plain", "OUT is the same file as IN"),
        ("decrypt sealed ''", "OUT is empty"),
        ("encrypt '' x", "IN is empty"),
        ("decrypt sealed .", "a folder, not a regular file"),
        ("mkdir -p folder; decrypt sealed folder/", "a folder, not a regular file"),
        ("decrypt sealed none/", "ends with a slash"),
        ("decrypt sealed none/out", "none/out: No such file"),
        ("decrypt sealed /dev/full", "not a regular file"),
        ("decrypt sealed /dev/null", "not a regular file"),
        ("rm -f fifo; mkfifo fifo; decrypt sealed fifo", "not a regular file"),
        ("mkdir gone; cd gone; rmdir ../gone; decrypt ../sealed out", "the working folder no longer exists"),
    ],
)
def test_out_and_in_that_cannot_be_used_are_refused(place: Place, script: str, why: str) -> None:
    """The message is one line that names the path."""
    ended = place.run(script)
    assert (ended.returncode, why in ended.stderr.decode()) == (1, True), ended.stderr
    assert ended.stderr.count(b"\n") == 1
    assert (place.folder / "plain").read_bytes() == PLAINTEXT


@pytest.mark.parametrize("script", ["decrypt sealed - | head -c 1", "encrypt plain - | head -c 1"])
def test_closed_pipe_of_a_reader_is_silent(place: Place, script: str) -> None:
    """The exit code shows that a part was not written."""
    ended = place.run(f"set -o pipefail; {script}")
    assert (ended.returncode, ended.stderr) == (74, b"")


def test_in_is_read_from_the_descriptors_offset(place: Place) -> None:
    """Lines that a shell has read are not read again."""
    ended = place.run("{ read -r line; encrypt /dev/stdin out1; } < plain; decrypt out1 -")
    assert (ended.returncode, ended.stdout) == (0, PLAINTEXT[5:])
    ended = place.run("{ read -r line; decrypt sealed - ; } <<< x")
    assert ended.stdout == PLAINTEXT


def test_passphrase_is_read_from_the_descriptors_offset(place: Place) -> None:
    """The next line stays unread. Memory that was not rewound is read from its beginning."""
    options = "--module module --passphrase-file /dev/stdin"
    lines = f"one\\n{PASSPHRASE}\\nthree"
    script = f"{{ read -r a; {QUICK_CLIENT_IN_SHELL} decrypt-file sealed out2 {options}; read -r b; }}"
    ended = place.run(f'printf "{lines}\\n" > lines; chmod 600 lines; {script} < lines; echo $a $b')
    assert (ended.stdout, ended.stderr) == (b"one three\n", b"")
    assert (place.folder / "out2").read_bytes() == PLAINTEXT


def test_memory_without_a_name_is_read_from_its_beginning() -> None:
    """A parent process need not rewind memory that it passes."""
    descriptor = os.memfd_create("secret")
    os.write(descriptor, b"content")
    with descriptors.open_to_read(f"/dev/fd/{descriptor}") as file:
        assert file.read() == b"content"
    os.close(descriptor)


def test_a_symlink_to_a_file_in_a_folder_called_fd_is_a_file(tmp_path: Path) -> None:
    """Only the kernel's links lead to descriptors."""
    folder = tmp_path / "1" / "fd"
    folder.mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"old")
    (folder / "0").symlink_to(tmp_path / "file")
    with replacing(str(folder / "0")) as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_the_library_never_replaces_the_file_behind_a_descriptor(tmp_path: Path) -> None:
    """The library's error advises another target."""
    with (
        (tmp_path / "log").open("wb") as log,
        pytest.raises(FileError, match="leads to an open descriptor"),
        replacing(f"/proc/self/fd/{log.fileno()}"),
    ):
        pass


def test_parameters_come_from_descriptors(place: Place) -> None:
    """@FILE and IN read descriptors the same way."""
    (place.folder / "lines").write_bytes(b"one\ntwo\n")
    call = f"{sys.executable} -m keyferry call"
    for path, number in (("/dev/stdin", 0), ("/dev/fd/5", 5), ("/proc/self/fd/0", 0)):
        encrypted = place.run(
            f"{{ read -r line <&{number}; {call} Encrypt --KeyId alias/dev --Plaintext @{path}; }} {number}<lines"
        )
        blob = json.loads(encrypted.stdout)["CiphertextBlob"]
        decrypted = place.run(f"{call} Decrypt --CiphertextBlob {blob}")
        assert base64.b64decode(json.loads(decrypted.stdout)["Plaintext"]) == b"two\n"


# --- a full $TMPDIR ---------------------------------------------------------------------------------------------------


@root()
def test_a_full_tmpdir_is_named(place: Place, tmp_path: Path) -> None:
    """Plaintext is buffered in TMPDIR, and other errors do not name that folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=True)
    try:
        ended = place.run("decrypt sealed -", TMPDIR=str(tmp_path))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert ended.stderr.decode().startswith(f"keyferry: $TMPDIR ({tmp_path}) is full: No space left on device")


# --- attributes, holes ------------------------------------------------------------------------------------------------


def test_preserve_keeps_mode_and_times_there_and_back(place: Place) -> None:
    """A decrypted program is executable again, with the same date."""
    script = place.folder / "script"
    script.write_bytes(b"#!/bin/sh\n")
    script.chmod(0o755)
    os.utime(script, ns=(1_600_000_000_123_456_789, 1_500_000_000_987_654_321))
    assert place.run("encrypt script script.kf --preserve && decrypt script.kf script.out --preserve").returncode == 0
    status = (place.folder / "script.out").stat()
    assert (status.st_mode & 0o7777, status.st_mtime_ns) == (0o755, 1_500_000_000_987_654_321)


@root()
def test_preserve_keeps_the_owner_where_that_is_permitted(place: Place) -> None:
    """Root may change a file's owner."""
    owned = place.folder / "owned"
    owned.write_bytes(b"x")
    os.chown(owned, 54_321, 54_322)
    owned.chmod(0o640)
    assert place.run("encrypt owned owned.kf --preserve && decrypt owned.kf owned.out --preserve").returncode == 0
    status = (place.folder / "owned.out").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (54_321, 54_322, 0o640)
    (place.folder / "config").write_bytes(b"old")
    os.chown(place.folder / "config", 54_321, 54_322)
    (place.folder / "config").chmod(0o640)
    assert place.run("decrypt sealed config").returncode == 0
    status = (place.folder / "config").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (54_321, 54_322, 0o640)


def test_out_keeps_the_mode_of_the_file_that_it_replaces(place: Place) -> None:
    """A service that read the old file can read the new one; a file without predecessor is private."""
    out = place.folder / "replaced"
    for mode in (0o640, 0o604, 0o444, 0o600, 0o755):
        out.unlink(missing_ok=True)
        out.write_bytes(b"old")
        out.chmod(mode)
        assert place.run("decrypt sealed replaced").returncode == 0
        assert (out.stat().st_mode & 0o7777, out.read_bytes()) == (mode, PLAINTEXT)
    out.unlink()
    assert place.run("decrypt sealed replaced").returncode == 0
    assert out.stat().st_mode & 0o7777 == 0o600


@pytest.mark.parametrize("script", ["cat plain | encrypt - x --preserve", "encrypt plain - --preserve"])
def test_preserve_between_streams_is_wrong_usage(place: Place, script: str) -> None:
    """A stream has no mode or times."""
    ended = place.run(script)
    assert (ended.returncode, ended.stderr.startswith(b"keyferry: --preserve")) == (2, True)


def test_mode_bits_of_a_lost_owner_or_group_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits would apply to another user or group."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    with (tmp_path / "file").open("wb") as file:
        Attributes(0o6775, os.getuid() + 1, os.getgid() + 1, None).apply(file.fileno())
        assert os.fstat(file.fileno()).st_mode & 0o7777 == 0o705
        Attributes(0o6775, os.getuid(), os.fstat(file.fileno()).st_gid, None).apply(file.fileno())
        assert os.fstat(file.fileno()).st_mode & 0o7777 == 0o6775


def test_holes_of_a_sparse_file_stay_holes(place: Place) -> None:
    """A hole of 64 MiB before, in or after the data takes almost no space."""
    sparse = place.folder / "sparse"
    with sparse.open("wb") as file:
        file.write(b"begin")
        file.seek(30_000_001)
        file.write(b"middle")
        file.truncate(64 << 20)
    assert (
        place.run("encrypt sparse sparse.kf && decrypt sparse.kf sparse.out && cmp sparse sparse.out").returncode == 0
    )
    assert (place.folder / "sparse.out").stat().st_blocks * 512 < 1 << 20
    assert (place.folder / "sparse.out").stat().st_size == 64 << 20


@pytest.mark.parametrize("size", [0, 1, 4_095, 4_096, 4_097, 8_192, 65_536, 65_537, 200_000])
@pytest.mark.parametrize("step", [1_000, 4_096, 65_536])
def test_content_with_zeros_is_written_as_it_is(tmp_path: Path, size: int, step: int) -> None:
    """Zeros are written correctly in pieces of any size."""
    kinds = (bytes(size), b"x" * size, b"x" + bytes(size), bytes(size) + b"x", (bytes(5_000) + b"y" * 5_000) * 9)
    for number, content in enumerate(kinds):
        source = io.BytesIO(content)
        with replacing(str(tmp_path / str(number))) as file:
            while piece := source.read(step):
                file.write(piece)
        assert (tmp_path / str(number)).read_bytes() == content
