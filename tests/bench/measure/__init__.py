"""The measurements: each module is a part of the table, and has a `run` that adds its lines to a session."""

from collections.abc import Callable
from typing import Final

from ..run_context import Session
from . import client, fairness, footprint, gateway, latency, module, scale, sm2, throughput
from . import peers as others

__all__ = ["PARTS"]

PARTS: Final[dict[str, Callable[[Session], None]]] = {
    "throughput": throughput.run,
    "sm2": sm2.run,
    "client": client.run,
    "gateway": gateway.run,
    "latency": latency.run,
    "fairness": fairness.run,
    "scale": scale.run,
    "footprint": footprint.run,
    "module": module.run,
    "peers": others.run,
}
"""By the name that the command takes, in the table's order."""
