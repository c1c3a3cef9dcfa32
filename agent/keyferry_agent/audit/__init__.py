"""The record of requests: written line by line as a chain (log.py), verified and searched afterwards (chain.py, command.py)."""

from .file import Appended
from .log import AuditLog

__all__ = ["Appended", "AuditLog"]
