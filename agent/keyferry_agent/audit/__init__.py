"""The audit log: one agent (exclusive.py) writes it as a chain of lines (log.py); command.py verifies and searches it."""

from .exclusive import lock
from .file import Appended
from .log import AuditLog

__all__ = ["Appended", "AuditLog", "lock"]
