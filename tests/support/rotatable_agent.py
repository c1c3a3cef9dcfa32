"""An agent whose master key gets new versions."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .agent import RunningAgent
from .keyring import WATCHFUL, new_keyring, printed, serving

__all__ = ["Rotating", "rotating_agent"]


class Rotating(NamedTuple):
    """An agent whose master key, alias/a, gets new versions."""

    agent: RunningAgent
    keyring: Path

    def said(self, verb: str, *arguments: object) -> Any:
        """Run a verb on the keyring with --json; return what it printed."""
        return printed(self.keyring, verb, *arguments)

    def does(self, verb: str, *arguments: str) -> Any:
        """Change the keyring, and wait until the agent has taken that up; give what the verb printed."""
        reloads = sum(line.get("event") == "reload.done" for line in self.agent.log)
        result = self.said(verb, *arguments)
        self.agent.wait_for("reload.done", count=reloads + 1)
        return result

    def rotate(self) -> str:
        """Give the key a new version; give its ID."""
        version: str = self.does("rotate", "alias/a")["KeyVersion"]["KeyVersionId"]
        return version


@contextmanager
def rotating_agent(folder: Path) -> Iterator[Rotating]:
    """An agent with a keyring of its own in a folder."""
    keyring = new_keyring(folder)
    with serving(keyring, folder / "agent.sock", command=WATCHFUL) as agent:
        yield Rotating(agent, keyring)
