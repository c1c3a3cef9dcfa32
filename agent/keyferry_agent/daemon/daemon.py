"""The life of the daemon, from its settings to its last answer: harden, check, load, listen, serve, drain."""

import errno
import gc
import os
import signal
import socket
import ssl
import stat
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from keyferry import libcrypto, private_files
from keyferry.secret import SecretMemoryError
from keyferry.stdout import show

from .. import __version__, process_hardening
from ..audit import AuditLog
from ..audit import lock as lock_audit_log
from ..config.gateways import CertificateError, certificate_context
from ..config.options import Options, StartError
from ..config.settings import Settings, SettingsError
from ..crypto import selftest
from ..gateway.sockets import open_gateways, take_gateway_sockets
from ..health import MESSAGES, SEALED
from ..keyring.document import KeyringError
from ..keyring.fdstore import KeyringPersister
from ..keyring.keyring import KEPT, sealed_keyring
from ..keyring.loader import load_keyring
from ..locking import LockError
from ..peer import lacking
from ..server import unix_sockets
from ..server.server import Server
from ..state import ServerState, locked_memory_needed
from ..telemetry.metrics import Metrics, MetricsError
from . import development, unsealing
from .file_stats import FileStats, read_settings, stat_files
from .file_watcher import FileWatcher
from .reload import Reloader
from .systemd import InheritedDescriptors, ServiceManager, feed_watchdog

if TYPE_CHECKING:
    from ..server.metrics_server import Server as MetricsServer

__all__ = ["run_daemon"]

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


def run_daemon(options: Options) -> None:
    """Run until SIGTERM or SIGINT. Raises `StartError`."""
    manager, inherited = ServiceManager.from_environment(), InheritedDescriptors.from_environment()
    try:
        failures = process_hardening.harden(inherited.descriptors)
    except process_hardening.HardeningError as error:
        raise StartError(str(error)) from None
    if not process_hardening.clears_freed_memory():
        failures.append(
            "freed memory is not overwritten, because that needs glibc; libraries may leave copies of keys there"
        )
    if private_files.allowed():
        failures.append(f"{private_files.ALLOW_OPEN_FILES} is set: other users may be able to read or change the files")
    for failure in failures:
        log.warning("startup.not_hardened", what=failure)
    sockets = inherited.sockets()
    with ExitStack() as stack:
        _load_and_serve(options, manager, inherited, sockets, stack)


def _load_and_serve(
    options: Options,
    manager: ServiceManager,
    inherited: InheritedDescriptors,
    sockets: list[tuple[str, socket.socket]],
    stack: ExitStack,
) -> None:
    """Load, listen and serve. `stack` closes the files at the end. Raises `StartError`."""
    try:
        settings, stats = read_settings(options, stat_files(options.files(Settings())))
        keeper = KeyringPersister(manager.store, manager.forget)
        agent, current = _agent(options, settings, keeper, inherited, stats)
        secret_is_gone = agent.keyring.source == KEPT and settings.unseal is not None and stats[settings.unseal] is None
        unavailable = selftest.run(agent.scratch, sm2_fallback=settings.sm2_fallback == "gmssl")
        audit = _audit_log(settings)
        stack.callback(audit.close)
        agent.audit_fails = lambda: audit.failing
        metrics = _metrics(agent, audit, settings)
        server = Server(agent, audit, metrics[0] if metrics else None)
        contexts = {gateway.name: certificate_context(gateway) for gateway in settings.gateways}
    except (
        SettingsError,
        CertificateError,
        KeyringError,
        selftest.SelfTestError,
        libcrypto.LibcryptoError,
        MetricsError,
        LockError,
    ) as error:
        raise StartError(str(error)) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise StartError(f"{where}{_reason(error)}") from None
    _log_startup_warnings(options, agent, unavailable)
    gc.freeze()  # exclude permanent objects from garbage collection: with 10,000 keys, each pass over them is a pause
    reloader = Reloader(options, agent, audit, stats, manager, keeper if settings.keep_keys else None, current=current)
    if not current or secret_is_gone:
        reloader.requested.set()
    if metrics:
        stack.callback(metrics[1].close)
    try:
        trio.run(_serve, agent, server, audit, reloader, manager, sockets, contexts, strict_exception_groups=True)
    finally:
        if settings.keep_keys and not agent.keyring.is_sealed:
            agent.keyring.memory.detach()


def _audit_log(settings: Settings) -> AuditLog:
    """Lock and open the audit log. Raises `LockError` or OSError."""
    lock = lock_audit_log(settings.audit.path)
    try:
        return AuditLog(settings.audit, lock)
    except OSError:
        if lock is not None:
            lock.release()
        raise


def _reason(error: OSError) -> str:
    """Return why a file did not open. A unit's standard output is a socket, which cannot be opened by its path."""
    if error.errno == errno.ENXIO and isinstance(error.filename, str) and _is_socket(error.filename):
        return 'is a socket, as standard output is under systemd; use "stderr"'
    return error.strerror or str(error)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _metrics(agent: ServerState, audit: AuditLog, settings: Settings) -> "tuple[Metrics, MetricsServer] | None":
    if not settings.metrics:
        return None
    from ..server.metrics_server import of  # noqa: PLC0415 - an HTTP server takes as long to import as a keyring to load

    return of(agent, audit, settings.metrics)


def _log_startup_warnings(options: Options, agent: ServerState, unavailable: list[str]) -> None:
    settings = agent.settings
    for what in (*settings.warnings, *unavailable):
        log.warning("startup.limited", what=what)
    if agent.memory_protection == "none":
        log.warning("startup.memory_unprotected", what="keys are in ordinary memory, and can reach swap and core dumps")
    for why, selectors in lacking().items():
        names = [grant.name for grant in settings.grants if selectors & grant.to.keys()]
        if names:
            selector_names = ", ".join(sorted(selectors))
            log.warning("startup.limited", what=f"{why}: {selector_names} cannot match other users", grants=names)
    if options.dev:
        log.warning(
            "startup.development",
            what="the keyring exists only in memory; everything encrypted under it is lost when this agent stops",
            granted_to_uid=os.geteuid(),
        )
    elif agent.keyring.is_sealed:
        log.warning("unseal.absent", what=MESSAGES[SEALED])
    if not settings.grants and not options.dev:
        log.warning("startup.no_grants", what="the configuration has no grants: every caller is refused")


def _agent(
    options: Options, settings: Settings, keeper: KeyringPersister, inherited: InheritedDescriptors, stats: FileStats
) -> tuple[ServerState, bool]:
    """Return the agent's state, and whether its keyring is the one that the file has now. Raises `StartError`.

    This is a separate function so that no local variable keeps the keyring alive. A reload retires a keyring only if the
    agent's state held the last reference to it.
    """
    size = None
    status = stats.get(settings.keyring) if settings.keyring else None
    try:
        restored = keeper.restore(inherited.named) if settings.keep_keys and not options.dev else None
        if restored is None and settings.unseal_socket is not None:
            keyring = sealed_keyring(backing=settings.memory_backing, require=settings.memory == "require")
            current = True
        elif restored is None:
            keyring = load_keyring(settings, keeper if settings.keep_keys else None, status)
            current = True
        else:
            keyring, status_then = restored
            current = status_then is not None and status is not None and [*status_then] == [*status]
            log.info("keyring.kept", keys=len(keyring.keys), loaded_at=keyring.loaded_at)
        size = keyring.memory.size
        return ServerState(settings, keyring), current
    except SecretMemoryError as error:
        raise StartError(f"{error}. {locked_memory_needed(error.size if size is None else size)}") from None


async def _serve(
    agent: ServerState,
    server: Server,
    audit: AuditLog,
    reloader: Reloader,
    manager: ServiceManager,
    sockets: list[tuple[str, socket.socket]],
    contexts: dict[str, ssl.SSLContext | None],
) -> None:
    with ExitStack() as stack:
        try:
            given = take_gateway_sockets(agent.settings.gateways, sockets)
            opened = unix_sockets.open_listeners(agent.settings.listeners, sockets)
            stack.callback(_remove, opened)
            administrative = unsealing.listen(agent.settings.unseal_socket)
            stack.callback(_remove, administrative)
            gateways = open_gateways(agent.settings.gateways, given)
            gateway_files = [entry.file for entry in gateways if entry.file is not None]
            stack.callback(_remove, gateway_files)
        except unix_sockets.ListeningError as error:
            raise StartError(str(error)) from None
        audit.begin(agent.started_at)  # not earlier: a failing start is repeated, and would write an entry each time
        audit.name_keys(agent.keyring)
        unsealer = unsealing.Unsealing(reloader, audit, agent)
        listeners = [
            (listening.name, trio.SocketListener(trio.socket.from_stdlib_socket(listening.socket)))
            for listening in opened
        ]
        serve, drain = [partial(server.serve, listeners)], [server.drain]
        if gateways:
            from ..gateway.server import GatewayServer  # noqa: PLC0415 - most agents have no gateway

            gateway_server = GatewayServer(server, audit, gateways, contexts)
            serve, drain = [*serve, partial(gateway_server.serve)], [*drain, gateway_server.drain]
        async with trio.open_nursery() as nursery:
            await nursery.start(_handle_signals, agent, drain, reloader, manager)
            files = [*opened, *administrative, *gateway_files]
            nursery.start_soon(FileWatcher(agent, audit, reloader, files).run)
            nursery.start_soon(server.inspector.run)
            for listening in administrative:
                nursery.start_soon(unsealer.serve, listening.socket)
            await nursery.start(_serve_until_drained, serve, nursery.cancel_scope.cancel)
            if manager.watchdog:
                near, far = (trio.SocketStream(end) for end in trio.socket.socketpair())
                nursery.start_soon(server.serve_own, far)
                nursery.start_soon(feed_watchdog, manager, near, agent.status)
            manager.ready(agent.status())
            if introduction := development.introduction(agent.settings, agent.keyring):
                show("keyferry-agent", introduction)
            log.info(
                "agent.serving",
                version=__version__,
                sockets=[str(listening.path) for listening in opened],
                gateways=[gateway.url for gateway in agent.settings.gateways],
                keys=len(agent.keyring.keys),
                memory_protection=agent.memory_protection,
                libcrypto=libcrypto.version(),
            )
    log.info("agent.stopped")


async def _serve_until_drained(
    serve: Sequence[Callable[..., Awaitable[None]]],
    then: Callable[[], None],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    async with trio.open_nursery() as nursery:
        for serve_sockets in serve:
            await nursery.start(serve_sockets)
        task_status.started()
    then()


def _remove(files: Sequence[unix_sockets.ListeningSocket]) -> None:
    for listening in files:
        listening.remove()


async def _handle_signals(
    agent: ServerState,
    drain: Sequence[Callable[..., None]],
    reloader: Reloader,
    manager: ServiceManager,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if number == signal.SIGHUP:
                reloader.requested.set()
            elif agent.draining:  # a second signal skips the grace period
                for drain_server in drain:
                    drain_server(grace=0)
            else:
                log.info("agent.draining", signal=signal.Signals(number).name, connections=agent.counters.connections)
                manager.stopping()
                for drain_server in drain:
                    drain_server()
