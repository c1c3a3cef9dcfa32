"""The life of the daemon, from its settings to its last answer: harden, check, load, listen, serve, drain."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog
import trio

from keyferry import libcrypto
from keyferry.secret import SecretMemoryError

from . import __version__, listening, startup
from .agent import Agent
from .audit import AuditLog
from .crypto import selftest
from .grants import Grant
from .keyring import loader
from .keyring.document import KeyringError
from .keyring.loaded import Keyring, development_keyring
from .serving import Server
from .settings import Settings, SettingsError, read

__all__ = ["Options", "StartError", "daemon"]

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")

_DEV_GRANT: Final = "dev"


class StartError(Exception):
    """The agent cannot start. The message says why, and what to do."""


class Options:
    """What the command line says: it wins over the configuration file."""

    def __init__(
        self, *, config: Path | None, socket: Path | None, keyring: Path | None, unseal: Path | None, dev: bool
    ) -> None:
        self._config = config
        self._socket = socket
        self._keyring = keyring
        self._unseal = unseal
        self.dev = dev

    def settings(self) -> Settings:
        """Read the configuration, and put the options over it. Raises `SettingsError`."""
        settings = read(self._config) if self._config else Settings()
        if self._socket:
            if len(settings.listeners) > 1:
                raise SettingsError(["--socket names one socket; the configuration has several [[listener]] tables"])
            settings = replace(settings, listeners=(replace(settings.listeners[0], path=self._socket),))
        if self._keyring:
            settings = replace(settings, keyring=self._keyring)
        if self._unseal:
            settings = replace(settings, unseal=self._unseal)
        if self.dev:
            if settings.keyring:
                raise SettingsError(["--dev makes a keyring of its own, for trying out: leave the other one out"])
            # A user who starts an agent to try it out may have no right to lock memory; this keyring is worth nothing.
            everything = Grant(_DEV_GRANT, {"uid": os.geteuid()}, ("kms:*",), ("*",))
            settings = replace(settings, memory="prefer", grants=(*settings.grants, everything))
        return settings


def daemon(options: Options) -> None:
    """Run until SIGTERM or SIGINT. Raises `StartError`."""
    for failure in startup.harden():
        log.warning("startup.not_hardened", what=failure)
    try:
        settings = options.settings()
        agent = Agent(settings, _load_keyring(options, settings))  # no other name for it: a reload retires it
        unavailable = selftest.run(agent.scratch, sm2_fallback=settings.sm2_fallback == "gmssl")
        audit = AuditLog(settings.audit)
    except (SettingsError, KeyringError, SecretMemoryError, selftest.SelfTestError, libcrypto.LibcryptoError) as error:
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
    trio.run(_serve, options, agent, audit, strict_exception_groups=True)


def _load_keyring(options: Options, settings: Settings) -> Keyring:
    require, backing = settings.memory == "require", settings.memory_backing
    if options.dev:
        return development_keyring(backing=backing, require=require)
    if settings.keyring is None or settings.unseal is None:
        missing = "keyring" if settings.keyring is None else "unseal"
        raise StartError(f"no {missing} is configured: set {missing} = in the file, give --{missing}, or try --dev")
    return loader.load(settings.keyring, settings.unseal, backing=backing, require=require)


async def _serve(options: Options, agent: Agent, audit: AuditLog) -> None:
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
            await nursery.start(_handle_signals, options, agent, server, nursery)
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


async def _serve_then(
    server: Server,
    listeners: list[tuple[str, trio.SocketListener]],
    then: Callable[[], None],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    await server.serve(listeners, task_status)
    then()


async def _handle_signals(
    options: Options,
    agent: Agent,
    server: Server,
    nursery: trio.Nursery,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    one_at_a_time = trio.Lock()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if number == signal.SIGHUP:
                nursery.start_soon(_reload, options, agent, one_at_a_time)  # a slow keyring must not hold up a SIGTERM
            elif agent.draining:  # somebody is in a hurry
                server.drain(grace=0)
            else:
                log.info("agent.draining", signal=signal.Signals(number).name, connections=agent.counters.connections)
                server.drain()


_FIXED: Final = ("listeners", "limits", "audit", "memory", "memory_backing", "sm2_fallback")


def _keep_fixed(settings: Settings, old: Settings) -> Settings:
    """New settings, but for those that only a restart can change."""
    changed = [name for name in _FIXED if getattr(settings, name) != getattr(old, name)]
    if changed:
        log.warning("reload.limited", what=f"these change with a restart only: {', '.join(changed)}")
    return replace(settings, **{name: getattr(old, name) for name in _FIXED})


async def _reload(options: Options, agent: Agent, one_at_a_time: trio.Lock) -> None:
    """Read configuration and keyring again, and swap both at once; whatever is wrong leaves the old ones serving."""
    async with one_at_a_time:
        await _reload_now(options, agent)


async def _reload_now(options: Options, agent: Agent) -> None:
    try:
        settings = _keep_fixed(options.settings(), agent.settings)
        keyring = agent.keyring
        if not options.dev:
            keyring = await trio.to_thread.run_sync(_load_keyring, options, settings, abandon_on_cancel=True)
    except Exception as error:
        known = isinstance(error, SettingsError | KeyringError | SecretMemoryError | StartError | OSError)
        log.error(
            "reload.failed", why=str(error), still_serving=agent.keyring.loaded_at, exc_info=None if known else error
        )
        return
    for what in settings.warnings:
        log.warning("reload.limited", what=what)
    agent.adopt(settings, keyring)
    log.info("reload.done", keys=len(keyring.keys), grants=len(settings.grants))
