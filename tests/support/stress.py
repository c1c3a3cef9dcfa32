"""An agent under siege: an honest client beside whatever is done to it, and what has to be true afterwards."""

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
"""Seconds between the honest client's requests while nobody waits for it: the machine is the test's, too."""
_FAULTS = ("connection.failed", "request.failed", "audit.failed", "accept.failed")


def many(usual: int, heavy: int) -> int:
    """How many: as usual, or in a run that may take minutes (`make hostile`)."""
    return heavy if HEAVY else usual


_GROWS = many(16, 64) * 2**20
"""Bytes that resident memory may differ by after something new: an allocator gives little back, but uses it again."""


class Honest:
    """A client that encrypts and decrypts, one request after the other, in a thread, and compares."""

    def __init__(self, path: Path) -> None:
        self._kms = Client(path, timeout=PATIENCE)
        self._changed = threading.Condition()
        self._count = self._wanted = 0
        self._error: BaseException | None = None
        self._done = False
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Self:
        self._thread.start()
        self.is_served(1)
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
                    if self._count >= self._wanted:  # nobody waits for more: it goes on at its leisure
                        self._changed.wait(_LEISURE)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def is_served(self, more: int = 20) -> None:
        """Wait until it got so many more right answers. Raises what went wrong for it."""
        with self._changed:
            until = self._count + more
            self._wanted = max(until, self._wanted)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._error or self._count >= until, PATIENCE)
            if self._error:
                raise self._error


class Siege:
    """One agent, with a record and metrics, and the honest client beside."""

    def __init__(self, agent: RunningAgent, folder: Path, honest: Honest) -> None:
        self.agent = agent
        self.socket = agent.socket
        self.record = folder / "audit.jsonl"
        self.honest = honest
        self._metrics = folder / "metrics.sock"
        self._before = self.look()

    def look(self) -> tuple[int, int, int]:
        """Connections, descriptors, and resident memory in bytes, as the agent itself says."""
        samples = scraped(self._metrics)
        names = ("keyferry_connections", "process_open_fds", "process_resident_memory_bytes")
        connections, descriptors, memory = (int(samples[name]) for name in names)
        return connections, descriptors, memory

    def connect(self) -> RawConnection:
        """One more connection."""
        return RawConnection(self.socket)

    def answered(self, operation: str = "") -> int:
        """How many requests are in the record: all, or of one operation."""
        return self.record.read_bytes().count(f'"operation": "{operation}'.encode())

    def begins_here(self) -> None:
        """What is to be come back to is what is there now."""
        self._before = self.look()

    def is_over(self, grows: int = _GROWS) -> None:
        """The honest client is served, all that the peers took has come back, and nothing was the agent's fault."""
        self.honest.is_served()
        connections, descriptors, memory = self._before
        while self.look()[:2] != (connections, descriptors):  # it has not seen all of them leave yet
            self.honest.is_served(1)
        grown = self.look()[2] - memory
        assert grown < grows, f"{grown / 2**20:.1f} MiB more than before"
        assert not [line for line in self.agent.log if line["event"] in _FAULTS]
        assert "Traceback" not in "".join(self.agent.output)


def limits(folder: Path, tables: str, mode: str = "0660") -> list[str]:
    """Arguments for an agent with a development keyring, a record, metrics, and these limits."""
    return configured(
        folder / "agent.sock",
        f'mode = "{mode}"\n[limits]\n{tables}\n'
        f'[audit]\npath = "{folder}/audit.jsonl"\n[metrics]\nlisten = "{folder}/metrics.sock"\n',
    )


@contextmanager
def besieged(folder: Path, tables: str = "connections_per_user = 1024", mode: str = "0660") -> Iterator[Siege]:
    """An agent of a test's own, with these limits; at the end it has to be as it was, and to stop as it should."""
    path = folder / "agent.sock"
    with RunningAgent(limits(folder, tables, mode), path) as agent:
        with Honest(path) as honest:
            siege = Siege(agent, folder, honest)
            yield siege
            siege.is_over()
        assert agent.stop() == 0
    assert chain.verify([siege.record]).beginning


def until_closed(connection: RawConnection) -> list[wire.Response]:
    """All answers until the agent hangs up."""
    answers = []
    try:
        while (answer := connection.response()) is not None:
            answers.append(answer)
    except (ConnectionResetError, BrokenPipeError):
        pass
    return answers


def fill(connection: RawConnection, data: bytes) -> int:
    """Send data again and again until nobody takes any more; give how many bytes went."""
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
    """A bare socket that has connected."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(PATIENCE)
    made.connect(str(path))
    return made
