"""`Caller`: a connection's peer, with the grants that it has."""

from ..peer import Peer
from .grants import CallerGrants, Policy

__all__ = ["Caller"]


class Caller:
    """One connection's peer, with its grants. They are looked up once, and again after a reload or with new evidence."""

    __slots__ = ("_policy", "granted", "peer")

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.granted = CallerGrants(())
        self._policy: Policy | None = None

    @property
    def user(self) -> int | str | None:
        """The ID of the caller's access key, or else its uid: requests are limited and served in turn for each of them."""
        return self.peer.access_key or self.peer.uid

    def refresh(self, policy: Policy) -> None:
        """Look the grants up again, if `policy` is not the object of the last look-up."""
        if self._policy is not policy:
            self._policy = policy
            self.granted = policy.granted(self.peer)

    def know(self, peer: Peer) -> None:
        """Replace the peer with one that has more evidence. The next `refresh` looks its grants up."""
        self.peer, self._policy = peer, None
