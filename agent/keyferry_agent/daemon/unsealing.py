"""Receive the unseal secret from an operator, on a separate socket that only root and the agent's user can open.

The operator's command sends the reading end of a pipe that holds the secret. The keyring's loader, a child process, reads the
pipe, so that the secret is never in the agent's memory. Attempts are serial: only one passphrase is tried at a time.

    operator → agent    one byte, and one descriptor (SCM_RIGHTS): the reading end of a pipe
    agent → operator    one JSON object: {"Keys", "KeyringLoadedAt"}, or {"Error"}; then the connection is closed
"""

import json
import os
import socket
import stat
from array import array
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from ..audit import AuditLog
from ..config.settings import Listener
from ..peer import evidence
from ..server import unix_sockets
from ..state import ServerState
from .reload import Reloader

__all__ = ["Unsealing", "listen"]

_NAME: Final = "unseal"
_MODE: Final = 0o600
_ROOT: Final = 0
_ARRIVAL_SECONDS: Final = 10.0
"""Time limit for receiving the descriptor, and for sending the answer. A local command needs milliseconds."""
_RETRY_SECONDS: Final = 0.1
_MAX_DESCRIPTORS: Final = 4
"""Descriptors that are received with one message. A message must have one; all are closed."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


def listen(path: Path | None) -> list[unix_sockets.ListeningSocket]:
    """Return the socket for operators, or an empty list without a path. Raises `ListeningError`."""
    return [] if path is None else unix_sockets.open_listeners([Listener(_NAME, path, mode=_MODE)], [])


class Unsealing:
    """Answers operators, one at a time."""

    def __init__(self, reloader: Reloader, audit: AuditLog, agent: ServerState) -> None:
        self._reloader = reloader
        self._audit = audit
        self._agent = agent

    async def serve(self, listener: socket.socket) -> None:
        """Accept operators' commands until cancelled."""
        async with trio.SocketListener(trio.socket.from_stdlib_socket(listener)) as accepting:
            while True:
                try:
                    stream = await accepting.accept()
                except OSError as error:
                    log.error("accept.failed", listener=_NAME, error=error.strerror)
                    await trio.sleep(_RETRY_SECONDS)
                    continue
                try:
                    async with stream:
                        answer = await self._attempt(stream.socket)
                        with trio.move_on_after(_ARRIVAL_SECONDS):
                            await stream.send_all(json.dumps(answer).encode())
                except (ProcessLookupError, trio.BrokenResourceError):
                    log.info("connection.process_ended", listener=_NAME)
                except Exception as error:  # an error of one command closes its connection only
                    log.error("connection.failed", listener=_NAME, exc_info=error)

    async def _attempt(self, connection: Any) -> dict[str, Any]:
        """Unseal the keyring with one command's secret, and return the answer."""
        peer, process = evidence(connection, _NAME)
        if process is not None:
            process.close()
        if peer.uid not in (_ROOT, os.geteuid()):
            log.warning("unseal.refused", uid=peer.uid, pid=peer.pid)
            failure: str | None = "only root and the agent's user may unseal"
        else:
            descriptors = await _received(connection)
            try:
                if len(descriptors) != 1 or not stat.S_ISFIFO(os.fstat(descriptors[0]).st_mode):
                    return {"Error": "expected the reading end of one pipe; use `keyferry-agent unseal`"}
                failure = await self._reloader.unseal(descriptors[0])
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
        keyring = self._agent.keyring
        self._audit.unsealed(peer, "OK" if failure is None else "Refused", keyring.loaded_at)
        if failure is not None:
            return {"Error": failure}
        return {"Keys": len(keyring.keys), "KeyringLoadedAt": keyring.loaded_at}


async def _received(connection: Any) -> list[int]:
    """Wait for a message, and return its descriptors; an empty list if it does not arrive in time."""
    descriptors = array("i")
    with trio.move_on_after(_ARRIVAL_SECONDS):
        size = socket.CMSG_SPACE(_MAX_DESCRIPTORS * descriptors.itemsize)
        _, ancillary, _, _ = await connection.recvmsg(1, size, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return list(descriptors)
