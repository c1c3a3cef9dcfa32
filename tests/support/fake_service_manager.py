"""A service manager for one agent, on real sockets: systemd's sockets, states, watchdog and stored descriptors."""

import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .agent import PATIENCE, RunningAgent

LAUNCH = """
import fcntl, os, sys
descriptors = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 100) for n in sys.argv[1].split(",") if n]
for place, descriptor in enumerate(descriptors):
    os.dup2(descriptor, 3 + place, inheritable=True)
    os.close(descriptor)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(descriptors)), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""


class Manager:
    """Starts agents, and receives their notifications. `kept`: the stored descriptors, by name."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "notify"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self._path))
        self._notify.settimeout(PATIENCE)
        self.kept: dict[str, int] = {}
        self.heard: list[str] = []

    def listening(self, path: Path) -> socket.socket:
        """A socket that is listened on before any agent is there."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.bind(str(path))
        made.listen()
        return made

    def start(
        self,
        arguments: Sequence[str],
        sockets: Sequence[tuple[str, socket.socket]] = (),
        *,
        path: Path | None = None,
        watchdog: float = 0,
        ready: bool = True,
    ) -> RunningAgent:
        """Start an agent with these sockets and the kept descriptors; wait for its `ready`."""
        given = [(name, each.fileno()) for name, each in sockets] + list(self.kept.items())
        numbers = [number for _, number in given]
        environment = {"NOTIFY_SOCKET": str(self._path)}
        if watchdog:
            environment["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
        self.heard.clear()
        agent = RunningAgent(
            arguments,
            path,
            prefix=[sys.executable, "-c", LAUNCH, ",".join(map(str, numbers)), ":".join(name for name, _ in given)],
            environment=environment,
            pass_fds=numbers,
        )
        try:
            if ready:
                self.wait_for("READY=1")
        except BaseException:
            agent.kill()
            raise
        return agent

    def wait_for(self, line: str) -> list[str]:
        """Receive until a notification has this line; return the lines of that notification."""
        return self._hear(lambda lines: line in lines)

    def wait_for_status(self, beginning: str) -> list[str]:
        """Receive until a status begins with this text; return the lines of that notification."""
        return self._hear(lambda lines: any(line.startswith(f"STATUS={beginning}") for line in lines))

    def _hear(self, wanted: Callable[[list[str]], bool]) -> list[str]:
        while True:
            said, descriptors, _, _ = socket.recv_fds(self._notify, 65_536, 4)
            lines = said.decode().split("\n")
            self.heard += lines
            told = dict(each.split("=", 1) for each in lines)
            if "FDSTORE" in told:
                self.kept[told["FDNAME"]] = descriptors.pop()
            if "FDSTOREREMOVE" in told and told["FDNAME"] in self.kept:
                os.close(self.kept.pop(told["FDNAME"]))
            assert not descriptors
            if wanted(lines):
                return lines

    def close(self) -> None:
        """Forget everything."""
        self._notify.close()
        for descriptor in self.kept.values():
            os.close(descriptor)
        self.kept.clear()
