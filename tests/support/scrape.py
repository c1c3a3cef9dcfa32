"""Metrics, as Prometheus gets them."""

import socket
from http.client import HTTPConnection
from pathlib import Path

from .agent import PATIENCE


class UnixHTTP(HTTPConnection):
    """HTTP over a Unix socket."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self.host)


def scraped(path: Path) -> dict[str, float]:
    """Return the samples of a scrape by their names and labels."""
    connection = UnixHTTP(str(path))
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
