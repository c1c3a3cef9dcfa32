"""`python crashing_rewrap.py URL SOCKET POINT COUNT`: a rewrap that SIGKILL ends at one of its points, the COUNTth time."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from sqlalchemy import event

from keyferry import Client, operations
from keyferry.store import Store, rewrap, store

POINTS = ("re-encrypted", "checked", "replacing", "committing", "committed")
PAGE = 20


class CrashPoint:
    """Kills this process at one point, the COUNTth time."""

    def __init__(self, point: str, count: int) -> None:
        self._point = point
        self._left = count

    def reach(self, point: str) -> None:
        """Kill this process if the point is the chosen one."""
        if point == self._point:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


def main(url: str, socket: str, point: str, count: str) -> None:
    """Rewrap, and die at a point."""
    crash = CrashPoint(point, int(count))
    store._PAGE_RECORDS = PAGE  # type: ignore[misc]
    asked = Client.pipeline

    def pipeline(kms: Client, wanted: Any) -> list[Any]:
        requests = list(wanted)
        answers = asked(kms, requests)
        if requests and isinstance(requests[0], operations.ReEncrypt):
            crash.reach("checked" if requests[0].dry_run else "re-encrypted")
        return answers

    Client.pipeline = pipeline  # type: ignore[assignment,method-assign]
    with Store(url) as records, Client(socket) as kms:
        dialect = records._engine.dialect

        written: list[bool] = []

        def updated(*arguments: Any) -> None:
            if "UPDATE" in arguments[2]:
                written.append(True)
                crash.reach("replacing")

        event.listen(records._engine, "after_cursor_execute", updated)
        committing: Callable[[Any], None] = dialect.do_commit

        def commit(connection: Any) -> None:
            if written:
                crash.reach("committing")
            committing(connection)
            if written:
                crash.reach("committed")
            written.clear()

        dialect.do_commit = commit  # type: ignore[assignment,method-assign]
        rewrap(records, kms)


if __name__ == "__main__":
    main(*sys.argv[1:])
