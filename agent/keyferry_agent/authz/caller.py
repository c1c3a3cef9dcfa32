"""A connection's peer, and the grants that it has: `Caller`."""

from ..peer import Peer
from .grants import CallerGrants, Policy

__all__ = ["Caller"]


class Caller:
    """One connection's peer, with the grants that are to it: looked up once, and again after a reload."""

    __slots__ = ("_policy", "granted", "peer")

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.granted = CallerGrants(())
        self._policy: Policy | None = None

    def refresh(self, policy: Policy) -> None:
        """Look the grants up, if this is another policy than the last time."""
        if self._policy is not policy:
            self._policy = policy
            self.granted = policy.granted(self.peer)

    def know(self, peer: Peer) -> None:
        """Take more evidence of the same caller."""
        self.peer, self._policy = peer, None
