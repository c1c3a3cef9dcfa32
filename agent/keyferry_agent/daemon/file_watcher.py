"""Checks twice a second whether a file of the running agent was replaced: configuration, keyring, audit log or socket.

The agent stats files by name. This detects a rename, a copy, and Kubernetes's swap of a mounted Secret (a symbolic link to
another directory), on every file system.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import structlog
import trio

from ..audit import AuditLog
from ..config.settings import look_up
from ..server.unix_sockets import ListeningSocket
from ..state import ServerState
from .file_stats import FileStats, stat_files
from .reload import Reloader, in_thread

__all__ = ["FileWatcher"]

CHECK_SECONDS: Final = 0.5
"""Seconds between two checks."""
CHECKS_PER_LOOKUP: Final = 4
"""Checks of files for each look-up of users and groups."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class _Check(NamedTuple):
    """The results of one check."""

    stats: FileStats
    names_changed: bool
    audit_log_moved: bool
    lost_sockets: list[ListeningSocket]


class FileWatcher:
    """Reloads, rotates the audit log and reports lost sockets, when their files were replaced."""

    def __init__(
        self, agent: ServerState, audit: AuditLog, reloader: Reloader, sockets: Sequence[ListeningSocket] = ()
    ) -> None:
        self._agent = agent
        self._audit = audit
        self._reloader = reloader
        self._sockets = list(sockets)
        self._has_threads = True
        self._checks = 0
        self._numbers: Mapping[tuple[str, str], int] | None = None

    async def run(self) -> None:
        """Check the files until cancelled. A requested reload does not wait for the next check."""
        while True:
            with trio.move_on_after(CHECK_SECONDS):
                await self._reloader.requested.wait()
            try:
                check = await in_thread(self._check, self._reloader.files)
            except RuntimeError as error:  # no thread can be started: the host or pod is at its limit of processes
                if self._has_threads:  # log once, not twice a second
                    log.error("reload.failed", why=str(error), still_serving=self._agent.keyring.loaded_at)
                self._has_threads = False
                await trio.sleep(CHECK_SECONDS)
                continue
            self._has_threads = True
            self._audit.maintain(reopen=check.audit_log_moved or self._reloader.requested.is_set())
            self._report(check.lost_sockets)
            await self._reloader.update(check.stats, names_changed=check.names_changed)

    def _check(self, files: Collection[Path]) -> _Check:
        lost = [listening for listening in self._sockets if listening.was_replaced()]
        return _Check(stat_files(files), self._renumbered(), self._audit.moved(), lost)

    def _renumbered(self) -> bool:
        """Return whether users or groups that grants name have other numbers now: one was added or removed.

        Two successive look-ups have to agree. Without this check, a removed user's number would keep its grant for the next
        user that receives the number.
        """
        names = self._agent.settings.names
        self._checks += 1
        if not names or self._checks % CHECKS_PER_LOOKUP:
            return False
        before, self._numbers = self._numbers, look_up(names)
        return self._numbers == before and self._numbers != names

    def _report(self, lost: Collection[ListeningSocket]) -> None:
        """Log an error once for each socket whose file was removed or replaced: new clients cannot reach this agent then."""
        for listening in lost:
            self._sockets.remove(listening)
            owner = "the agent" if listening.is_own else "its socket unit"
            log.error(
                "socket.lost", path=str(listening.path), what=f"its file was removed or replaced; restart {owner}"
            )
