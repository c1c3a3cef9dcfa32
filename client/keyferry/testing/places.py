"""Names shared by a test's process and its relay. The test's process does not import the relay, which needs asyncio."""

from typing import Final

__all__ = ["AGENT_SOCKET", "RELAY", "SOCKET"]

RELAY: Final = "keyferry.testing.relay"
SOCKET: Final = "relay.sock"
AGENT_SOCKET: Final = "agent.sock"
"""Names in the folder of a local agent: the relay's socket for clients, and the agent's socket for the relay."""
