"""Sealed keyrings in files, made and changed by the verbs of the command line, and agents that serve them."""

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Final, TypeAlias

from keyferry_agent.cli.main import main
from keyferry_agent.keyring import file
from keyferry_agent.keyring.document import Document
from keyferry_agent.keyring.sealing import Unsealer, seal

from .agent import RawConnection, RunningAgent

Command: TypeAlias = Callable[..., Any]
WATCHFUL: Final = (
    "-c",
    (
        "import sys; from keyferry_agent.daemon import reload; from keyferry_agent.cli.main import main; "
        "reload._LOOK_EVERY = 0.05; sys.exit(main())"
    ),
)
"""The command of an agent that looks for replaced files 20 times a second instead of twice, for tests that wait for it."""


def run(verb: str, path: Path, *arguments: object, code: int = 0) -> None:
    """One verb on a keyring, in this process."""
    assert main(["keyring", verb, str(path), *map(str, arguments)]) == code


def change(path: Path, verb: str, *arguments: object) -> None:
    """One verb on a keyring that the identity beside it opens."""
    run(verb, path, *arguments, "--unseal", path.parent / "identity")


def printed(path: Path, verb: str, *arguments: object) -> Any:
    """Return what a verb with --json prints on a keyring that the identity beside it opens."""
    with redirect_stdout(io.StringIO()) as out:
        change(path, verb, *arguments, "--json")
    return json.loads(out.getvalue())


def new_keyring(folder: Path) -> Path:
    """A keyring sealed to a fresh identity beside it (`identity`), with one key: alias/a."""
    path = folder / "keyring.age"
    run("init", path, "--new-identity", folder / "identity")
    change(path, "create-key", "--alias", "alias/a")
    return path


def opened(keyring: Path) -> Document:
    """Return the content of the file."""
    return file.read(keyring, Unsealer.read(keyring.parent / "identity"))


def rewritten(keyring: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the content by hand, as an operator with the age program would."""
    raw = json.loads(Unsealer.read(keyring.parent / "identity").unseal(keyring.read_bytes()))
    edit(raw)
    keyring.write_bytes(seal(json.dumps(raw).encode(), raw["Recipients"], None))


def copied(path: Path, content: bytes) -> None:
    """Put a file in place as deployment tools do: beside it, and then renamed."""
    beside = path.with_name("beside")
    beside.write_bytes(content)
    beside.replace(path)


def configuration(keyring: Path, *, actions: str = "kms:*", more: str = "", to: str = f"uid={os.getuid()}") -> str:
    """Return a configuration that grants a user, by default this one, actions on all keys."""
    return (
        f'keyring = "{keyring}"\nunseal = "{keyring.parent / "identity"}"\nmemory = "prefer"\n{more}\n'
        f'[[grant]]\nname="me"\nto={{{to}}}\nactions=["{actions}"]\nkeys=["*"]\n'
    )


def serving(
    keyring: Path,
    socket: Path,
    *,
    preexec: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
    command: Sequence[str] = ("-m", "keyferry_agent"),
    **what: str,
) -> RunningAgent:
    """An agent, to be entered, with this keyring and a `configuration` beside it (`agent.toml`)."""
    config = keyring.parent / "agent.toml"
    config.write_text(configuration(keyring, **what))
    return RunningAgent(["--config", str(config)], socket, preexec=preexec, environment=environment, command=command)


@contextmanager
def two_callers(keyring: Path, grants: Iterable[str]) -> Iterator[tuple[RawConnection, RawConnection]]:
    """An agent with two listeners: one that everything is granted to, and one that only these grants are to.

    A grant is the text of its `actions`, `keys` and so on.
    """
    config = keyring.parent / "agent.toml"
    text = f'keyring = "{keyring}"\nunseal = "{keyring.parent / "identity"}"\nmemory = "prefer"\n'
    for name in ("admin", "app"):
        text += f'[[listener]]\nname = "{name}"\npath = "{keyring.parent / name}"\n'
    text += '[[grant]]\nname = "all"\nto = { listener = "admin" }\nactions = ["kms:*"]\nkeys = ["*"]\n'
    for number, grant in enumerate(grants):
        text += f'[[grant]]\nname = "{number}"\nto = {{ listener = "app" }}\n{grant}\n'
    config.write_text(text)
    with (
        RunningAgent(["--config", str(config)], None),
        RawConnection(keyring.parent / "admin") as admin,
        RawConnection(keyring.parent / "app") as app,
    ):
        yield admin, app
