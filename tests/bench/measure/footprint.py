"""The resources of an idle agent: memory at rest and for each connection, and the time until it is ready."""

import time
from contextlib import ExitStack

from ..agent_under_test import KEYS, agent_starter, agent_under_test, requests
from ..figures import Target
from ..load import Connection, pipelined
from ..run_context import Session

PART = "At rest"
IDLE = 1_000


def run(session: Session) -> None:
    """Resident memory, and the start."""
    rest, each = [], []
    for _ in range(1 if session.quick else 3):
        with agent_under_test() as agent, ExitStack() as stack:
            rest.append(agent.resident() / 1e6)
            some = requests(agent.aliases)
            with Connection(agent.path, some) as line:
                pipelined(line, 64, session.seconds)
            before = agent.resident()
            for _ in range(IDLE):  # each has asked twice
                stack.enter_context(Connection(agent.path, some))
            each.append((agent.resident() - before) / IDLE / 1024)
    session.add(PART, "resident memory", rest, unit="MB", target=Target("at most", 60), note=f"{KEYS} keys, 50 grants")
    session.add(
        PART,
        "resident memory of an idle connection",
        each,
        unit="KiB",
        target=Target("at most", 16),
        note=f"{IDLE:,} connections that have asked two things each",
    )
    took = []  # by now everything is compiled
    with agent_starter() as start:
        for _ in range(session.rounds):
            began = time.perf_counter()
            with start():
                took.append(time.perf_counter() - began)
    session.add(
        PART,
        "from exec to ready",
        took,
        unit="s",
        target=Target("at most", 0.5),
        note=f"{KEYS} keys: until it says agent.serving",
    )
