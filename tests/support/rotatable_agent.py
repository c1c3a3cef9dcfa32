"""An agent whose master key gets new versions."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .agent import RunningAgent
from .keyring import WATCHFUL, new_keyring, printed, serving

__all__ = ["RotatableAgent", "rotating_agent"]


class RotatableAgent(NamedTuple):
    """An agent whose master key, alias/a, gets new versions."""

    agent: RunningAgent
    keyring: Path

    def keyring_json(self, verb: str, *arguments: object) -> Any:
        """Run a verb on the keyring with --json; return what it printed."""
        return printed(self.keyring, verb, *arguments)

    def change(self, verb: str, *arguments: str) -> Any:
        """Change the keyring, wait for the reload, and return the verb's JSON."""
        reloads = sum(line.get("event") == "reload.done" for line in self.agent.log)
        result = self.keyring_json(verb, *arguments)
        self.agent.wait_for("reload.done", count=reloads + 1)
        return result

    def rotate(self) -> str:
        """Rotate the key, and return the new version's ID."""
        version: str = self.change("rotate", "alias/a")["KeyVersion"]["KeyVersionId"]
        return version


@contextmanager
def rotating_agent(folder: Path) -> Iterator[RotatableAgent]:
    """An agent with a keyring of its own in a folder."""
    keyring = new_keyring(folder)
    with serving(keyring, folder / "agent.sock", command=WATCHFUL) as agent:
        yield RotatableAgent(agent, keyring)
