"""An agent whose master key gets new versions."""

from pathlib import Path
from typing import Any, NamedTuple

from .agent import RunningAgent
from .keyring import Command

__all__ = ["Rotating"]


class Rotating(NamedTuple):
    """An agent whose master key, alias/a, gets new versions."""

    agent: RunningAgent
    keyring: Path
    said: Command

    def does(self, verb: str, *arguments: str) -> Any:
        """Change the keyring, and wait until the agent has taken that up; give what the verb printed."""
        reloads = sum(line.get("event") == "reload.done" for line in self.agent.log)
        printed = self.said(verb, *arguments)
        self.agent.wait_for("reload.done", count=reloads + 1)
        return printed

    def rotate(self) -> str:
        """Give the key a new version; give its ID."""
        version: str = self.does("rotate", "alias/a")["KeyVersion"]["KeyVersionId"]
        return version
