"""Who is calling: evidence from the kernel only, each piece with what it is worth. docs/identity.md says what can be forged."""

from .credentials import OVERFLOW_UID, Peer, evidence
from .process import Process, processes_visible

__all__ = ["OVERFLOW_UID", "Peer", "Process", "evidence", "processes_visible"]
