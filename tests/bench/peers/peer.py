"""The interface of a peer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager

from ..run_context import Bare, Way

__all__ = ["Peer"]


class Peer(ABC):
    """A program that is measured like the agent: it runs on the agent's core, and its clients on the other."""

    name: str
    does: str
    """Its work, its omissions, and the further work of its client."""
    bare: Bare = Bare()
    """The base of the ratios of its figures."""

    @abstractmethod
    def missing(self) -> str:
        """Why it cannot be measured here; empty if it can."""

    @abstractmethod
    def running(self) -> AbstractContextManager[Mapping[str, Way]]:
        """Start the peer, yield its named calls, and stop it at the end of the block."""
