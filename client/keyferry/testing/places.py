"""What a test's process and its relay agree on. The test's process does not import the relay, which needs asyncio."""

from typing import Final

__all__ = ["AGENT_SOCKET", "RELAY", "SOCKET"]

RELAY: Final = "keyferry.testing.relay"
SOCKET: Final = "relay.sock"
AGENT_SOCKET: Final = "agent.sock"
"""Names in the folder of a local agent: of the socket for clients, and of the agent's own."""
