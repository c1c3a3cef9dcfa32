"""The host: a keyring, a configuration, an agent on a socket that is held for it, clients in processes, and an operator."""

import io
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from support.agent import PATIENCE, RunningAgent
from support.fake_service_manager import LAUNCH
from support.keyring import change, new_keyring, opened
from support.keys import ALGORITHMS
from support.scrape import scraped

from .client import KINDS
from .workload import KEYS, SELDOM, SOMETIMES

__all__ = ["ACTIONS", "Host"]

_SPARE = "alias/spare"

_CONFIGURATION = """\
keyring = "{folder}/keyring.age"
unseal = "{folder}/identity"
memory = "prefer"
socket = "{folder}/agent.sock"
[audit]
path = "{folder}/audit.jsonl"
[metrics]
listen = "{folder}/metrics.sock"
[[grant]]
name = "all"
to = {{ uid = {uid} }}
actions = ["kms:*"]
keys = ["alias/a", "alias/sm4", "alias/seldom", "alias/spare", "alias/never"]
[[grant]]
name = "sometimes"
to = {{ uid = {uid} }}
actions = ["kms:{action}"]
keys = ["alias/sometimes"]
"""


class Host:
    """The host of a soak. `counts`: the number of each action."""

    def __init__(self, folder: Path, clients: int, pace: float, seed: int) -> None:
        self.folder = folder
        self.socket = folder / "agent.sock"
        with redirect_stdout(io.StringIO()):
            self.keyring = new_keyring(folder)
        self.counts: dict[str, int] = {}
        self.killed: set[int] = set()
        """Process IDs of clients that were killed."""
        self.cut: list[str] = []
        """The last line of the record at each moment when an agent was killed."""
        self.journals: list[Path] = []
        self.wrong: list[str] = []
        self._pace = pace / clients
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._rotated = itertools.count(1)
        for alias, spec in ((KEYS[1], "Aliyun_SM4"), (SOMETIMES, "Aliyun_AES_256"), (SELDOM, "Aliyun_SM4")):
            self._change("create-key", "--alias", alias, "--key-spec", spec)
        self._change("create-key", "--alias", _SPARE)
        self._granted = itertools.cycle(("Encrypt", "Decrypt"))
        self._enabled = itertools.cycle(("disable", "enable"))
        self._deleted = itertools.cycle((("schedule-deletion", _SPARE, "--days", "7"), ("cancel-deletion", _SPARE)))
        self._aliased = itertools.cycle((("create-alias", "alias/more", SELDOM), ("delete-alias", "alias/more")))
        self._configure()
        self._listening = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM
        )  # held over restarts, as by a service manager
        self._listening.bind(str(self.socket))
        self._listening.listen()
        self.agent = self._start()
        self._clients = [self._client(KINDS[n % len(KINDS)], ALGORITHMS[n % len(ALGORITHMS)]) for n in range(clients)]

    def _configure(self) -> None:
        text = _CONFIGURATION.format(folder=self.folder, uid=os.getuid(), action=next(self._granted))
        new = self.folder / "agent.new"
        new.write_text(text)
        new.rename(self.folder / "agent.toml")

    def _start(self) -> RunningAgent:
        descriptor = self._listening.fileno()
        return RunningAgent(
            ["--config", f"{self.folder}/agent.toml"],
            None,
            prefix=[sys.executable, "-c", LAUNCH, str(descriptor), "default"],
            pass_fds=[descriptor],
        ).__enter__()  # until `end`

    def _client(self, kind: str, algorithm: str) -> tuple[str, str, "subprocess.Popen[bytes]"]:
        number = next(self._numbers)
        journal = self.folder / f"client-{number}.jsonl"
        journal.touch()
        self.journals.append(journal)
        arguments = [kind, algorithm, str(self.socket), str(journal), str(self._pace), str(number)]
        process = subprocess.Popen([sys.executable, "-m", "soak.client", *arguments])
        return kind, algorithm, process

    def _change(self, verb: str, *arguments: str) -> None:
        with redirect_stdout(io.StringIO()):
            change(self.keyring, verb, *arguments)

    def count(self, what: str) -> None:
        """Count something that was done."""
        self.counts[what] = self.counts.get(what, 0) + 1

    @contextmanager
    def _reloaded(self) -> Iterator[None]:
        """Change files in the block, and have them read: by SIGHUP, if the agent has not seen it itself by then."""
        before = sum(line["event"] == "reload.done" for line in self.agent.log)
        yield
        self.agent.signal(signal.SIGHUP)
        self.agent.wait_for("reload.done", before + 1)

    # --- actions of the operator --------------------------------------------------------------------------------------

    def grants(self) -> None:
        """Grant something to the clients, or take it from them again."""
        with self._reloaded():
            self._configure()
        self.count("reloads with other grants")

    def rotate(self) -> None:
        """Rotate a key, directly or by a staged version."""
        if self._random.random() < 0.5:
            with self._reloaded():
                self._change("rotate", self._random.choice(KEYS))
        else:
            name = self._random.choice(KEYS)
            with self._reloaded():
                self._change("rotate", name, "--stage")
            with self._reloaded():
                self._change("promote", name, opened(self.keyring).find(name).versions[-1].version_id)
        self.count("rotations")

    def able(self) -> None:
        """Disable a key that clients use, or enable it again."""
        with self._reloaded():
            self._change(next(self._enabled), SELDOM)
        self.count("keys disabled or enabled")

    def delete(self) -> None:
        """Schedule a key's deletion, or cancel it."""
        with self._reloaded():
            self._change(*next(self._deleted))
        self.count("deletions scheduled or cancelled")

    def alias(self) -> None:
        """Make an alias, or delete it."""
        with self._reloaded():
            self._change(*next(self._aliased))
        self.count("aliases made or deleted")

    def rotate_record(self) -> None:
        """Move the audit log away, as logrotate does."""
        before = sum(line["event"] == "audit.reopened" for line in self.agent.log)
        (self.folder / "audit.jsonl").rename(self.folder / f"audit.jsonl.{next(self._rotated)}")
        self.agent.wait_for("audit.reopened", before + 1)
        self.count("records moved away")

    # --- events -------------------------------------------------------------------------------------------------------

    def kill_client(self) -> None:
        """Kill a client in the middle of its work, and start another like it."""
        place = self._random.randrange(len(self._clients))
        kind, algorithm, process = self._clients[place]
        process.kill()
        process.wait()
        self.killed.add(process.pid)
        self._clients[place] = self._client(kind, algorithm)
        self.count("clients killed")

    def restart(self) -> None:
        """The agent is stopped, and started again."""
        self._again(signal.SIGTERM)
        self.count("restarts")

    def crash(self) -> None:
        """The agent is killed, and started again."""
        self._again(signal.SIGKILL)
        self.count("agents killed")

    def _again(self, number: signal.Signals) -> None:
        self.agent.signal(number)
        self.agent.wait()
        if number == signal.SIGKILL:
            lines = (self.folder / "audit.jsonl").read_bytes().splitlines(keepends=True)
            self.cut += [line[:-1].decode() for line in lines if line.endswith(b"\n")][-1:]
        self.end()
        self.agent = self._start()

    def end(self) -> None:
        """Stop the agent if it still runs, and note its logged faults."""
        if self.agent.process.poll() is None and self.agent.stop():
            self.wrong.append("the agent did not end as it should")
        self.agent.kill()
        self.wrong += [str(line) for line in self.agent.log if line["level"] in ("warning", "error")]

    def look(self) -> tuple[float, float, float]:
        """The agent's own metrics: resident memory in bytes, descriptors, connections."""
        samples = scraped(self.folder / "metrics.sock")
        return (
            samples["process_resident_memory_bytes"],
            samples["process_open_fds"],
            samples["keyferry_connections"],
        )

    def records(self) -> list[Path]:
        """Return the files of the audit log, oldest first."""
        moved = self.counts.get("records moved away", 0)
        return [self.folder / f"audit.jsonl.{number}" for number in range(1, moved + 1)] + [self.folder / "audit.jsonl"]

    def stop_clients(self) -> None:
        """End all clients, when they have their answers."""
        for kind, algorithm, process in self._clients:
            process.terminate()
            code = process.wait(PATIENCE)
            self.wrong += [f"the {kind} client for {algorithm} ended with {code}"] if code else []
        self._clients.clear()

    def settle(self) -> None:
        """Leave every key usable, and everything granted that was ever sealed."""
        if self.counts.get("keys disabled or enabled", 0) % 2:
            self.able()
        while 'actions = ["kms:Decrypt"]' not in (self.folder / "agent.toml").read_text():
            self.grants()

    def close(self) -> None:
        """End everything."""
        for _, _, process in self._clients:
            process.kill()
            process.wait()
        self.agent.kill()
        self._listening.close()


ACTIONS: tuple[Callable[[Host], None], ...] = (
    Host.grants,
    Host.rotate,
    Host.kill_client,
    Host.able,
    Host.rotate_record,
    Host.delete,
    Host.alias,
)
