"""Reload the keyring and the configuration of a running agent: on SIGHUP, and when one of their files was replaced.

Both are read and checked completely before they replace the old ones. If that fails, the agent logs the reason and continues
with the old state. A valid configuration is adopted even if the keyring cannot be opened, so that a grant can be revoked at any
time. A missing unseal secret is a state and not a failure, because an operator may have it.

The agent stats the files by name, twice a second. This detects a rename, a copy, and Kubernetes's swap of a mounted Secret (a
symbolic link to another directory), on every file system.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog
import trio

from keyferry.secret import SecretMemoryError

from ..audit import AuditLog
from ..config.options import Options, StartError
from ..config.settings import Settings, SettingsError, look_up
from ..health import KEYRING_STALE, MESSAGES, SEALED, UNSEAL_ABSENT
from ..keyring.document import KeyringError
from ..keyring.fdstore import KeyringPersister
from ..keyring.keyring import Keyring
from ..keyring.loader import load_keyring
from ..state import ServerState
from .file_watcher import FileStats, stat_files
from .systemd import ServiceManager

__all__ = ["Reloader"]

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")

_LOOK_EVERY: Final = 0.5
"""Seconds between two checks. A file is read once two successive checks saw the same change: its writer has finished."""
_NAMES_EVERY: Final = 4
"""Checks of files per look-up of users and groups. A change counts once two successive look-ups agree."""
_RETRY_FIRST: Final = 5.0
_RETRY_LAST: Final = 300.0
"""Seconds until a failed reload is retried: the first time, and at most. The cause may pass without a change of a file: a
temporary lack of descriptors, locked memory or threads."""
_FIXED: Final = (
    "listeners",
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
    """Keeps an agent up to date with its files.

    `seen`: the files' status before they were first read. `current`: whether the agent's keyring is from the file with that
    status. `keeper`: stores the keyring's memory with the service manager; None if it is not stored.
    """

    def __init__(
        self,
        options: Options,
        agent: ServerState,
        audit: AuditLog,
        seen: FileStats,
        host: ServiceManager,
        keeper: KeyringPersister | None,
        *,
        current: bool = True,
    ) -> None:
        self._options = options
        self._agent = agent
        self._audit = audit
        self._host = host
        self._keeper = keeper
        self._record_lost = False
        self._threads = True
        self._looks = 0
        self._numbers: Mapping[tuple[str, str], int] | None = None
        self._seen = seen
        path = agent.settings.keyring
        self._loaded = (path, seen[path]) if current and path is not None and path in seen else None
        self._absence: str | None = None  # the message that was logged about an absent secret
        self._told = self._state()
        self._asked = trio.Event()
        self._failure: str | None = None  # why the last reload failed; `_retry_at` is the time of the next attempt
        self._retry_after = _RETRY_FIRST
        self._retry_at = math.inf

    def ask(self) -> None:
        """Request a reload, even of unchanged files. Several requests before the reload starts cause one reload."""
        self._asked.set()

    async def run(self) -> None:
        """Reload on request, and when a file was replaced. Runs until it is cancelled."""
        before = self._seen
        while True:
            with trio.move_on_after(_LOOK_EVERY):
                await self._asked.wait()
            try:
                now, moved, renamed = await _in_thread(self._look_around)
            except RuntimeError as error:  # no thread can be started: the host or pod is at its limit of processes
                await self._wait_for_threads(error)
                continue
            self._threads = True
            if self._asked.is_set() or moved:
                self._reopen_record()
            self._resume_record()
            self._tell()
            if self._asked.is_set() or renamed or (now != self._seen and now == before):
                self._asked = trio.Event()
                self._failure, self._retry_after = None, _RETRY_FIRST
                await self._reload(now)
                now = self._seen
            elif now == before and trio.current_time() >= self._retry_at:
                await self._reload(now)
                now = self._seen
            before = now

    async def _wait_for_threads(self, error: RuntimeError) -> None:
        if self._threads:  # log once, not twice a second
            log.error("reload.failed", why=str(error), still_serving=self._agent.keyring.loaded_at)
        self._threads = False
        await trio.sleep(_LOOK_EVERY)

    def _look_around(self) -> tuple[FileStats, bool, bool]:
        return stat_files(list(self._seen)), self._audit.moved(), self._renamed()

    def _renamed(self) -> bool:
        """Return whether users or groups that grants name have other numbers now: one was added or removed.

        Without this check, a removed user's number would keep its grant for the next user that receives the number.
        """
        names = self._agent.settings.names
        self._looks += 1
        if not names or self._looks % _NAMES_EVERY:
            return False
        before, self._numbers = self._numbers, look_up(names)
        return self._numbers == before and self._numbers != names

    def _reopen_record(self) -> None:
        try:
            self._audit.reopen()
        except OSError as error:
            if not self._record_lost:  # log once, not twice a second
                log.error("audit.failed", error=error.strerror)
            self._record_lost = True
        else:
            self._record_lost = False
            log.info("audit.reopened")

    def _resume_record(self) -> None:
        """Retry writing to the audit log now, so that the agent becomes ready without a further request."""
        gap = self._audit.gap
        if (gap or self._audit.failing) and self._audit.resume():
            log.info("audit.resumed", unrecorded=gap)

    def _state(self) -> tuple[str, ...]:
        return self._agent.state, *self._agent.conditions

    def _tell(self) -> None:
        """Report a changed state to the service manager. The watchdog also reports it, but rarely, and it may be off."""
        if self._told != self._state() and not self._agent.draining:
            self._told = self._state()
            self._host.changed(self._agent.status())

    async def unseal(self, secret: int) -> str | None:
        """Open the keyring with a secret that is read from a pipe. Returns the reason of a failure, or None on success."""
        agent, path = self._agent, self._agent.settings.keyring
        try:
            looked = None if path is None else (await _in_thread(stat_files, [path]))[path]
            keyring = await _in_thread(load_keyring, agent.settings, self._keeper, looked, secret)
        except (*_EXPECTED, RuntimeError) as error:  # RuntimeError: no thread can be started
            log.warning("unseal.failed", why=str(error))
            return str(error)
        self._take_up(keyring, path, looked)
        agent.adopt(agent.settings, keyring)
        log.info("unseal.done", keys=len(keyring.keys))
        self._tell()
        return None

    async def _reload(self, looks: FileStats) -> None:
        """Read the configuration and the keyring again, and adopt the valid ones. `looks`: the files' status just before."""
        self._host.reloading()
        self._seen, failure = await self._replace(looks)
        self._failure, self._retry_at = failure, math.inf
        if failure is None:
            self._agent.reload_failure = ""
        else:
            self._agent.counters.reloads_failed += 1
            self._retry_at = trio.current_time() + self._retry_after
            self._retry_after = min(2 * self._retry_after, _RETRY_LAST)
        self._told = self._state()
        self._host.ready(self._agent.status())

    async def _replace(self, looks: FileStats) -> tuple[FileStats, str | None]:
        """Read and adopt. Returns the status of the files that were read, and the reason of a failure or None."""
        options, agent = self._options, self._agent
        try:
            settings = await _in_thread(options.settings)
            files = options.files(settings)
            # Keep each status that is older than the reading, so that a change in between is detected.
            looks = {**await _in_thread(stat_files, files), **{path: looks[path] for path in files if path in looks}}
            if settings.grants_folder not in (None, *self._seen):  # the folder was read before its stat
                settings = await _in_thread(options.settings)
            settings, limited = _keep_fixed(settings, agent.settings)
        except Exception as error:
            return looks, self._failed(error, "Not reloaded, the old state serves")
        keyring, failure = await self._load(settings, looks)
        if failure is None or failure != self._failure:
            for what in (*limited, *settings.warnings):
                log.warning("reload.limited", what=what)
        if keyring is not None:
            self._take_up(keyring, settings.keyring, looks.get(settings.keyring) if settings.keyring else None)
        agent.adopt(settings, agent.keyring if keyring is None else keyring)
        if failure is None:
            log.info("reload.done", keys=len(agent.keyring.keys), grants=len(settings.grants))
        return looks, failure

    async def _load(self, settings: Settings, looks: FileStats) -> tuple[Keyring | None, str | None]:
        """Load the keyring. Returns it, or None if the current one stays in use, and the reason of a failure or None."""
        agent, path = self._agent, settings.keyring
        if self._options.dev:
            return None, None
        looked = looks.get(path) if path else None
        changed = self._loaded != (path, looked)
        try:
            if settings.unseal_socket is not None or (
                settings.unseal and await _in_thread(_is_missing, settings.unseal)
            ):
                self._note_absence(settings, changed=changed)
                return None, None
            return await _in_thread(load_keyring, settings, self._keeper, looked), None
        except Exception as error:
            agent.keyring_stale, agent.unseal_absent, self._absence = changed, False, None
            return None, self._failed(error, "Keyring not reloaded, the old one serves", configuration="taken up")

    def _note_absence(self, settings: Settings, *, changed: bool) -> None:
        """Note that the unseal secret is absent. Log the consequences whenever they change."""
        agent = self._agent
        agent.unseal_absent = settings.unseal_socket is None
        agent.keyring_stale = changed and not agent.keyring.is_sealed
        what = "; ".join(MESSAGES[name] for name in agent.conditions if name in (SEALED, KEYRING_STALE, UNSEAL_ABSENT))
        if what and what != self._absence:
            log.warning("unseal.absent", what=what, still_serving=agent.keyring.loaded_at)
        self._absence = what

    def _take_up(self, keyring: Keyring, path: Path | None, looked: tuple[int, ...] | None) -> None:
        """Note that a keyring was loaded, and name its keys in the audit log."""
        agent = self._agent
        self._loaded = None if path is None else (path, looked)
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


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    # In a thread that can be abandoned: a file system or a user look-up may hang, and must delay neither SIGTERM nor requests.
    return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True)


def _keep_fixed(settings: Settings, old: Settings) -> tuple[Settings, list[str]]:
    """Return the new settings, except that those of `_FIXED` stay as they are, and a warning if any of these changed.

    Raises `SettingsError` if other settings depend on a change that needs a restart.
    """
    if settings.listeners != old.listeners and any("listener" in grant.to for grant in settings.grants):
        raise SettingsError(
            ["the listeners changed, which takes a restart; until then, grants to listeners would be to the old ones"]
        )
    if settings.unseal_socket != old.unseal_socket:
        settings = replace(settings, unseal=old.unseal)
    changed = [name for name in _FIXED if getattr(settings, name) != getattr(old, name)]
    warnings = [f"these change with a restart only: {', '.join(changed)}"] if changed else []
    return replace(settings, **{name: getattr(old, name) for name in _FIXED}), warnings
