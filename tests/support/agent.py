"""Real agents in real processes, and a socket to talk to them byte by byte."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from keyferry import Client
from keyferry.protocol import wire

PATIENCE = 60.0
"""Seconds that something may take that must happen: only a broken test ever waits so long."""


class RunningAgent:
    """A `keyferry-agent run` in a process of its own, with its log read line by line."""

    def __init__(
        self,
        arguments: Sequence[str],
        path: Path | None,
        *,
        preexec: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
        command: Sequence[str] = ("-m", "keyferry_agent"),
        prefix: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.socket = path or Path("/nowhere")
        self.log: list[dict[str, Any]] = []
        self.output: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._forks = "--fork" in prefix
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *command, "run", *arguments, *(["--socket", str(path)] if path else [])],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec,  # noqa: PLW1509 - it only sets limits
            pass_fds=pass_fds,
            env={**os.environ, **(environment or {})},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        try:
            self.wait_for("agent.serving")
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.output.append(line)
                if line.startswith("{"):
                    self.log.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        """Wait until the log has `count` lines of an event, and return the last of them."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.log if line.get("event") == event]

        with self._changed:
            assert self._changed.wait_for(lambda: self._ended or len(found()) >= count, PATIENCE)
            lines = found()
        assert len(lines) >= count, f"no {event} in the agent's output:\n{''.join(self.output)}"
        return lines[count - 1]

    def has_logged(self, event: str, **fields: object) -> bool:
        """Wait until the log has a line of an event with these fields."""

        def found() -> bool:
            return any(line.get("event") == event and fields.items() <= line.items() for line in self.log)

        with self._changed:
            return self._changed.wait_for(lambda: self._ended or found(), PATIENCE) and found()

    def client(self) -> Client:
        """Return a client of this agent."""
        return Client(self.socket, timeout=PATIENCE)

    def signal(self, number: signal.Signals) -> None:
        """Send the agent a signal."""
        pid = self.process.pid
        if self._forks:  # unshare is deaf while it waits for the agent
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text() or pid)
        os.kill(pid, number)

    def stop(self) -> int:
        """Send SIGTERM, and return the agent's exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait for the agent's end, and return its exit code."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def kill(self) -> None:
        """End the agent if it runs: by SIGTERM, and then by SIGKILL."""
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


class RawConnection:
    """A socket to an agent, for bytes that no client would send."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))  # with a timeout it would not wait for room in the agent's queue
        self.socket.settimeout(PATIENCE)
        self._decoder = wire.Decoder()
        self._messages: list[wire.Message] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send raw bytes."""
        self.socket.sendall(data)

    def response(self) -> wire.Response | None:
        """Return the next response, or None if the agent has closed the connection."""
        while not self._messages:
            received = self.socket.recv(65_536)
            if not received:
                return None
            self._decoder.feed(received)
            self._messages += self._decoder.messages()
        message = self._messages.pop(0)
        assert isinstance(message, wire.Response)
        return message

    def answer(self) -> wire.Response:
        """Return the next response of a connection that has to be open."""
        response = self.response()
        assert response is not None
        return response

    def call(self, method: str, params: dict[str, Any], msgid: int = 1) -> wire.Response:
        """Send a request and return its response."""
        self.send(wire.encode_request(msgid, method, params))
        return self.answer()


def configured(path: Path, tables: str) -> list[str]:
    """Return arguments for an agent with a development keyring and a configuration."""
    config = path.with_suffix(".toml")
    config.write_text(tables)
    return ["--dev", "--config", str(config)]


@contextmanager
def dev_agent(path: Path) -> Iterator[RunningAgent]:
    """Run an agent with --dev."""
    with RunningAgent(["--dev"], path) as agent:
        yield agent
