"""The audit log. One agent at a time (writer_lock.py) writes it as a chain of lines (log.py); commands verify and search it."""

from ..chained_log.file import Appended
from .log import AuditLog
from .writer_lock import lock

__all__ = ["Appended", "AuditLog", "lock"]
