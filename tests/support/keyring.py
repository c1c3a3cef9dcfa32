"""Sealed keyrings in files, made and changed by the verbs of the command line, and agents that serve them."""

import os
from collections.abc import Callable
from pathlib import Path

from keyferry_agent.command import main

from .agent import RunningAgent


def run(verb: str, path: Path, *arguments: object, code: int = 0) -> None:
    """One verb on a keyring, in this process."""
    assert main(["keyring", verb, str(path), *map(str, arguments)]) == code


def change(path: Path, verb: str, *arguments: object) -> None:
    """One verb on a keyring that the identity beside it opens."""
    run(verb, path, *arguments, "--unseal", path.parent / "identity")


def new_keyring(folder: Path) -> Path:
    """A keyring sealed to a fresh identity beside it (`identity`), with one key: alias/a."""
    path = folder / "keyring.age"
    run("init", path, "--new-identity", folder / "identity")
    change(path, "create-key", "--alias", "alias/a")
    return path


def configuration(keyring: Path, *, actions: str = "kms:*", more: str = "") -> str:
    """The text of a configuration that grants this user actions on all keys."""
    return (
        f'keyring = "{keyring}"\nunseal = "{keyring.parent / "identity"}"\nmemory = "prefer"\n{more}\n'
        f'[[grant]]\nname="me"\nto={{uid={os.getuid()}}}\nactions=["{actions}"]\nkeys=["*"]\n'
    )


def serving(keyring: Path, socket: Path, *, more: str = "", preexec: Callable[[], None] | None = None) -> RunningAgent:
    """An agent, to be entered, with this keyring and a configuration beside it (`agent.toml`)."""
    config = keyring.parent / "agent.toml"
    config.write_text(configuration(keyring, more=more))
    return RunningAgent(["--config", str(config)], socket, preexec=preexec)
