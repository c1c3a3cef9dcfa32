"""`keyferry-agent explain`: every grant, and the first thing in it that does not match. For operators.

A caller only ever learns `Forbidden.NoPermission`.
"""

from .command import add_parser
from .judging import mismatch

__all__ = ["add_parser", "mismatch"]
