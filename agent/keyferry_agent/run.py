"""The life of the daemon, from its settings to its last answer: harden, check, load, listen, serve, drain."""

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
import trio

from keyferry import libcrypto
from keyferry.secret import SecretMemoryError

from . import __version__, listening, startup
from .agent import Agent, locked_memory_needed
from .audit import AuditLog
from .crypto import selftest
from .keyring.document import KeyringError
from .options import Options, StartError
from .reloading import Reloader, look
from .serving import Server
from .settings import Settings, SettingsError

__all__ = ["daemon"]

_LOOK_EVERY: Final = 1.0
"""Seconds between two looks at the socket files."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


def daemon(options: Options) -> None:
    """Run until SIGTERM or SIGINT. Raises `StartError`."""
    failures = startup.harden()
    if not startup.clears_freed_memory():
        failures.append("freed memory is not overwritten, which takes glibc: libraries may leave copies of keys there")
    for failure in failures:
        log.warning("startup.not_hardened", what=failure)
    try:
        seen = look(options.files(Settings()))
        settings = options.settings()
        seen = {**look(options.files(settings)), **seen}  # before anything is read: what changes meanwhile is noticed
        agent = _agent(options, settings)
        unavailable = selftest.run(agent.scratch, sm2_fallback=settings.sm2_fallback == "gmssl")
        audit = AuditLog(settings.audit)
    except (SettingsError, KeyringError, selftest.SelfTestError, libcrypto.LibcryptoError) as error:
        raise StartError(str(error)) from None
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from None
    for what in (*settings.warnings, *unavailable):
        log.warning("startup.limited", what=what)
    if agent.memory_protection == "none":
        log.warning("startup.memory_unprotected", what="keys are in ordinary memory, and can reach swap and core dumps")
    if options.dev:
        log.warning(
            "startup.development",
            what="a keyring that lives only in memory; everything it encrypts is lost when this agent stops",
            granted_to_uid=os.geteuid(),
        )
    elif not settings.grants:
        log.warning("startup.no_grants", what="there is no grant in the configuration: everybody is refused")
    gc.freeze()  # what lives as long as the agent is not looked through again: that is a pause, with 10,000 keys
    trio.run(_serve, agent, audit, Reloader(options, agent, audit, seen), strict_exception_groups=True)


def _agent(options: Options, settings: Settings) -> Agent:
    # In a function of its own: nothing may hold on to the keyring but the agent, or no reload would retire it.
    size = None
    try:
        keyring = options.load_keyring(settings)
        size = keyring.memory.size
        return Agent(settings, keyring)
    except SecretMemoryError as error:
        raise StartError(f"{error}. {locked_memory_needed(error.size if size is None else size)}") from None


async def _serve(agent: Agent, audit: AuditLog, reloader: Reloader) -> None:
    made = []
    try:
        for listener in agent.settings.listeners:
            sock = listening.take(listener)
            made.append((listener, sock, listener.path.lstat()))
    except listening.ListeningError as error:
        for listener, sock, status in made:
            sock.close()
            listening.remove(listener.path, status)
        raise StartError(str(error)) from None
    server = Server(agent, audit)
    listeners = [(at.name, trio.SocketListener(trio.socket.from_stdlib_socket(sock))) for at, sock, _ in made]
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_handle_signals, agent, server, reloader)
            nursery.start_soon(reloader.run)
            nursery.start_soon(_watch_sockets, [(listener.path, status) for listener, _, status in made])
            await nursery.start(_serve_then, server, listeners, nursery.cancel_scope.cancel)
            log.info(
                "agent.serving",
                version=__version__,
                sockets=[str(listener.path) for listener, _, _ in made],
                keys=len(agent.keyring.keys),
                memory_protection=agent.memory_protection,
                libcrypto=libcrypto.version(),
            )
    finally:
        for listener, _, status in made:
            listening.remove(listener.path, status)
    log.info("agent.stopped")


async def _watch_sockets(made: list[tuple[Path, os.stat_result]]) -> None:
    """Say when a socket's file is gone, or is somebody else's: nobody new will find this agent then."""
    lost: set[Path] = set()
    while True:
        await trio.sleep(_LOOK_EVERY)
        for path, status in made:
            if path not in lost and not listening.is_own(path, status):
                lost.add(path)
                log.error("socket.lost", path=str(path), what="its file was removed or replaced; restart the agent")


async def _serve_then(
    server: Server,
    listeners: list[tuple[str, trio.SocketListener]],
    then: Callable[[], None],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    await server.serve(listeners, task_status)
    then()


async def _handle_signals(
    agent: Agent,
    server: Server,
    reloader: Reloader,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if number == signal.SIGHUP:
                reloader.ask()
            elif agent.draining:  # somebody is in a hurry
                server.drain(grace=0)
            else:
                log.info("agent.draining", signal=signal.Signals(number).name, connections=agent.counters.connections)
                server.drain()
