"""Another keyring, another configuration, while the agent serves: on SIGHUP, and when one of their files was replaced.

Both are read anew beside the old ones, checked whole, and swapped in one step. Whatever is wrong is reported, and the old ones
go on serving. Files are looked at twice a second, by name: so a rename, a copy, and the way in which Kubernetes swaps a
mounted Secret (a symbolic link to another directory) are all the same, on every file system.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import structlog
import trio

from keyferry.secret import SecretMemoryError

from . import grant_files
from .agent import Agent
from .audit import AuditLog
from .host import Host
from .keyring.document import KeyringError
from .keyring.kept import Keeper
from .options import Options, StartError
from .settings import Settings, SettingsError, look_up

__all__ = ["Looks", "Reloader", "look"]

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")

_LOOK_EVERY: Final = 0.5
"""Seconds. A file is read when two looks in a row saw the same change: it was not being written any more."""
_NAMES_EVERY: Final = 4
"""Looks at files after which users and groups are looked up once. They are believed when two look-ups in a row agree."""
_RETRY_FIRST: Final = 5.0
_RETRY_LAST: Final = 300.0
"""Seconds after which what could not be loaded is tried again, the first time and at most: the reason may have passed (no
descriptor, no locked memory, no thread for the moment), although no file changes any more."""
_FIXED: Final = ("listeners", "limits", "audit", "memory", "memory_backing", "sm2_fallback", "keep_keys", "metrics")

T = TypeVar("T")
Looks: TypeAlias = Mapping[Path, tuple[int, ...] | None]
"""How files looked: which file each name led to, its size, and when it was last changed; None for one that is not there.

A folder looks as its files do."""


def look(paths: Sequence[Path]) -> Looks:
    """Look at files."""
    return {path: _look(path) for path in paths}


def _look(path: Path) -> tuple[int, ...] | None:
    status = _status(path)
    if status is None or not os.path.isdir(path):
        return status
    try:
        files = [_status(file) for file in grant_files.find(path)]
    except OSError:
        return status
    # Also a file that was changed in place, or behind a symbolic link: the folder itself looks the same.
    return (*status, *(number for each in files if each is not None for number in each))


def _status(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns


class Reloader:
    """Keeps an agent as its files say. `seen`: how they looked before they were first read."""

    def __init__(
        self, options: Options, agent: Agent, audit: AuditLog, seen: Looks, host: Host, keeper: Keeper | None
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
        self._asked = trio.Event()
        self._failure: str | None = None  # why the last reload failed, and when it is tried again
        self._retry_after = _RETRY_FIRST
        self._retry_at = math.inf

    def ask(self) -> None:
        """Have everything read again, whether it looks changed or not. Asked again before that has begun, it is done once."""
        self._asked.set()

    async def run(self) -> None:
        """Reload when it is asked for, and when a file was replaced; for ever."""
        before = self._seen
        while True:
            with trio.move_on_after(_LOOK_EVERY):
                await self._asked.wait()
            try:
                now, moved, renamed = await _in_thread(self._look_around)
            except RuntimeError as error:  # no thread is to be had: the host, or the pod, is full of processes
                await self._wait_for_threads(error)
                continue
            self._threads = True
            if self._asked.is_set() or moved:
                self._reopen_record()
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
        if self._threads:  # said once, not twice a second
            log.error("reload.failed", why=str(error), still_serving=self._agent.keyring.loaded_at)
        self._threads = False
        await trio.sleep(_LOOK_EVERY)

    def _look_around(self) -> tuple[Looks, bool, bool]:
        return look(list(self._seen)), self._audit.moved(), self._renamed()

    def _renamed(self) -> bool:
        """Whether users or groups that grants name have other numbers than they had: one appeared, or is gone.

        Else a user whose name was removed would leave the grant to the next who is given the number.
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
            if not self._record_lost:  # said once, not twice a second
                log.error("audit.failed", error=error.strerror)
            self._record_lost = True
        else:
            self._record_lost = False
            log.info("audit.reopened")

    async def _reload(self, looks: Looks) -> None:
        """Read both again, and swap both at once. `looks`: how the files looked just before."""
        self._host.reloading()
        self._seen, failure = await self._replace(looks)
        self._failure, self._retry_at = failure, math.inf
        if failure is not None:
            self._retry_at = trio.current_time() + self._retry_after
            self._retry_after = min(2 * self._retry_after, _RETRY_LAST)
        self._host.ready(self._agent.status() if failure is None else f"Not reloaded, the old state serves: {failure}")

    async def _replace(self, looks: Looks) -> tuple[Looks, str | None]:
        """Read and swap; give how the files looked that were read, and what was wrong with them."""
        options, agent = self._options, self._agent
        try:
            settings = await _in_thread(options.settings)
            files = options.files(settings)
            # What was looked at before it was read stays so: what changes meanwhile is noticed.
            looks = {**await _in_thread(look, files), **{path: looks[path] for path in files if path in looks}}
            if settings.grants_folder not in (None, *self._seen):  # it was read before it was looked at
                settings = await _in_thread(options.settings)
            settings, limited = _keep_fixed(settings, agent.settings)
            looked = looks.get(settings.keyring) if settings.keyring else None
            keyring = (
                agent.keyring if options.dev else await _in_thread(options.load_keyring, settings, self._keeper, looked)
            )
        except (SettingsError, KeyringError, SecretMemoryError, StartError, OSError) as error:
            if str(error) != self._failure:  # said once, however often it is tried
                log.error("reload.failed", why=str(error), still_serving=agent.keyring.loaded_at)
            return looks, str(error)
        except Exception as error:
            if type(error).__name__ != self._failure:
                log.error("reload.failed", why=str(error), still_serving=agent.keyring.loaded_at, exc_info=error)
            return looks, type(error).__name__
        for what in (*limited, *settings.warnings):
            log.warning("reload.limited", what=what)
        self._audit.name_keys(keyring)
        agent.adopt(settings, keyring)
        log.info("reload.done", keys=len(keyring.keys), grants=len(settings.grants))
        return looks, None


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    # Which no SIGTERM and no request waits for: a file system may hang, and so may looking up a user.
    return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True)


def _keep_fixed(settings: Settings, old: Settings) -> tuple[Settings, list[str]]:
    """New settings, but for those that only a restart can change, and a warning where there are such.

    Raises `SettingsError` where the rest depends on them.
    """
    if settings.listeners != old.listeners and any("listener" in grant.to for grant in settings.grants):
        raise SettingsError(
            ["the listeners changed, which takes a restart; until then, grants to listeners would be to the old ones"]
        )
    changed = [name for name in _FIXED if getattr(settings, name) != getattr(old, name)]
    warnings = [f"these change with a restart only: {', '.join(changed)}"] if changed else []
    return replace(settings, **{name: getattr(old, name) for name in _FIXED}), warnings
