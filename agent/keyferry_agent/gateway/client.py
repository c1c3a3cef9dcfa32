"""The client of one connection: the evidence about it, and what its requests have proved."""

from ..authz.caller import Caller
from ..peer import HttpOrigin, Peer, Process
from ..peer.inspection import Inspector
from ..server.identity import Identity
from ..state import ServerState

__all__ = ["Client"]


class Client:
    """The client of one connection. `process`: its process, if the connection is over a Unix socket and it is visible."""

    def __init__(
        self, agent: ServerState, inspector: Inspector, peer: Peer, process: Process | None, *, remote: str, tls: bool
    ) -> None:
        self.peer = peer
        self.process = process
        self.remote = remote
        self.tls = tls
        self.proven = False
        """Whether the client has sent a request with a verified signature that was not a repeated one."""
        self.wrong_signatures = 0
        self._agent = agent
        self._inspector = inspector
        self._caller = Caller(peer)
        self._identity = self._identify(self._caller)

    def caller(self, access_key_id: str, origin: HttpOrigin) -> Caller:
        """Return the caller with this access key. It is the same object as long as access key and origin stay the same."""
        peer = self._caller.peer
        if (peer.access_key, peer.http) != (access_key_id, origin):
            self._caller = Caller(self.peer._replace(access_key=access_key_id, http=origin))
            self._identity = self._identify(self._caller)
        return self._caller

    async def confirm(self) -> bool:
        """Return whether the client's process still lives and runs the same program. Call before each decision."""
        return self.process is None or await self._identity.confirm()

    def _identify(self, caller: Caller) -> Identity:
        return Identity(self._agent, self._inspector, caller, self.process, lambda: None)
