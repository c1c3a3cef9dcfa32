"""What the service manager gives this agent, and what it is told: sockets, a watchdog, states (sd_listen_fds(3), sd_notify(3)).

Both protocols are a few environment variables and one datagram; without a service manager nothing of this happens.
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
    """The descriptors that were handed over at start, by their names; a name may have several."""

    def __init__(self, named: Iterable[tuple[str, int]] = ()) -> None:
        self.named = list(named)

    @classmethod
    def take(cls) -> "InheritedDescriptors":
        """What the service manager gave this very process. To be called once: no child is to believe that it is meant."""
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
        """All of them."""
        return {descriptor for _, descriptor in self.named}

    def sockets(self) -> list[tuple[str, socket.socket]]:
        """Those that are sockets, taken out of here. Whoever gets them closes them."""
        found, rest = [], []
        for name, descriptor in self.named:
            try:
                found.append((name, socket.socket(fileno=descriptor)))
            except OSError:
                rest.append((name, descriptor))
        self.named = rest
        return found


class ServiceManager:
    """Tells the service manager how this agent is; nobody, where there is none."""

    def __init__(self, environment: Mapping[str, str] = {}) -> None:
        """Take where to tell it from the environment of this process."""
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        own = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = environment.get("WATCHDOG_USEC", "")
        self.watchdog = int(microseconds) * _MICROSECONDS if own and address and microseconds.isdecimal() else 0.0
        """Seconds in which the manager wants to hear that requests are answered; 0: it does not."""
        self._status = ""

    @classmethod
    def take(cls) -> "ServiceManager":
        """The manager of this process, of which no child is to know."""
        host = cls(os.environ)
        for name in _NOTIFY:
            os.environ.pop(name, None)
        return host

    def __bool__(self) -> bool:
        return bool(self._address)

    def ready(self, status: str) -> None:
        """It serves, for the first time or after a reload. `status` is for people."""
        self._status = status
        self._tell("READY=1", f"STATUS={status}")

    def changed(self, status: str) -> None:
        """It is in another state than before. `status` is for people."""
        if status != self._status:
            self._status = status
            self._tell(f"STATUS={status}")

    def reloading(self) -> None:
        """It reads its files again; `ready` says when it has."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000}")

    def stopping(self) -> None:
        """It takes no more connections."""
        self._tell("STOPPING=1", "STATUS=Answering what has arrived, then it stops.")

    def alive(self, status: str) -> None:
        """Requests are being answered."""
        changed = [f"STATUS={status}"] if status != self._status else []
        self._status = status
        self._tell("WATCHDOG=1", *changed)

    def store(self, name: str, descriptor: int) -> bool:
        """Have the manager keep a descriptor for the next start of this agent (FDSTORE=1); False if it was not told."""
        return self._tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=[descriptor])

    def forget(self, name: str) -> None:
        """Have the manager close all descriptors that it keeps under this name."""
        self._tell("FDSTOREREMOVE=1", f"FDNAME={name}")

    def _tell(self, *lines: str, descriptors: Iterable[int] = ()) -> bool:
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as to:
                to.connect(self._address)
                socket.send_fds(to, ["\n".join(lines).encode()], list(descriptors))
        except OSError as error:  # the manager's affair: no request is to suffer from it
            log.warning("host.not_told", what=lines[0], error=error.strerror)
            return False
        return True


async def feed_watchdog(host: ServiceManager, stream: trio.SocketStream, status: Callable[[], str]) -> None:
    """Ask twice in the manager's interval; tell it when an answer came, with a status for people. Ends with the connection."""
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
