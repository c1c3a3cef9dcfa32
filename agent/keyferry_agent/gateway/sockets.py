"""The sockets of gateways: inherited from the service manager, or created, on TCP and on Unix sockets."""

import errno
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from typing import NamedTuple

from ..config.gateways import Gateway
from ..config.settings import Listener
from ..server.unix_sockets import BACKLOG, ListeningError, ListeningSocket, open_listeners

__all__ = ["GatewaySocket", "open_gateways", "take_gateway_sockets"]


class GatewaySocket(NamedTuple):
    """The listening socket of a gateway. `file`: the socket of a gateway on a Unix socket, with its file."""

    gateway: Gateway
    socket: socket.socket
    file: ListeningSocket | None

    def close(self) -> None:
        """Stop listening, and remove the socket's file if this agent created it."""
        self.socket.close()
        if self.file is not None:
            self.file.remove()


def take_gateway_sockets(
    gateways: Sequence[Gateway], given_sockets: list[tuple[str, socket.socket]]
) -> dict[str, socket.socket]:
    """Remove the sockets of gateways from the given ones, and return them by the gateways' names.

    A socket belongs to the gateway with its name, or else to the one with its address.
    """
    taken = {}
    for gateway in gateways:
        for entry in given_sockets:
            name, sock = entry
            if name == gateway.name or _is_at(gateway, sock):
                taken[gateway.name] = sock
                given_sockets.remove(entry)
                break
    return taken


def open_gateways(gateways: Sequence[Gateway], given_sockets: dict[str, socket.socket]) -> list[GatewaySocket]:
    """Return a listening socket for each gateway: the given one with its name, or else a newly created one.

    Raises `ListeningError`.
    """
    opened: list[GatewaySocket] = []
    try:
        for gateway in gateways:
            opened.append(_open(gateway, given_sockets.get(gateway.name)))  # noqa: PERF401 - closed on failure
    except ListeningError:
        for gateway_socket in opened:
            gateway_socket.close()
        raise
    return opened


def _open(gateway: Gateway, given: socket.socket | None) -> GatewaySocket:
    if gateway.is_unix:
        listener = Listener(gateway.name, gateway.path, gateway.mode, gateway.uid, gateway.gid)
        (file,) = open_listeners([listener], [] if given is None else [(gateway.name, given)])
        return GatewaySocket(gateway, file.socket, file)
    if given is not None:
        _check_given(gateway, given)
        return GatewaySocket(gateway, given, None)
    return GatewaySocket(gateway, _bind(gateway), None)


def _check_given(gateway: Gateway, sock: socket.socket) -> None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        raise ListeningError(
            f"the socket for the gateway {gateway.name!r} is not a TCP socket: use ListenStream={gateway.listen}"
        )
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ListeningError(f"the socket for the gateway {gateway.name!r} is not listening: it needs Accept=no")
    if not _is_at(gateway, sock):
        raise ListeningError(
            f"systemd hands over a socket at {sock.getsockname()} for the gateway {gateway.name!r}, which listens on "
            f"{gateway.listen}: set both to one address"
        )


def _bind(gateway: Gateway) -> socket.socket:
    address, port = gateway.address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise _not_listening(gateway, error) from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart does not wait for old connections
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise _not_listening(gateway, error) from None
    return sock


def _not_listening(gateway: Gateway, error: OSError) -> ListeningError:
    """Return the error for a socket that cannot be opened. The shipped unit forbids network sockets."""
    hint = ""
    if error.errno == errno.EAFNOSUPPORT:
        hint = "; under systemd, enable systemd/examples/keyferry-gateway.socket, which opens the port for the agent"
    return ListeningError(f"the gateway {gateway.name!r} cannot listen on {gateway.listen}: {error.strerror}{hint}")


def _is_at(gateway: Gateway, sock: socket.socket) -> bool:
    """Return whether a socket has the address of a gateway."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return bool(gateway.is_unix and name == gateway.listen)
    if gateway.is_unix or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    address, port = gateway.address
    return (ip_address(name[0]), name[1]) == (ip_address(address), port)
