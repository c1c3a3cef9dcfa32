"""Client of the service manager: inherited descriptors (sd_listen_fds(3)), states and the watchdog (sd_notify(3)).

Both protocols consist of environment variables and datagrams. Without a service manager, nothing is inherited or sent.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import structlog
import trio

from keyferry.errors import ProtocolError
from keyferry.protocol import wire

__all__ = ["InheritedDescriptors", "ServiceManager", "feed_watchdog"]

_FIRST: Final = 3
_MICROSECONDS: Final = 1e-6
_LISTEN: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_NOTIFY: Final = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


class InheritedDescriptors:
    """The descriptors that this process inherited at its start, with their names. Several may have the same name."""

    def __init__(self, named: Iterable[tuple[str, int]] = ()) -> None:
        self.named = list(named)

    @classmethod
    def take(cls) -> "InheritedDescriptors":
        """Return the descriptors from the service manager. Removes the variables, so that no child inherits them: call once."""
        pid, count, names = (os.environ.pop(name, "") for name in _LISTEN)
        if pid != str(os.getpid()) or not count.isdecimal():
            return cls()
        descriptors = range(_FIRST, _FIRST + int(count))
        called = names.split(":") if names else []
        called += ["unknown"] * (len(descriptors) - len(called))  # as sd_listen_fds_with_names(3) calls them
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        return cls(zip(called, descriptors, strict=False))

    @property
    def descriptors(self) -> set[int]:
        """Return all descriptors, without their names."""
        return {descriptor for _, descriptor in self.named}

    def sockets(self) -> list[tuple[str, socket.socket]]:
        """Remove and return all descriptors that are sockets, with their names. The caller closes them."""
        found, rest = [], []
        for name, descriptor in self.named:
            try:
                found.append((name, socket.socket(fileno=descriptor)))
            except OSError:
                rest.append((name, descriptor))
        self.named = rest
        return found


class ServiceManager:
    """Client of sd_notify(3). Does nothing without a service manager."""

    def __init__(self, environment: Mapping[str, str] = {}) -> None:
        """Read the socket's address and the watchdog's interval from `environment`."""
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        own = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = environment.get("WATCHDOG_USEC", "")
        self.watchdog = int(microseconds) * _MICROSECONDS if own and address and microseconds.isdecimal() else 0.0
        """The watchdog's interval in seconds, or 0 without a watchdog."""
        self._status = ""

    @classmethod
    def take(cls) -> "ServiceManager":
        """Return the service manager of this process. Removes the variables, so that no child inherits them."""
        host = cls(os.environ)
        for name in _NOTIFY:
            os.environ.pop(name, None)
        return host

    def __bool__(self) -> bool:
        return bool(self._address)

    def ready(self, status: str) -> None:
        """Report that the agent serves, at its start or after a reload. `status` is a line for operators."""
        self._status = status
        self._tell("READY=1", f"STATUS={status}")

    def changed(self, status: str) -> None:
        """Report a changed state. `status` is a line for operators."""
        if status != self._status:
            self._status = status
            self._tell(f"STATUS={status}")

    def reloading(self) -> None:
        """Report the beginning of a reload; `ready` reports its end."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000}")

    def stopping(self) -> None:
        """Report that the agent stops: it does not accept further connections."""
        self._tell("STOPPING=1", "STATUS=Answering the requests that have arrived, then stopping.")

    def alive(self, status: str) -> None:
        """Feed the watchdog, and report a changed status."""
        changed = [f"STATUS={status}"] if status != self._status else []
        self._status = status
        self._tell("WATCHDOG=1", *changed)

    def store(self, name: str, descriptor: int) -> bool:
        """Store a descriptor with the manager for the next start of this agent (FDSTORE=1). Returns False if that failed."""
        return self._tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=[descriptor])

    def forget(self, name: str) -> None:
        """Make the manager close all descriptors that it stores under this name (FDSTOREREMOVE=1)."""
        self._tell("FDSTOREREMOVE=1", f"FDNAME={name}")

    def _tell(self, *lines: str, descriptors: Iterable[int] = ()) -> bool:
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as to:
                to.connect(self._address)
                socket.send_fds(to, ["\n".join(lines).encode()], list(descriptors))
        except OSError as error:  # the manager's failure must not affect requests
            log.warning("host.not_told", what=lines[0], error=error.strerror)
            return False
        return True


async def feed_watchdog(host: ServiceManager, stream: trio.SocketStream, status: Callable[[], str]) -> None:
    """Call GetAgentHealth twice in each interval of the watchdog, and feed the watchdog after each successful answer.

    `status` returns a line for operators. Returns when the connection ends.
    """
    interval = host.watchdog / 2
    decoder = wire.Decoder()
    msgid = 0
    async with stream:
        while True:
            msgid = (msgid + 1) % 2**32
            asked = trio.current_time()
            with trio.move_on_after(host.watchdog):
                try:
                    if await _answered(stream, decoder, msgid):
                        host.alive(status())
                    else:
                        log.error("watchdog.refused", what="the agent's own request was refused")
                except (trio.BrokenResourceError, ProtocolError):
                    return  # the agent drains
            await trio.sleep_until(asked + interval)


async def _answered(stream: trio.SocketStream, decoder: wire.Decoder, msgid: int) -> bool:
    await stream.send_all(wire.encode_request(msgid, "GetAgentHealth", {}))
    while True:
        received = await stream.receive_some()
        if not received:
            raise trio.BrokenResourceError
        decoder.feed(received)
        for message in decoder.messages():
            if isinstance(message, wire.Response) and message.msgid == msgid:
                return message.error is None
