"""The audit log: one agent (exclusive.py) writes it as a chain of lines (log.py); command.py verifies and searches it."""

from ..chained_log.file import Appended
from .exclusive import lock
from .log import AuditLog

__all__ = ["Appended", "AuditLog", "lock"]
