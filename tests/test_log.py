"""The log on standard error: its thread survives every write error, counts lost lines, and writes whole lines only."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from support.agent import PATIENCE, RawConnection
from support.calls import error
from support.skip_unless import root
from support.waiting import wait_until

KIB = 1_024
PROLOGUE = """
import errno, logging, os, sys, threading, time
import structlog
from keyferry_agent.telemetry import logging_setup
logging_setup.configure()
logger = structlog.get_logger("test")
def settle(seconds=60):
    waiting = logging.getLogger().handlers[0].queue
    deadline = time.monotonic() + seconds
    while waiting.unfinished_tasks and time.monotonic() < deadline:
        time.sleep(0.01)
"""
"""The code that makes a process log as the agent does; `settle` waits until its thread has taken every line."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(path: Path) -> None:
    """Write to a file until its file system has no byte left."""
    with open(path, "ab", buffering=0) as file:
        for size in (KIB, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Every line of a log, which is JSON and whole."""
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def wait_for_lost(path: Path) -> int:
    """Wait for the report of lost lines, and return their number."""

    def lost() -> list[int]:
        return [line["lines"] for line in lines_of(path) if line["event"] == "log.lost"]

    wait_until("the log reports lost lines", lost)
    return sum(lost())


def protocol_error(path: Path) -> None:
    """Make an agent log one line."""
    with RawConnection(path) as connection:
        connection.send(b"\xc1")
        error(connection.response())
        assert connection.response() is None


def running(code: str, stderr: IO[Any] | int, **more: Any) -> "subprocess.Popen[str]":
    """A Python process that logs as the agent does."""
    return subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        **more,
    )


@root()
@pytest.mark.parametrize("mode", ["ab", "wb"])
@pytest.mark.parametrize("emptied", ["another file", "the log itself"])
def test_an_agent_logs_again_after_a_full_disk(disk: Path, socket_path: Path, mode: str, emptied: str) -> None:
    """The agent reports the lost lines without a further event, and later events are logged as before."""
    path = disk / "log"
    with open(path, mode) as stderr:
        config = socket_path.with_suffix(".toml")
        config.write_text(f'[audit]\npath = "{socket_path.with_name("audit.jsonl")}"\n')
        arguments = [sys.executable, "-m", "keyferry_agent", "run", "--dev", "--config", str(config)]
        process = subprocess.Popen([*arguments, "--socket", str(socket_path)], stderr=stderr)
    try:
        wait_until("the agent serves", lambda: "agent.serving" in path.read_text() or process.poll() is not None)
        fill(disk / "other")
        for _ in range(40):  # the file's last page has room for some lines
            protocol_error(socket_path)
        time.sleep(0.5)
        written = [line["event"] for line in lines_of(path)].count("connection.protocol_error")
        if emptied == "the log itself":
            os.truncate(path, 0)
        else:
            (disk / "other").unlink()
        assert wait_for_lost(path) == 40 - written
        protocol_error(socket_path)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    events = [line["event"] for line in lines_of(path)]
    assert events[-3:] == ["connection.protocol_error", "agent.draining", "agent.stopped"]


@root()
def test_no_line_continues_a_half_line_of_a_full_disk(disk: Path) -> None:
    """The disk fills in the middle of a line, several times; every line in the file is whole."""
    path = disk / "log"
    code = """
from pathlib import Path
import itertools
disk, numbers = Path(sys.argv[1]), itertools.count()
for _ in range(3):
    for _ in range(200):
        logger.info("line", number=next(numbers), filler="y" * 700)
        settle()
    os.truncate(disk / "log", 700)
    logger.info("again", number=next(numbers))
    settle()
print(next(numbers))
"""
    arguments = [sys.executable, "-c", PROLOGUE + code, str(disk)]
    with open(path, "ab") as stderr:
        ended = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=stderr, timeout=PATIENCE, check=True)
    assert int(ended.stdout) == 603
    text = path.read_text()
    whole = [json.loads(line) for line in text[text.index("\n", 700) + 1 :].splitlines()] if len(text) > 700 else []
    assert text.endswith("\n")
    assert {line["event"] for line in whole} <= {"line", "again", "log.lost"}


@pytest.mark.parametrize("number", ["ENOSPC", "EIO", "EPIPE", "EBADF", "EFBIG", "EDQUOT", "EINVAL", "ENOBUFS"])
def test_the_thread_survives_each_error_and_counts(tmp_path: Path, number: str) -> None:
    """After the error has passed, the log has the number of lost lines, and nothing was printed by Python itself."""
    code = f"""
real, failing = os.write, True
def write(descriptor, data):
    if descriptor == 2 and failing:
        raise OSError(errno.{number}, os.strerror(errno.{number}))
    return real(descriptor, data)
os.write = write
for number in range(7):
    logger.info("lost", number=number)
settle()
failing = False
time.sleep(1.5)
logger.info("written")
"""
    path = tmp_path / "log"
    with open(path, "wb") as stderr, running(code, stderr) as process:
        assert process.wait(PATIENCE) == 0
    assert [(line["event"], line.get("lines")) for line in lines_of(path)] == [("log.lost", 7), ("written", None)]


def test_a_closed_descriptor_that_comes_back_is_used_again(tmp_path: Path) -> None:
    """The kernel refuses each write with EBADF meanwhile."""
    code = """
kept = os.dup(2)
os.close(2)
logger.info("lost")
settle()
os.dup2(kept, 2)
logger.info("written")
"""
    path = tmp_path / "log"
    with open(path, "ab") as stderr, running(code, stderr) as process:
        assert process.wait(PATIENCE) == 0
    assert [line["event"] for line in lines_of(path)] == ["log.lost", "written"]


def test_a_reader_that_went_away_does_not_end_the_process() -> None:
    """The kernel refuses each line (EPIPE); the thread drops them, and the end of the process does not wait."""
    reading, writing = os.pipe()
    code = """
sys.stdin.readline()
for number in range(10_000):
    logger.info("lost", number=number)
settle()
print(sum(thread.name == "keyferry-log" for thread in threading.enumerate()))
"""
    with running(code, writing) as process:
        os.close(writing)
        os.close(reading)
        assert process.communicate("go\n", timeout=PATIENCE)[0] == "1\n"
    assert process.returncode == 0


def test_a_full_pipe_that_does_not_block_loses_nothing() -> None:
    """A descriptor with O_NONBLOCK returns EAGAIN for a full pipe, and the thread waits until it can write."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    code = """
for number in range(500):
    logger.info("line", number=number, filler="z" * 9_000)
print("logged", flush=True)
settle()
"""
    with running(code, writing) as process, open(reading, "rb") as reader:
        os.close(writing)
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        lines = [json.loads(line) for line in reader]
        assert process.wait(PATIENCE) == 0
    assert [line["number"] for line in lines] == list(range(500))


def test_the_end_of_a_process_does_not_wait_for_a_full_pipe() -> None:
    """The last lines have a second; then the process exits without writing them."""
    reading, writing = os.pipe()
    code = """
for number in range(6_000):
    logger.info("line", number=number, filler="z" * 100)
"""
    with running(code, writing) as process:
        os.close(writing)
        assert process.wait(PATIENCE) == 0
    assert select.select([reading], [], [], 0)[0]
    os.close(reading)


def test_an_overflowing_queue_is_reported_without_another_line() -> None:
    """The reader stops, the queue overflows, and the reader starts again: written and lost lines add up."""
    reading, writing = os.pipe()
    code = """
for number in range(8_000):
    logger.info("line", number=number, filler="z" * 100)
print("logged", flush=True)
sys.stdin.readline()
"""
    with running(code, writing) as process, open(reading, "rb") as reader:
        os.close(writing)
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "logged\n"
        written = lost = 0
        while written + lost < 8_000:
            line = json.loads(reader.readline())
            written += line["event"] == "line"
            lost += line.get("lines", 0)
        assert lost > 0
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
        assert reader.read() == b""


def test_an_event_that_cannot_be_formatted_is_counted(tmp_path: Path) -> None:
    """The standard library would print a traceback for it, past the queue."""
    code = """
class Odd:
    def __repr__(self):
        raise RuntimeError("secret in an exception's text")
logger.info("odd", value=Odd())
logger.info("written")
"""
    path = tmp_path / "log"
    with open(path, "wb") as stderr, running(code, stderr) as process:
        assert process.wait(PATIENCE) == 0
    assert [line["event"] for line in lines_of(path)] == ["log.lost", "written"]


SAYING = """
import sys
named = os.environ.get("JOURNAL_STREAM") == "own"
status = os.fstat(2)
if named:
    os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
logger.debug("debug")
logger.info("info")
logger.warning("warning")
logger.error("error")
try:
    raise ValueError("two\\nlines")
except ValueError:
    logging.getLogger("library").critical("critical", exc_info=True)
settle()
"""


@pytest.mark.parametrize("stream", ["own", "1:2", "rubbish", None])
def test_lines_have_a_priority_only_for_the_journal(stream: str | None) -> None:
    """$JOURNAL_STREAM names standard error, or a descriptor of a parent process."""
    environment = {**os.environ, "JOURNAL_STREAM": stream} if stream else None
    with running(SAYING, subprocess.PIPE, env=environment) as process:
        _, err = process.communicate(timeout=PATIENCE)
    begins = [line.partition("{")[0] for line in err.splitlines()]
    assert begins == (["<6>", "<4>", "<3>", "<3>"] if stream == "own" else [""] * 4)
    events = [json.loads(line[line.index("{") :])["event"] for line in err.splitlines()]
    assert events == ["info", "warning", "error", "critical"]


def test_the_report_of_lost_lines_is_an_error_for_the_journal() -> None:
    """The thread writes the report itself, past the queue, with the journal's priority."""
    code = """
status = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
logging.getLogger().handlers[0].dropped = 5
logger.info("info")
settle()
"""
    with running(code, subprocess.PIPE) as process:
        _, err = process.communicate(timeout=PATIENCE)
    assert [line.partition("{")[0] for line in err.splitlines()] == ["<3>", "<6>"]
