"""What a peer is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager

from ..run_context import Bare, Way

__all__ = ["Peer"]


class Peer(ABC):
    """A program that is measured as the agent is: it runs on the agent's core, whoever asks on the other."""

    name: str
    does: str
    """What it does, what it does not, and what whoever asks has to do besides."""
    bare: Bare = Bare()
    """What its figures are ratios to."""

    @abstractmethod
    def missing(self) -> str:
        """Why it cannot be measured here; empty if it can."""

    @abstractmethod
    def running(self) -> AbstractContextManager[Mapping[str, Way]]:
        """Start it, and give the ways to ask it, by name; stop it at the end of the `with` block."""
