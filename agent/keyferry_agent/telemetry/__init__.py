"""The agent's log of events and its metrics."""
