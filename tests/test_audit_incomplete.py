"""An incomplete audit log is never called complete: missing, damaged and forked parts are named, and the exit code is 1."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.audit_log import LOST, Log, entries, line, text

from keyferry_agent.chained_log import chain


@pytest.fixture
def log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Log:
    """An audit log without a file."""
    return Log(tmp_path, capsys)


# --- incomplete -------------------------------------------------------------------------------------------------------


def test_a_log_without_its_beginning_is_not_complete(log: Log) -> None:
    """`who` prints the entries that it found, and exits with 1; `verify` says from when on the chain is whole."""
    lines = entries(5)
    log.current.write_bytes(text(lines[2:]))
    assert log.run("verify") == 0  # the chain is whole: log rotation deletes old files
    assert "whole: 3 lines, from 2026-11-01T02:00:00.000+00:00 on" in log.out
    assert "the beginning of the audit log is missing" in log.err
    assert "INCOMPLETE" in log.err
    assert log.run("who", key="other") == 1
    assert "GenerateDataKey 3 times" in log.out
    assert log.run("who", "--json", key="other") == 1
    assert json.loads(log.out)[0]["count"] == 3


@pytest.mark.parametrize(("since", "code"), [("2026-11-01T02:00:00Z", 0), ("2026-11-01T01:59:59Z", 1)])
@pytest.mark.parametrize("verb", ["who", "verify"])
def test_a_log_may_be_incomplete_before_since(log: Log, since: str, code: int, verb: str) -> None:
    """The entries that are missing are older than the first one that is there."""
    log.current.write_bytes(text(entries(5)[2:]))
    (log.folder / "audit.jsonl.2.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    assert log.run(verb, "--since", since, key="never used") == code
    if verb == "who":
        assert ("No caller" in log.out) == (code == 0)


def test_since_does_not_excuse_missing_newer_entries(log: Log) -> None:
    """The newest file cannot be read, or ends in the middle of a line, so newer entries may be missing."""
    lines = entries(5)
    (log.folder / "audit.jsonl.1.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    (log.folder / "audit.jsonl.2").write_bytes(text(lines))
    log.current.touch()
    assert log.run("who", "--since", "2026-11-01T01:00:00Z") == 1
    (log.folder / "audit.jsonl.1.zst").unlink()
    log.current.write_bytes(lines[-1][:20])
    assert log.run("who", "--since", "2026-11-01T01:00:00Z") == 1
    log.current.unlink()
    assert log.run("who", "--since", "2026-11-01T01:00:00Z") == 1
    assert f"{log.current}: No such file" in log.err


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("audit.jsonl.1.zst", b"\x28\xb5\x2f\xfd" + bytes(50), "compressed with zstd"),
        ("audit.jsonl.1", b"\x28\xb5\x2f\xfd" + bytes(50), "compressed with zstd"),
        ("audit.jsonl.1.lz4", b"\x04\x22\x4d\x18" + bytes(50), "compressed with lz4"),
        ("audit.jsonl.1.gz", gzip.compress(text(entries(9)))[:-30], "damaged or cut off"),
        ("audit.jsonl.1.gz", gzip.compress(text(entries(9)))[:-4] + b"abcd", "damaged or cut off"),
        ("audit.jsonl.1.gz", gzip.compress(text(entries(9))) + b"garbage", "damaged or cut off"),
        ("audit.jsonl.1.gz", gzip.compress(text(entries(9)))[:5], "damaged or cut off"),
        ("audit.jsonl.1.bz2", bz2.compress(text(entries(9)))[:-10], "damaged or cut off"),
        ("audit.jsonl.1.bz2", b"BZh9" + bytes(40), "damaged or cut off"),
        ("audit.jsonl.1.xz", lzma.compress(text(entries(9)))[:-20], "damaged or cut off"),
        ("audit.jsonl.1.xz", lzma.compress(text(entries(9)))[:30] + bytes(60), "damaged or cut off"),
        ("audit-20261129.jsonl.gz", b"\x1f\x8b", "damaged or cut off"),
        ("audit.jsonl.gz", b"nonsense", "line 1"),
        ("audit.jsonl-20261129", b"\x00" * 100, "line 1"),
        ("audit.jsonl-20261129", b"{}\n[1]\n", "line 2: not a line of an audit log"),
    ],
    ids=itertools.count(),
)
def test_a_rotated_file_that_cannot_be_read_is_named(log: Log, name: str, data: bytes, why: str) -> None:
    """Although the chain of the other files is whole; and nothing but the message is printed."""
    log.current.write_bytes(text(entries(3)))
    (log.folder / name).write_bytes(data)
    log.is_not_whole(str(log.folder / name), why)
    log.is_not_whole(str(log.folder / name), why, files=[log.current, log.folder / name])
    assert "Traceback" not in log.err


def test_zstd_file_is_named(log: Log) -> None:
    """Python's standard library cannot decompress zstd; its output can be passed instead."""
    if shutil.which("zstd") is None:
        pytest.skip("needs the program zstd (Debian package zstd)")
    lines = entries(4)
    (log.folder / "audit.jsonl.1").write_bytes(text(lines[:2]))
    subprocess.run(["zstd", "-q", "--rm", log.folder / "audit.jsonl.1"], check=True)
    log.current.write_bytes(text(lines[2:]))
    log.is_not_whole("audit.jsonl.1.zst: compressed with zstd")
    subprocess.run(["zstd", "-q", "-d", "--rm", log.folder / "audit.jsonl.1.zst"], check=True)
    log.is_whole(4)


def test_a_rotated_name_that_is_not_a_file_is_named(log: Log) -> None:
    """A pipe beside the log is not opened, which would block; a link that leads nowhere may have been a file."""
    log.current.write_bytes(text(entries(3)))
    os.mkfifo(log.folder / "audit.jsonl.1")
    log.is_not_whole("audit.jsonl.1: not a file")
    (log.folder / "audit.jsonl.1").unlink()
    (log.folder / "audit.jsonl.1").symlink_to("nowhere")
    log.is_not_whole("audit.jsonl.1: No such file")


def test_rotated_files_missing_from_the_arguments_are_named(log: Log) -> None:
    """Naming only the newest file is an incomplete answer; with --since it may be complete."""
    (log.folder / "audit.jsonl-20261129").write_bytes(text(entries(3)))
    log.current.write_bytes(text([line(chain.BEGINNING, 7)]))  # restarted after the rotation: a chain of its own
    log.is_not_whole("audit.jsonl-20261129: looks like a rotated file", files=[log.current])
    assert log.run("who", "--since", "2026-11-02", files=[log.current]) == 0


def test_a_log_without_entries_is_not_complete(log: Log) -> None:
    """An empty audit log may have been truncated."""
    log.current.touch()
    log.is_not_whole("no entry")


def test_a_log_that_is_not_a_file_has_to_be_named(log: Log) -> None:
    """`audit` does not open a pipe by itself, as that would block."""
    os.mkfifo(log.current)
    assert log.run("who") == 1
    assert "not a file" in log.err


# --- broken chains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["one file", "two files"])
def test_each_kind_of_break_is_distinguished(log: Log, where: str) -> None:
    """The report names a fork, a change, a missing line, a moved line, a new beginning and a cut off line."""
    lines = entries(6)
    fork = [*lines, line(chain.link(lines[2]), 9)]
    breaks: list[tuple[list[bytes], str]] = [
        (fork, "a fork; two agents wrote"),
        ([*lines[:3], lines[3].replace(b"other", b"changed"), *lines[4:]], "a line was changed or removed"),
        ([*lines[:3], *lines[4:]], "a line was changed or removed"),
        ([*lines[:3], line(chain.BEGINNING, 8)], "begins a new chain"),
    ]
    for changed, why in breaks:
        if where == "one file":
            log.current.write_bytes(text(changed))
        else:
            cut = next(n for n in range(1, len(changed)) if chain.link(changed[n - 1]) not in str(changed[n]))
            (log.folder / "audit.jsonl.1").write_bytes(text(changed[:cut]))
            log.current.write_bytes(text(changed[cut:]))
        log.is_not_whole(why)
        for other in {why for _, why in breaks} - {why}:
            assert other not in log.err
    log.current.write_bytes(text(lines)[:-1])
    (log.folder / "audit.jsonl.1").unlink(missing_ok=True)
    log.is_not_whole("line 6: cut off")
    log.current.write_bytes(text([lines[0], lines[2], lines[1], *lines[3:]]))
    log.is_not_whole("line 2: does not follow the line before it, but", "line was moved")


def test_two_writing_agents_are_reported_as_a_fork(log: Log) -> None:
    """Each agent continued its own last line."""
    first = line(chain.BEGINNING, 0, key=LOST)
    lasts, lines = [first, first], [first]
    for number in range(1, 200):
        lasts[number % 2] = line(chain.link(lasts[number % 2]), number)
        lines.append(lasts[number % 2])
    log.current.write_bytes(text(lines))
    log.is_not_whole("a fork; two agents wrote", "more problems")
    assert log.run("who", key="other") == 1
    assert "199 times" in log.out


@pytest.mark.parametrize(
    "fields",
    [
        {"previous": None},
        {"previous": [1]},
        {"previous": {"a": 1}},
        {"time": "yesterday"},
        {"time": 5},
        {"time": "2026-11-01"},
        {"uid": {"a": []}, "unit": [1], "operation": ["Decrypt"]},
        {"outcome": None, "unit": 5},
        {"unit": "\ud800"},
    ],
)
def test_entries_with_other_fields_raise_nothing(log: Log, fields: dict[str, Any]) -> None:
    """A changed entry shows in the chain; neither command ends in a traceback."""
    lines = entries(4)
    changed = {**json.loads(lines[0]), **fields}
    lines[0] = json.dumps(changed).encode()
    log.current.write_bytes(text(lines))
    for arguments in (("verify",), ("who",), ("who", "--json"), ("who", "--since", "2026-11-01")):
        assert log.run(*arguments) == 1
        assert "Traceback" not in log.err
