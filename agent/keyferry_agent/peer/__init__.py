"""The identity of a caller: evidence from the kernel only. docs/identity.md describes how far each piece can be forged."""

from .credentials import OVERFLOW_GID, OVERFLOW_UID, HttpOrigin, Peer, evidence
from .groups import Groups
from .platform import lacking
from .process import Process
from .program import Program, inspect

__all__ = [
    "OVERFLOW_GID",
    "OVERFLOW_UID",
    "Groups",
    "HttpOrigin",
    "Peer",
    "Process",
    "Program",
    "evidence",
    "inspect",
    "lacking",
]
