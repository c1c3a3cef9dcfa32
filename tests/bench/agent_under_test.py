"""The agent as it is measured: a sealed keyring made by the real verbs, grants, a record in a file, locked memory."""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from support.agent import RunningAgent
from support.keyring import opened, run
from support.keys import recipient

from keyferry.protocol import wire
from keyferry_agent.keyring import edits, file
from keyferry_agent.keyring.sealing import Unsealer

from .baselines import CONTEXT
from .cpu import SERVER

__all__ = [
    "CONTEXT",
    "GRANTS",
    "KEYS",
    "AgentUnderTest",
    "agent_starter",
    "agent_under_test",
    "distinct_requests",
    "requests",
]

KEYS = 10
"""Keys in the keyring, where nothing else is said."""
GRANTS = 50
"""Grants in the configuration, where nothing else is said. All are to the caller; one in five covers the keys."""
_CONNECTIONS = 1_100
_FEWEST = 100
_UNLIKE = 40_000
MSGID = 1 << 16
"""Message IDs from here on are packed in five bytes each."""


class AgentUnderTest(NamedTuple):
    """A running agent, and the aliases of its keys."""

    agent: RunningAgent
    aliases: list[str]

    @property
    def path(self) -> str:
        """Its socket."""
        return str(self.agent.socket)

    @property
    def pid(self) -> int:
        """Its process."""
        return self.agent.process.pid

    def resident(self) -> int:
        """Bytes of memory that are resident."""
        found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024


def _keyring(folder: Path, keys: int) -> list[str]:
    """Make a keyring of some keys by the verbs: alias/k0, alias/k1 and so on; return the aliases."""
    path, identity = folder / "keyring.age", folder / "identity"
    with contextlib.redirect_stdout(io.StringIO()):
        run("init", path, "--new-identity", identity)
    aliases = [f"alias/k{number}" for number in range(keys)]
    with file.change(path, Unsealer.read(identity)) as document:  # all at once: each command would write the file anew
        for alias in aliases:
            edits.create_key(document, key_spec="Aliyun_AES_256", alias=alias)
    assert len(opened(path).keys) == keys
    return aliases


def _configuration(folder: Path, grants: int) -> str:
    """Everything on. The grant that decides is the last one; the others are to the caller as well, and cover other keys."""
    lines = [
        f'keyring = "{folder / "keyring.age"}"',
        f'unseal = "{folder / "identity"}"',
        'memory = "require"',
        f"[limits]\nconnections = {_CONNECTIONS}\nconnections_per_user = {_CONNECTIONS}",
        f'[audit]\npath = "{folder / "audit.jsonl"}"',
    ]
    for number in range(grants):
        keys = "alias/k*" if number == grants - 1 else f"alias/other-{number}-*"
        lines.append(
            f'[[grant]]\nname = "{number}"\nto = {{ uid = {os.getuid()} }}\n'
            f'actions = ["kms:*"]\nkeys = ["{keys}"]\nencryption_context = {{ tenant = "acme" }}'
        )
    return "\n".join(lines)


def _nothing(_folder: Path) -> str:
    return ""


@contextmanager
def agent_starter(
    *,
    keys: int = KEYS,
    grants: int = GRANTS,
    cores: frozenset[int] = SERVER,
    more: Callable[[Path], str] = _nothing,
) -> Iterator[Callable[[], AbstractContextManager[AgentUnderTest]]]:
    """Yield a starter that runs an agent on its core for the time of a `with` block.

    `more` gets the folder of `keyring.age` and its `identity`, and returns tables for the end of the configuration.
    """
    with tempfile.TemporaryDirectory(prefix="keyferry-bench-") as name:
        folder = Path(name)
        aliases = _keyring(folder, keys)
        config = folder / "agent.toml"
        config.write_text(f"{_configuration(folder, grants)}\n{more(folder)}")

        @contextmanager
        def start() -> Iterator[AgentUnderTest]:
            arguments, path = ["--config", str(config)], folder / "agent.sock"
            with RunningAgent(arguments, path, preexec=lambda: os.sched_setaffinity(0, cores)) as agent:
                assert agent.wait_for("agent.serving")["memory_protection"] != "none"
                yield AgentUnderTest(agent, aliases)

        yield start


@contextmanager
def agent_under_test(
    *, keys: int = KEYS, grants: int = GRANTS, cores: frozenset[int] = SERVER
) -> Iterator[AgentUnderTest]:
    """An agent that serves, on its core."""
    with agent_starter(keys=keys, grants=grants, cores=cores) as start, start() as agent:
        yield agent


def distinct_requests(aliases: Sequence[str]) -> list[bytes]:
    """Return requests with a context each, so many that none is remembered when it repeats."""
    params = recipient("RSAES_OAEP_SHA_256").params
    return [
        wire.encode_request(
            MSGID + turn,
            "GenerateAndExportDataKey",
            {
                "KeyId": aliases[turn % len(aliases)],
                "NumberOfBytes": 32,
                "EncryptionContext": CONTEXT | {"record": f"{turn:06}"},
                **params,
            },
        )
        for turn in range(_UNLIKE)
    ]


def requests(aliases: Sequence[str], *, algorithm: str = "RSAES_OAEP_SHA_256", size: int = 32) -> list[bytes]:
    """Return at least a hundred GenerateAndExportDataKey requests: for each of many keys once, or for few keys in turn."""
    params: dict[str, Any] = {"NumberOfBytes": size, "EncryptionContext": CONTEXT, **recipient(algorithm).params}
    return [
        wire.encode_request(MSGID + turn, "GenerateAndExportDataKey", {"KeyId": aliases[turn % len(aliases)], **params})
        for turn in range(max(_FEWEST, len(aliases)))
    ]
