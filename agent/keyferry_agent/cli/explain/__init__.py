"""`keyferry-agent explain`: print every grant with its first mismatch, for operators.

A caller only receives `Forbidden.NoPermission`.
"""

from .command import add_parser
from .judging import mismatch

__all__ = ["add_parser", "mismatch"]
