"""The audit log. One agent at a time (exclusive.py) writes it as a chain of lines (log.py); commands verify and search it."""

from ..chained_log.file import Appended
from .exclusive import lock
from .log import AuditLog

__all__ = ["Appended", "AuditLog", "lock"]
