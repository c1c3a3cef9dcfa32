"""An agent whose master key gets new versions."""

from pathlib import Path
from typing import Any, NamedTuple

from .agent import RunningAgent
from .keyring import Command

__all__ = ["RotatableAgent"]


class RotatableAgent(NamedTuple):
    """An agent whose master key, alias/a, gets new versions."""

    agent: RunningAgent
    keyring: Path
    keyring_json: Command

    def change(self, verb: str, *arguments: str) -> Any:
        """Change the keyring, wait for the reload, and return the verb's JSON."""
        reloads = sum(line.get("event") == "reload.done" for line in self.agent.log)
        printed = self.keyring_json(verb, *arguments)
        self.agent.wait_for("reload.done", count=reloads + 1)
        return printed

    def rotate(self) -> str:
        """Rotate the key, and return the new version's ID."""
        version: str = self.change("rotate", "alias/a")["KeyVersion"]["KeyVersionId"]
        return version
