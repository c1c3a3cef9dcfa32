"""The structured log on standard error: JSON lines, or, to a terminal, lines for people. Also for what libraries say.

Lines are written by a thread: whoever reads standard error may stop, and no request waits for that.
"""

import logging
import logging.handlers
import os
import queue
import sys
import time
from typing import Any, Final

import structlog

__all__ = ["configure"]

_MOST_WAITING: Final = 4_096
"""Lines that may wait to be written, some MiB at most; what comes then is counted, and dropped."""
_LAST_WORDS: Final = 1.0
"""Seconds that the end of the process waits for its last lines to be written."""


class _Queue(logging.handlers.QueueHandler):
    """Puts lines into a queue, and never waits."""

    queue: "queue.Queue[logging.LogRecord]"
    lost = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.lost += 1
            return
        if self.lost:
            lost, self.lost = self.lost, 0
            structlog.get_logger("keyferry_agent").error("log.lost", lines=lost)

    def flush(self) -> None:  # called when the process ends
        deadline = time.monotonic() + _LAST_WORDS
        with self.queue.all_tasks_done:
            while self.queue.unfinished_tasks and (left := deadline - time.monotonic()) > 0:
                self.queue.all_tasks_done.wait(left)


class _Writer(logging.handlers.QueueListener):
    """Writes lines to standard error. No handler of logging, no buffer of Python: the end would wait for their locks."""

    def handle(self, record: logging.LogRecord) -> None:
        rest = f"{record.getMessage()}\n".encode(errors="backslashreplace")
        while rest:
            rest = rest[os.write(sys.stderr.fileno(), rest) :]


def configure() -> None:
    """Send structlog's events and the standard library's records down one road."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # Exceptions as text, without local variables: those may hold what must not be written down.
        structlog.processors.format_exc_info,
    ]
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=True) if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    waiting = _Queue(queue.Queue(_MOST_WAITING))
    waiting.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    _Writer(waiting.queue).start()
    root = logging.getLogger()
    root.handlers[:] = [waiting]
    root.setLevel(logging.INFO)
