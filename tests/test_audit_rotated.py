"""Rotated files of an audit log: found by any name, read in any form, and put in order by the chain."""

import bz2
import gzip
import lzma
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from support.agent import PATIENCE, RawConnection
from support.audit_log import START, Log, entries, line, text
from support.calls import call_ok
from support.keyring import serving

from keyferry_agent.audit import rotated
from keyferry_agent.chained_log import chain

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}
NAMES = [
    "audit.jsonl.1",
    "audit.jsonl.1.gz",
    "audit.jsonl-20261129",
    "audit.jsonl-20261129.gz",
    "audit.jsonl-20261129-1764412345",
    "audit.jsonl-20261129-1764412345.gz",
    "audit.jsonl-2026-11-29",
    "audit.jsonl-2026112913",
    "audit.jsonl-20261129_13",
    "audit.jsonl.2026-11-29T13:00:00",
    "audit.jsonl20261129",
    "audit.jsonl.1.bz2",
    "audit.jsonl.1.xz",
    "audit-20261129.jsonl",
    "audit-20261129.jsonl.gz",
    "audit-2026-11-29.jsonl",
    "audit.1.jsonl",
    "audit.1.jsonl.xz",
    "audit.jsonl.old",
    "audit.jsonl-week48",
]


@pytest.fixture
def log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Log:
    """An audit log without a file."""
    return Log(tmp_path, capsys)


# --- names and formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_rotated_file_is_found_by_any_name(log: Log, name: str) -> None:
    """An access to the key in question is in the rotated file only."""
    lines = entries(5)
    compress = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}.get(Path(name).suffix, "plain")
    (log.folder / name).write_bytes(COMPRESS[compress](text(lines[:3])))
    log.current.write_bytes(text(lines[3:]))
    log.is_whole(5)
    assert f"read, oldest first: {log.folder / name}, {log.current}\n" in log.err


@pytest.mark.parametrize("name", ["audit", "audit [1].jsonl", "audit*.log", "a.b.c", "密 钥.jsonl"])
def test_log_name_may_have_shell_patterns(log: Log, name: str) -> None:
    """Shell patterns in a name have no meaning."""
    lines = entries(5)
    log.current = log.folder / name
    (log.folder / "agent.toml").write_text(f'[audit]\npath = "{log.current}"\n')
    (log.folder / f"{name}-20261129.gz").write_bytes(gzip.compress(text(lines[:3])))
    log.current.write_bytes(text(lines[3:]))
    log.is_whole(5)


@pytest.mark.parametrize("form", COMPRESS)
@pytest.mark.parametrize("name", ["audit.jsonl.1", "audit.jsonl.1.gz", "audit.jsonl.1.xz", "audit.jsonl.1.zst"])
def test_compression_is_detected_by_content(log: Log, form: str, name: str) -> None:
    """A name does not decide the compression; all members of a compressed file are read."""
    lines = entries(6)
    compress = COMPRESS[form]
    data = compress(text(lines[:4])) if form == "lzma" else compress(text(lines[:2])) + compress(text(lines[2:4]))
    (log.folder / name).write_bytes(data)
    log.current.write_bytes(text(lines[4:]))
    log.is_whole(6)


def test_the_chain_decides_the_order(log: Log) -> None:
    """Neither the names of files nor the order of arguments makes a difference."""
    lines, names = entries(40), [name for name in NAMES if Path(name).suffix not in (".gz", ".bz2", ".xz")]
    for seed in range(5):
        random.Random(seed).shuffle(names)
        for number, name in enumerate(names):
            (log.folder / name).write_bytes(text(lines[2 * number : 2 * number + 2]))
        log.current.write_bytes(text(lines[2 * len(names) :]))
        log.is_whole(40)
        files = [log.current, *(log.folder / name for name in sorted(names))]
        log.is_whole(40, files=files)
        log.is_whole(40, files=[*files[::-1], *files])


def test_the_chain_decides_against_the_clock(log: Log) -> None:
    """The clock was set back between two files."""
    first = entries(2)
    second = [line(chain.link(first[-1]), 2, time=START - timedelta(days=400))]
    third = [line(chain.link(second[-1]), 3, time=START - timedelta(days=800))]
    for name, lines in (("audit.jsonl.1", third), ("audit.jsonl.2", first), ("audit.jsonl.3", second)):
        (log.folder / name).write_bytes(text(lines))
    log.current.touch()
    log.is_whole(4)


def test_empty_files_and_lines_of_the_log_are_skipped(log: Log) -> None:
    """As logrotate leaves them with `ifempty`, and as an agent leaves them whose log goes to the same file."""
    lines = entries(4)
    (log.folder / "audit.jsonl.1").touch()
    (log.folder / "audit.jsonl.2.gz").write_bytes(gzip.compress(b""))
    (log.folder / "audit.jsonl.3").write_bytes(b'{"event": "agent.serving"}\n' + text(lines[:2]) + b'{"event": "x"}\n')
    (log.folder / "audit.jsonl.4.gz").write_bytes(gzip.compress(text(lines[2:])))
    log.current.touch()
    log.is_whole(4)


def test_copies_count_once(log: Log) -> None:
    """An entry is counted once over copies, older copies, a copied end, a compressed copy and a link."""
    lines = entries(8)
    log.current.write_bytes(text(lines[4:]))
    (log.folder / "audit.jsonl.1").write_bytes(text(lines[:4]))
    (log.folder / "audit.jsonl.1.gz").write_bytes(gzip.compress(text(lines[:4])))
    (log.folder / "audit.jsonl.bak").write_bytes(text(lines[4:6]))
    (log.folder / "audit.jsonl~").write_bytes(text(lines[6:]))
    (log.folder / "audit.jsonl.2").write_bytes(text(lines[1:3]))
    (log.folder / "audit.jsonl.latest-1").symlink_to(log.current)
    os.link(log.current, log.folder / "audit.jsonl.9")
    log.is_whole(8)


def test_other_files_beside_it_do_not_matter(log: Log) -> None:
    """Other audit logs with a similar name, folders, lock files, checksums, an editor's file."""
    log.current.write_bytes(text(entries(3)))
    (log.folder / "audit-orders.jsonl").write_bytes(text([line(chain.BEGINNING, 7)]))
    (log.folder / "other.jsonl.1").write_bytes(b"nonsense")
    (log.folder / "auditing.jsonl").write_bytes(text(entries(2)))
    (log.folder / "audit.jsonl.swp").write_bytes(b"\x00\xff")
    (log.folder / "audit.jsonl.sha256").write_bytes(b"ab  audit.jsonl\n")
    (log.folder / ".audit.jsonl.lock").touch()
    (log.folder / "audit.jsonl.1").mkdir()
    log.is_whole(3)


def test_the_files_of_olddir_are_named(log: Log) -> None:
    """The configuration leads to the aliases; the named files are the audit log."""
    lines, old = entries(4), log.folder / "old"
    old.mkdir()
    (old / "audit.jsonl.1.gz").write_bytes(gzip.compress(text(lines[:2])))
    log.current.write_bytes(text(lines[2:]))
    assert log.run("who") == 1
    assert "the beginning of the audit log is missing" in log.err
    log.is_whole(4, files=[old / "audit.jsonl.1.gz", log.current])


def test_a_pipe_can_be_named(log: Log, tmp_path: Path) -> None:
    """A pipe such as the output of zstdcat may be an argument."""
    lines, fifo = entries(4), tmp_path / "fifo"
    os.mkfifo(fifo)
    log.current.write_bytes(text(lines[2:]))
    writer = threading.Thread(target=fifo.write_bytes, args=(text(lines[:2]),))
    writer.start()
    assert log.run("verify", files=[log.current, fifo]) == 0
    writer.join(PATIENCE)


# --- with a running agent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["rename", "copytruncate", "dateext and compress"])
def test_real_audit_log_is_whole_after_rotations(log: Log, keyring: Path, socket_path: Path, how: str) -> None:
    """The chain of a real agent is whole over four rotations and an empty file at the end."""
    more = f'[audit]\npath = "{log.current}"\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
        key = call_ok(connection, "GenerateDataKey", {"KeyId": "alias/a"})["KeyId"]
        for number in range(1, 5):
            call_ok(connection, "DescribeKey", {"KeyId": "alias/a"})
            to = log.folder / (
                f"audit.jsonl.{number}" if how != "dateext and compress" else f"audit.jsonl-2026112{number}"
            )
            if how == "copytruncate":
                shutil.copy(log.current, to)
                os.truncate(log.current, 0)
                continue
            log.current.rename(to)
            agent.wait_for("audit.reopened", number)
            if how != "rename":
                to.with_name(f"{to.name}.gz").write_bytes(gzip.compress(to.read_bytes()))
                to.unlink()
    assert log.run("verify") == 0, log.err
    assert log.out.startswith("whole: 7 lines, from the beginning")
    assert log.run("who", key=key) == 0
    assert "GenerateDataKey 1 times" in log.out
    assert log.run("who", key="alias/a") == 0


def test_a_rotation_while_the_files_are_read_is_noticed(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rotation, the files are listed and read again."""
    lines = entries(6)
    (log.folder / "audit.jsonl.1").write_bytes(text(lines[:2]))
    log.current.write_bytes(text(lines[2:4]))
    real, rotations = rotated.find, [1]

    def find(current: Path) -> rotated.Found:
        found = real(current)
        if rotations:
            rotations.pop()
            (log.folder / "audit.jsonl.1").rename(log.folder / "audit.jsonl.2")
            log.current.rename(log.folder / "audit.jsonl.1")
            log.current.write_bytes(text(lines[4:]))
        return found

    monkeypatch.setattr(rotated, "find", find)
    log.is_whole(6)
    assert not rotations


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["entries", "one line", "zeros", "faults"])
def test_a_large_file_is_read_in_little_memory(tmp_path: Path, content: str) -> None:
    """300 MB, compressed to a few; the process gets less memory than that."""
    path, size = tmp_path / "audit.jsonl.1.gz", 300_000_000
    pieces = {
        "one line": [b'{"event": "audit", "x": "' + b"x" * 1_000_000] + [b"x" * 1_000_000] * (size // 1_000_000),
        "zeros": [bytes(1_000_000)] * (size // 1_000_000),
        "faults": [text([line("f" * 64, 1)] * 1_000)] * 100,
    }
    with gzip.open(path, "wb", compresslevel=1) as file:
        if content == "entries":
            previous = chain.BEGINNING
            for number in range(50_000):
                written = line(previous, number % 1_000)
                previous = chain.link(written)
                file.write(written + b"\n")
        else:
            for piece in pieces[content]:
                file.write(piece)
    code = "import sys; from keyferry_agent.cli.main import main; sys.exit(main(sys.argv[1:]))"

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (120_000_000, 120_000_000))

    ended = subprocess.run(
        [sys.executable, "-c", code, "audit", "who", "--key", "other", str(path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        preexec_fn=little,
    )
    assert ended.returncode == (0 if content == "entries" else 1), ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr) < 20_000
