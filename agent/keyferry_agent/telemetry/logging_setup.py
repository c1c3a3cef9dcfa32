"""The structured log on standard error: JSON lines, or readable lines on a terminal. Libraries log to it, too.

A thread writes the lines, so that requests do not wait for the reader of standard error. The thread survives every write
error. It drops the lines that it cannot write, and reports their number (`log.lost`) as soon as it can write again.

Where systemd-journald reads standard error, each line begins with its priority, as in sd-daemon(3). journald removes it.
"""

import errno
import logging
import logging.handlers
import os
import queue
import select
import stat
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Final

import structlog

__all__ = ["configure", "priority"]

MAX_WAITING: Final = 4_096
"""Lines that may wait to be written, some MiB at most. The queue drops later lines and counts them."""
FLUSH_SECONDS: Final = 1.0
"""The end of the process waits at most this long for the last lines to be written."""
REPORT_SECONDS: Final = 1.0
"""The thread tries this often to report lost lines when the agent logs nothing."""
POLL_MILLISECONDS: Final = 1_000
RETRY_SECONDS: Final = 0.05
"""Pause after a descriptor that poll(2) called writable refused a write all the same."""
PRIORITIES: Final = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"), (logging.NOTSET, "<7>"))
"""The lowest level of logging for each of syslog's priorities: error, warning, informational, debug."""


def priority(level: int) -> str:
    """Return the prefix of a line of this level: a priority if journald reads standard error, else an empty string."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # closed, replaced by an object without a descriptor, or None
        return ""
    # A process inherits the variable, but may have another standard error: systemd.exec(5) requires this comparison.
    if os.environ.get("JOURNAL_STREAM") != f"{status.st_dev}:{status.st_ino}":
        return ""
    return next(text for min_level, text in PRIORITIES if level >= min_level)


class _Queue(logging.handlers.QueueHandler):
    """Puts lines into a queue, and never blocks."""

    queue: "queue.Queue[logging.LogRecord]"
    dropped = 0
    """Lines that never reached the queue. Only grows; the handler's lock protects it."""

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Count a line that cannot be formatted. The base class would print a traceback to standard error, and block."""
        del record
        self.dropped += 1

    def flush(self) -> None:
        """Wait for the queue to empty, but not for long; logging calls it when the process ends."""
        deadline = time.monotonic() + FLUSH_SECONDS
        with self.queue.all_tasks_done:
            while self.queue.unfinished_tasks and (remaining := deadline - time.monotonic()) > 0:
                self.queue.all_tasks_done.wait(remaining)


class _StandardError:
    """Writes whole lines to standard error.

    It uses neither Python's buffer nor a handler of logging: the end of the process would wait for their locks.
    """

    def __init__(self) -> None:
        self._half = False
        """Whether the last line in the file may lack its end. The next line begins with a newline then."""
        self._failed = False

    def error(self, line: str) -> None:
        """Write one line of level ERROR, as `write` does. structlog calls a method of this name."""
        self.write(line, logging.ERROR)

    def write(self, line: str, level: int) -> None:
        """Write one line. Raises OSError, or ValueError if the process has no standard error. Blocks while it is full."""
        descriptor = sys.stderr.fileno()
        line = priority(level) + line
        if self._failed:
            self._move_to_end(descriptor)
        data, written_bytes = f"{self._half * chr(10)}{line}\n".encode(errors="backslashreplace"), 0
        try:
            while written_bytes < len(data):
                written_bytes += _write(descriptor, data[written_bytes:])
        except OSError:
            self._failed = True
            if written_bytes and not _take_back(descriptor, written_bytes):
                self._half = True
            raise
        self._failed = self._half = False

    def _move_to_end(self, descriptor: int) -> None:
        """Move to the end of a file that was emptied meanwhile. Without O_APPEND, the offset is past the new end."""
        with suppress(OSError):  # not a regular file
            size = os.fstat(descriptor).st_size
            if os.lseek(descriptor, 0, os.SEEK_CUR) > size:
                os.lseek(descriptor, 0, os.SEEK_END)
                self._half = self._half and size > 0


def _write(descriptor: int, data: bytes) -> int:
    """Write at least one byte. Blocks while a non-blocking descriptor is full. Raises OSError."""
    while True:
        try:
            written_bytes = os.write(descriptor, data)
        except BlockingIOError:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            if poll.poll(POLL_MILLISECONDS):
                time.sleep(RETRY_SECONDS)
            continue
        if not written_bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return written_bytes


def _take_back(descriptor: int, written_bytes: int) -> bool:
    """Remove half a line from the end of a file. Returns False if that is impossible, as in a pipe."""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or os.lseek(descriptor, 0, os.SEEK_CUR) != status.st_size:
            return False  # another process has appended to the file
        os.ftruncate(descriptor, status.st_size - written_bytes)
        os.lseek(descriptor, status.st_size - written_bytes, os.SEEK_SET)
    except OSError:
        return False
    return True


class _Writer:
    """The thread that takes lines from the queue and writes them."""

    def __init__(self, log_queue: _Queue, processors: list[Any]) -> None:
        self._waiting = log_queue
        self._output = _StandardError()
        self._log = structlog.wrap_logger(self._output, processors=processors, wrapper_class=structlog.BoundLogger)
        self._unwritten = 0
        self._reported = 0
        self._report_at = 0.0
        # A daemon thread, so that the process can end while standard error blocks.
        threading.Thread(target=self._work, name="keyferry-log", daemon=True).start()

    def _work(self) -> None:
        failed = False
        while True:
            try:
                record = self._waiting.queue.get(timeout=REPORT_SECONDS)
            except queue.Empty:
                record = None
            try:
                self._report(now=failed or record is None or self._waiting.queue.empty())
                if record is not None:
                    self._output.write(record.getMessage(), record.levelno)
                failed = False
            except Exception:
                # The thread survives every exception: without it, the agent could not log.
                failed = True
                self._unwritten += record is not None
            if record is not None:
                del record
                self._waiting.queue.task_done()

    def _report(self, *, now: bool) -> None:
        """Write the number of lost lines, at most once a second while the log is busy. Raises OSError or ValueError."""
        lost_lines = self._waiting.dropped + self._unwritten - self._reported
        if lost_lines and (now or time.monotonic() >= self._report_at):
            self._log.error("log.lost", lines=lost_lines)
            self._reported += lost_lines
            self._report_at = time.monotonic() + REPORT_SECONDS


def configure() -> None:
    """Send structlog's events and the standard library's records to one queue."""
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # Exceptions as text, without local variables, because these may hold secrets.
        structlog.processors.format_exc_info,
    ]
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=True) if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*processors, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    log_queue = _Queue(queue.Queue(MAX_WAITING))
    log_queue.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=processors,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    _Writer(log_queue, [*processors, renderer])
    root = logging.getLogger()
    root.handlers[:] = [log_queue]
    root.setLevel(logging.INFO)
