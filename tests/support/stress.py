"""An agent under stress, with a background client beside the test, and the checks of its recovery."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from keyferry import Client
from keyferry.parameters import decode_base64, encode_base64
from keyferry.protocol import wire
from keyferry_agent.chained_log import chain

from .agent import PATIENCE, RawConnection, RunningAgent, configured
from .scrape import scraped

HEAVY = "KEYFERRY_HOSTILE" in os.environ
PING = wire.encode_request(1, "DescribeKey", {"KeyId": "alias/dev"})
_LEISURE = 0.02
"""Seconds between the background client's requests while no test waits for them."""
_FAULTS = ("connection.failed", "request.failed", "audit.failed", "accept.failed")


def scale(usual: int, heavy: int) -> int:
    """Return the usual number, or the heavy one in a run that may take minutes (`make hostile`)."""
    return heavy if HEAVY else usual


_GROWS = scale(16, 64) * 2**20
"""Bytes that resident memory may grow by: an allocator returns little memory, but uses it again."""


class BackgroundClient:
    """A client in a thread that encrypts, decrypts and compares, one request at a time."""

    def __init__(self, path: Path) -> None:
        self._kms = Client(path, timeout=PATIENCE)
        self._changed = threading.Condition()
        self._count = self._wanted = 0
        self._error: BaseException | None = None
        self._done = False
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Self:
        self._thread.start()
        self.wait_served(1)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done = True
        self._thread.join()
        self._kms.close()

    def _ask(self) -> None:
        try:
            while not self._done:
                context = {"n": str(self._count)}
                plaintext = b"honest %d" % self._count
                made = self._kms.encrypt(
                    key_id="alias/dev", plaintext=encode_base64(plaintext), encryption_context=context
                )
                opened = self._kms.decrypt(ciphertext_blob=made.ciphertext_blob, encryption_context=context)
                assert decode_base64(opened.plaintext) == plaintext
                with self._changed:
                    self._count += 1
                    self._changed.notify_all()
                    if self._count >= self._wanted:  # no test waits for more
                        self._changed.wait(_LEISURE)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def wait_served(self, more: int = 20) -> None:
        """Wait for `more` further correct answers; raise the exception of the client's thread."""
        with self._changed:
            until = self._count + more
            self._wanted = max(until, self._wanted)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._error or self._count >= until, PATIENCE)
            if self._error:
                raise self._error


class AgentUnderTest:
    """An agent with an audit log, metrics and a background client."""

    def __init__(self, agent: RunningAgent, folder: Path, honest: BackgroundClient) -> None:
        self.agent = agent
        self.socket = agent.socket
        self.record = folder / "audit.jsonl"
        self.background = honest
        self._metrics = folder / "metrics.sock"
        self._before = self.look()

    def look(self) -> tuple[int, int, int]:
        """Return connections, descriptors and resident memory in bytes from the agent's metrics."""
        samples = scraped(self._metrics)
        names = ("keyferry_connections", "process_open_fds", "process_resident_memory_bytes")
        connections, descriptors, memory = (int(samples[name]) for name in names)
        return connections, descriptors, memory

    def connect(self) -> RawConnection:
        """Return a new connection."""
        return RawConnection(self.socket)

    def count_audited(self, operation: str = "") -> int:
        """Return the number of audited requests, of one operation or of all."""
        return self.record.read_bytes().count(f'"operation": "{operation}'.encode())

    def set_baseline(self) -> None:
        """Make the current use of resources the one that the agent has to return to."""
        self._before = self.look()

    def assert_recovered(self, grows: int = _GROWS) -> None:
        """Assert that the background client is served, resources are released, and the agent logged no fault."""
        self.background.wait_served()
        connections, descriptors, memory = self._before
        while self.look()[:2] != (connections, descriptors):  # it has not seen all of them leave yet
            self.background.wait_served(1)
        grown = self.look()[2] - memory
        assert grown < grows, f"{grown / 2**20:.1f} MiB more than before"
        assert not [line for line in self.agent.log if line["event"] in _FAULTS]
        assert "Traceback" not in "".join(self.agent.output)


def limits(folder: Path, tables: str, mode: str = "0660") -> list[str]:
    """Return arguments for an agent with a development keyring, an audit log, metrics and limits."""
    return configured(
        folder / "agent.sock",
        f'mode = "{mode}"\n[limits]\n{tables}\n'
        f'[audit]\npath = "{folder}/audit.jsonl"\n[metrics]\nlisten = "{folder}/metrics.sock"\n',
    )


@contextmanager
def agent_under_stress(
    folder: Path, tables: str = "connections_per_user = 1024", mode: str = "0660"
) -> Iterator[AgentUnderTest]:
    """Run an agent with limits; at the end it has to recover, and to stop cleanly."""
    path = folder / "agent.sock"
    with RunningAgent(limits(folder, tables, mode), path) as agent:
        with BackgroundClient(path) as honest:
            target = AgentUnderTest(agent, folder, honest)
            yield target
            target.assert_recovered()
        assert agent.stop() == 0
    assert chain.verify([target.record]).beginning


def until_closed(connection: RawConnection) -> list[wire.Response]:
    """Return all answers until the agent closes the connection."""
    answers = []
    try:
        while (answer := connection.response()) is not None:
            answers.append(answer)
    except (ConnectionResetError, BrokenPipeError):
        pass
    return answers


def fill(connection: RawConnection, data: bytes) -> int:
    """Send data repeatedly until the socket takes no more; return the number of bytes."""
    connection.socket.setblocking(False)
    sent = 0
    try:
        while True:
            sent += connection.socket.send(data[sent % len(data) :])
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        return sent
    finally:
        connection.socket.settimeout(PATIENCE)


def half_open(path: Path) -> socket.socket:
    """Return a connected socket."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(PATIENCE)
    made.connect(str(path))
    return made
