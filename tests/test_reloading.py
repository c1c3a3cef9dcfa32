"""The reloader, in this process: when it reads and when it retries. Time is simulated."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
import trio.testing
from support.agent import PATIENCE
from support.inside import new_agent, new_audit_log
from support.keyring import change, configuration, copied

from keyferry_agent.audit import AuditLog
from keyferry_agent.config.options import Options
from keyferry_agent.config.settings import Settings
from keyferry_agent.daemon import file_watcher, reload
from keyferry_agent.daemon.file_stats import FileStats, stat_files
from keyferry_agent.daemon.file_watcher import FileWatcher
from keyferry_agent.daemon.reload import Reloader
from keyferry_agent.daemon.systemd import ServiceManager
from keyferry_agent.keyring.loader import load_keyring
from keyferry_agent.state import ServerState


@pytest.fixture
def agent() -> ServerState:
    """An agent's state, in this process, that grants everything to this user."""
    return new_agent()


@pytest.fixture
def audit(tmp_path: Path) -> AuditLog:
    """A record of requests in a file."""
    return new_audit_log(tmp_path)


def names_of_grants(agent: ServerState) -> list[str]:
    """Return the names of the grants that an agent decides by."""
    return [grant.name for grant in agent.settings.grants]


def adoption(agent: ServerState, monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Return an event that is set when the agent has adopted new settings."""
    adopted, adopt = trio.Event(), agent.adopt

    def adopt_and_tell(*arguments: Any) -> None:
        adopt(*arguments)
        adopted.set()

    monkeypatch.setattr(agent, "adopt", adopt_and_tell)
    return adopted


async def test_failed_thread_start_does_not_end_the_watch(
    agent: ServerState, audit: AuditLog, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """The failure is logged once, and a reload requested meanwhile is done later."""
    real = trio.to_thread.run_sync
    failures = [RuntimeError("can't start new thread")] * 3

    async def run_sync(*arguments: Any, **more: Any) -> Any:
        if failures:
            await trio.lowlevel.checkpoint()
            raise failures.pop()
        return await real(*arguments, **more)

    options = Options(config=None, socket=None, keyring=None, unseal=None, dev=True)
    reloader = Reloader(options, agent, audit, {}, ServiceManager(), None)
    adopted = adoption(agent, monkeypatch)
    with structlog.testing.capture_logs() as logged:
        monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(FileWatcher(agent, audit, reloader).run)
            reloader.requested.set()
            await adopted.wait()
            nursery.cancel_scope.cancel()
    assert names_of_grants(agent) == ["dev"]
    assert [entry["event"] for entry in logged if entry["log_level"] != "info"] == ["reload.failed"]


async def test_failed_load_is_retried_without_a_change(
    agent: ServerState, audit: AuditLog, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """The cause may have passed; it is logged once, and again when it changes."""
    reasons = ["no descriptor", "no descriptor", "no descriptor", "no memory"]
    tried: list[float] = []
    real = Options.settings

    def settings(options: Options) -> Settings:
        tried.append(trio.from_thread.run_sync(trio.current_time))
        if reasons:
            raise OSError(reasons.pop(0))
        return real(options)

    monkeypatch.setattr(Options, "settings", settings)
    options = Options(config=None, socket=None, keyring=None, unseal=None, dev=True)
    reloader = Reloader(options, agent, audit, {}, ServiceManager(), None)
    adopted = adoption(agent, monkeypatch)
    with structlog.testing.capture_logs() as logged:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(FileWatcher(agent, audit, reloader).run)
            reloader.requested.set()
            await adopted.wait()
            nursery.cancel_scope.cancel()
    assert names_of_grants(agent) == ["dev"]
    failures = [entry["why"] for entry in logged if entry["event"] == "reload.failed"]
    assert failures == ["no descriptor", "no memory"]
    waited = [after - before for before, after in pairwise(tried)]
    assert all(expected <= wait < expected + 2 for expected, wait in zip((5, 10, 20, 40), waited, strict=True))


async def test_files_being_written_are_not_retried(
    agent: ServerState, audit: AuditLog, monkeypatch: pytest.MonkeyPatch, autojump_clock: object
) -> None:
    """Half of a configuration may be a valid one with fewer grants."""
    tried: list[float] = []
    path = Path("agent.toml")
    real = Options.settings

    def settings(options: Options) -> Settings:
        tried.append(trio.from_thread.run_sync(trio.current_time))
        if len(tried) == 1:
            raise OSError("broken")
        return real(options)

    def look(_paths: object) -> dict[Path, tuple[int, ...] | None]:
        now = trio.from_thread.run_sync(trio.current_time)
        return {path: (int(now * 1_000) if tried and now < tried[0] + 20 else 0,)}

    monkeypatch.setattr(Options, "settings", settings)
    monkeypatch.setattr(file_watcher, "stat_files", look)
    options = Options(config=None, socket=None, keyring=None, unseal=None, dev=True)
    reloader = Reloader(options, agent, audit, {path: (0,)}, ServiceManager(), None)
    adopted = adoption(agent, monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(FileWatcher(agent, audit, reloader).run)
        reloader.requested.set()
        await adopted.wait()
        nursery.cancel_scope.cancel()
    assert names_of_grants(agent) == ["dev"]
    assert tried[1] - tried[0] >= 20


# Files that change between two looks: in real time, with files and a keyring of the test's own


@pytest.mark.parametrize("read", ["settings", "load_keyring"])
async def test_a_file_that_changes_while_it_is_read_is_read_again(
    audit: AuditLog, keyring: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    """A grant or a key that is removed during a read is gone after the next check."""
    config = keyring.parent / "agent.toml"
    config.write_text(configuration(keyring))
    options = Options(config=config, socket=None, keyring=None, unseal=None, dev=False)
    settings = options.settings()
    agent = ServerState(settings, load_keyring(settings))
    seen = stat_files([config, keyring])
    owner = Options if read == "settings" else reload
    real, is_first = getattr(owner, read), iter([True])

    def read_and_change(*arguments: Any) -> Any:
        found = real(*arguments)
        if next(is_first, False):
            if read == "settings":
                copied(config, configuration(keyring, actions="kms:Decrypt").encode())
            else:
                change(keyring, "disable", "alias/a")
        return found

    monkeypatch.setattr(owner, read, read_and_change)
    monkeypatch.setattr(file_watcher, "CHECK_SECONDS", 0.01)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            reloader = Reloader(options, agent, audit, seen, ServiceManager(), None)
            reloader.requested.set()
            nursery.start_soon(FileWatcher(agent, audit, reloader).run)
            for generation in (1, 2):
                adopted = adoption(agent, monkeypatch)
                await adopted.wait()
                assert agent.generation == generation
            nursery.cancel_scope.cancel()
    assert agent.settings.grants[0].actions == (("kms:Decrypt",) if read == "settings" else ("kms:*",))
    assert agent.keyring.by_alias["alias/a"].enabled() == (read == "settings")


async def test_files_that_do_not_change_are_read_once(
    audit: AuditLog, keyring: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated checks of the reloader do not read unchanged files."""
    config = keyring.parent / "agent.toml"
    config.write_text(configuration(keyring))
    options = Options(config=config, socket=None, keyring=None, unseal=None, dev=False)
    settings = options.settings()
    agent = ServerState(settings, load_keyring(settings))
    looks, look, seen_often = 0, stat_files, trio.Event()

    def counted(paths: Sequence[Path]) -> FileStats:
        nonlocal looks
        looks += 1
        if looks == 20:
            trio.from_thread.run_sync(seen_often.set)
        return look(paths)

    reloader = Reloader(options, agent, audit, look([config, keyring]), ServiceManager(), None)
    monkeypatch.setattr(file_watcher, "stat_files", counted)
    monkeypatch.setattr(file_watcher, "CHECK_SECONDS", 0.001)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(FileWatcher(agent, audit, reloader).run)
            await seen_often.wait()
            nursery.cancel_scope.cancel()
    assert agent.generation == 0
