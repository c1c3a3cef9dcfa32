"""`keyferry-agent gateway`: what an operator makes for a gateway before the agent starts."""

from .command import add_parser

__all__ = ["add_parser"]
