"""Bounded waits for conditions that no event reports."""

import time
from collections.abc import Callable

from keyferry import Client, Throttled

from .agent import PATIENCE

_STEP = 0.005


def wait_until(what: str, holds: Callable[[], object]) -> None:
    """Wait until `holds` returns something true. Raises AssertionError with `what` after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not in {PATIENCE:g} s"
        time.sleep(_STEP)


def is_served(kms: Client) -> bool:
    """Whether the agent serves a client, and does not throttle it."""
    try:
        return kms.get_agent_status().state == "Serving"
    except Throttled:
        return False
