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


class Death:
    """Comes at one point."""

    def __init__(self, point: str, count: int) -> None:
        self._point = point
        self._left = count

    def at(self, point: str) -> None:
        """Be there."""
        if point == self._point:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


def main(url: str, socket: str, point: str, count: str) -> None:
    """Rewrap, with death on the way."""
    death = Death(point, int(count))
    store._PAGE_RECORDS = PAGE  # type: ignore[misc]
    asked = Client.pipeline

    def pipeline(kms: Client, wanted: Any) -> list[Any]:
        requests = list(wanted)
        answers = asked(kms, requests)
        if requests and isinstance(requests[0], operations.ReEncrypt):
            death.at("checked" if requests[0].dry_run else "re-encrypted")
        return answers

    Client.pipeline = pipeline  # type: ignore[assignment,method-assign]
    with Store(url) as records, Client(socket) as kms:
        dialect = records._engine.dialect

        written: list[bool] = []

        def updated(*arguments: Any) -> None:
            if "UPDATE" in arguments[2]:
                written.append(True)
                death.at("replacing")

        event.listen(records._engine, "after_cursor_execute", updated)
        committing: Callable[[Any], None] = dialect.do_commit

        def commit(connection: Any) -> None:
            if written:
                death.at("committing")
            committing(connection)
            if written:
                death.at("committed")
            written.clear()

        dialect.do_commit = commit  # type: ignore[assignment,method-assign]
        rewrap(records, kms)


if __name__ == "__main__":
    main(*sys.argv[1:])
