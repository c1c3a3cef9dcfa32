"""Reload the keyring and the configuration of a running agent: on SIGHUP, and when one of their files was replaced.

Both are read and checked completely before they replace the old ones. If that fails, the agent logs the reason and continues
with the old state. A valid configuration is adopted even if the keyring cannot be opened, so that a grant can be revoked at any
time. A missing unseal secret is a state and not a failure, because an operator may have it.
"""

import math
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog
import trio

from keyferry.secret import SecretMemoryError

from ..audit import AuditLog
from ..config.options import Options, StartError
from ..config.settings import Settings, SettingsError
from ..health import KEYRING_STALE, MESSAGES, SEALED, UNSEAL_ABSENT
from ..keyring.document import KeyringError
from ..keyring.fdstore import KeyringPersister
from ..keyring.keyring import Keyring
from ..keyring.loader import load_keyring
from ..state import ServerState
from .file_stats import FileStats, read_settings, stat_files
from .systemd import ServiceManager

__all__ = ["Reloader", "in_thread"]

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")

FIRST_RETRY_SECONDS: Final = 5.0
MAX_RETRY_SECONDS: Final = 300.0
"""Seconds until a failed reload is retried: the first time, and at most. The cause may pass without a change of a file: a
temporary lack of descriptors, locked memory or threads."""
_RESTART_ONLY: Final = (
    "listeners",
    "gateways",
    "limits",
    "audit",
    "memory",
    "memory_backing",
    "sm2_fallback",
    "keep_keys",
    "metrics",
    "unseal_socket",
)
_EXPECTED: Final = (SettingsError, KeyringError, SecretMemoryError, StartError, OSError)
"""Exceptions of reading files. Their messages contain the reason and a remedy. Of other exceptions only the type is shown."""

T = TypeVar("T")


class Reloader:
    """Reads an agent's files again when they were replaced, and when a reload is requested. Retries a failed reload.

    `stats`: the files' status before they were first read. `current`: whether the agent's keyring is from the file with that
    status. `keeper`: stores the keyring's memory with the service manager; None if it is not stored.
    """

    def __init__(
        self,
        options: Options,
        agent: ServerState,
        audit: AuditLog,
        stats: FileStats,
        manager: ServiceManager,
        keeper: KeyringPersister | None,
        *,
        current: bool = True,
    ) -> None:
        self._options = options
        self._agent = agent
        self._audit = audit
        self._manager = manager
        self._keeper = keeper
        self._stats = self._previous = stats
        path = agent.settings.keyring
        self._loaded = (path, stats[path]) if current and path is not None and path in stats else None
        self._absence: str | None = None  # the message that was logged about an absent secret
        self._reported = self._state()
        self.requested = trio.Event()
        """Set if a reload is requested, even of unchanged files. Several requests before the reload starts cause one reload."""
        self._failure: str | None = None  # why the last reload failed; `_retry_at` is the time of the next attempt
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._retry_at = math.inf

    @property
    def files(self) -> Collection[Path]:
        """The files to watch."""
        return self._stats.keys()

    async def update(self, stats: FileStats, *, names_changed: bool = False) -> None:
        """Reload if it is requested, if files or the numbers of users changed, or if a failed reload is to be retried.

        `stats`: the files' status now. A change counts once two successive calls saw it: the file's writer has finished.
        """
        self._report()
        settled, self._previous = stats == self._previous, stats
        if self.requested.is_set() or names_changed or (settled and stats != self._stats):
            self.requested = trio.Event()
            self._failure, self._retry_seconds = None, FIRST_RETRY_SECONDS
        elif not settled or trio.current_time() < self._retry_at:
            return
        await self._reload(stats)

    def _state(self) -> tuple[str, ...]:
        return self._agent.state, *self._agent.conditions

    def _report(self) -> None:
        """Report a changed state to the service manager. The watchdog also reports it, but rarely, and it may be off."""
        if self._reported != self._state() and not self._agent.draining:
            self._reported = self._state()
            self._manager.changed(self._agent.status())

    async def unseal(self, secret: int) -> str | None:
        """Open the keyring with a secret that is read from a pipe. Returns the reason of a failure, or None on success."""
        agent, path = self._agent, self._agent.settings.keyring
        try:
            status = None if path is None else (await in_thread(stat_files, [path]))[path]
            keyring = await in_thread(load_keyring, agent.settings, self._keeper, status, secret)
        except (*_EXPECTED, RuntimeError) as error:  # RuntimeError: no thread can be started
            log.warning("unseal.failed", why=str(error))
            return str(error)
        self._adopted(keyring, path, status)
        agent.adopt(agent.settings, keyring)
        log.info("unseal.done", keys=len(keyring.keys))
        self._report()
        return None

    async def _reload(self, stats: FileStats) -> None:
        """Read the configuration and the keyring again, and adopt the valid ones. `stats`: the files' status just before."""
        self._manager.reloading()
        self._stats, failure = await self._replace(stats)
        self._previous = self._stats
        self._failure, self._retry_at = failure, math.inf
        if failure is None:
            self._agent.reload_failure = ""
        else:
            self._agent.counters.reloads_failed += 1
            self._retry_at = trio.current_time() + self._retry_seconds
            self._retry_seconds = min(2 * self._retry_seconds, MAX_RETRY_SECONDS)
        self._reported = self._state()
        self._manager.ready(self._agent.status())

    async def _replace(self, stats: FileStats) -> tuple[FileStats, str | None]:
        """Read and adopt. Returns the status of the files that were read, and the reason of a failure or None."""
        agent = self._agent
        try:
            settings, stats = await in_thread(read_settings, self._options, stats)
            settings, warnings = _retain_restart_only(settings, agent.settings)
        except Exception as error:
            return stats, self._failed(error, "Not reloaded, the old state serves")
        keyring, failure = await self._load(settings, stats)
        if failure is None or failure != self._failure:
            for what in (*warnings, *settings.warnings):
                log.warning("reload.limited", what=what)
        if keyring is not None:
            self._adopted(keyring, settings.keyring, stats.get(settings.keyring) if settings.keyring else None)
        agent.adopt(settings, agent.keyring if keyring is None else keyring)
        if failure is None:
            log.info("reload.done", keys=len(agent.keyring.keys), grants=len(settings.grants))
        return stats, failure

    async def _load(self, settings: Settings, stats: FileStats) -> tuple[Keyring | None, str | None]:
        """Load the keyring. Returns it, or None if the current one stays in use, and the reason of a failure or None."""
        agent, path = self._agent, settings.keyring
        if self._options.dev:
            return None, None
        status = stats.get(path) if path else None
        changed = self._loaded != (path, status)
        try:
            if settings.unseal_socket is not None or (
                settings.unseal and await in_thread(_is_missing, settings.unseal)
            ):
                self._note_absence(settings, changed=changed)
                return None, None
            return await in_thread(load_keyring, settings, self._keeper, status), None
        except Exception as error:
            agent.keyring_stale, agent.unseal_absent, self._absence = changed, False, None
            return None, self._failed(error, "Keyring not reloaded, the old one serves", configuration="adopted")

    def _note_absence(self, settings: Settings, *, changed: bool) -> None:
        """Note that the unseal secret is absent. Log the consequences whenever they change."""
        agent = self._agent
        agent.unseal_absent = settings.unseal_socket is None
        agent.keyring_stale = changed and not agent.keyring.is_sealed
        what = "; ".join(MESSAGES[name] for name in agent.conditions if name in (SEALED, KEYRING_STALE, UNSEAL_ABSENT))
        if what and what != self._absence:
            log.warning("unseal.absent", what=what, still_serving=agent.keyring.loaded_at)
        self._absence = what

    def _adopted(self, keyring: Keyring, path: Path | None, status: tuple[int, ...] | None) -> None:
        """Note that a keyring was loaded, and name its keys in the audit log."""
        agent = self._agent
        self._loaded = None if path is None else (path, status)
        agent.keyring_stale, agent.unseal_absent, self._absence = False, False, None
        self._audit.name_keys(keyring)

    def _failed(self, error: Exception, what: str, **more: str) -> str:
        """Return why a reload failed. Successive failures for the same reason are logged once."""
        expected = isinstance(error, _EXPECTED)
        failure = str(error) if expected else type(error).__name__
        if failure != self._failure:
            more |= {"why": str(error), "still_serving": self._agent.keyring.loaded_at}
            log.error("reload.failed", exc_info=None if expected else error, **more)
        self._agent.reload_failure = f"{what}: {failure}"
        return failure


def _is_missing(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # the loader reports the reason
        pass
    return False


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run `function` in a thread. A file system or a user look-up may hang: a cancelled call leaves the thread to itself."""
    return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True)


def _retain_restart_only(settings: Settings, old: Settings) -> tuple[Settings, list[str]]:
    """Return the new settings, except that those of `_RESTART_ONLY` stay as they are, and a warning if any of these changed.

    Raises `SettingsError` if other settings depend on a change that needs a restart.
    """
    if (settings.listeners, settings.gateways) != (old.listeners, old.gateways) and any(
        "listener" in grant.to for grant in settings.grants
    ):
        raise SettingsError(
            ["the listeners changed, and grants to listeners would apply to the old ones; restart the agent"]
        )
    if settings.unseal_socket != old.unseal_socket:
        settings = replace(settings, unseal=old.unseal)
    changed = [name for name in _RESTART_ONLY if getattr(settings, name) != getattr(old, name)]
    warnings = [f"restart the agent to change these settings: {', '.join(changed)}"] if changed else []
    return replace(settings, **{name: getattr(old, name) for name in _RESTART_ONLY}), warnings
