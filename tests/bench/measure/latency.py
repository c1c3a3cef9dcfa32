"""How long an answer takes when requests come at a rate of their own, and do not wait for each other."""

import math

from ..agent_under_test import agent_under_test, requests
from ..cpu import processor_seconds
from ..figures import Curve, percentile
from ..load import Connection, open_loop, pipelined
from ..run_context import Bare, Session
from .throughput import DEPTH

PART = "Latency at a rate that does not wait"
LOADS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PERCENTILES = (50, 99)
SELDOM = 200
"""Requests each second of an application that is not busy: the agent sleeps before each."""


def run(session: Session) -> None:
    """Measure median and 99th percentile at shares of the agent's capacity."""
    curves = [
        Curve("latency", f"{percent}th percentile", "offered load, × bare loop", "latency, × bare loop's turn")
        for percent in PERCENTILES
    ]
    with agent_under_test() as agent, Connection(agent.path, requests(agent.aliases)) as line:
        for load in (0.2, 0.5, 0.8) if session.quick else LOADS:
            offered: list[float] = []
            took: dict[int, list[float]] = {percent: [] for percent in PERCENTILES}
            for _ in range(session.rounds):
                bare = session.bare(Bare())
                rate = load * pipelined(line, DEPTH, session.seconds / 2)
                latencies = open_loop(line, rate, session.seconds)
                offered.append(rate / bare)
                for percent in PERCENTILES:
                    took[percent].append(percentile(latencies, percent) * bare)
            for curve, percent in zip(curves, PERCENTILES, strict=True):
                curve.add(percentile(offered, 50), took[percent])
            if math.isclose(load, 0.5):
                for percent in PERCENTILES:
                    session.add(
                        PART,
                        f"half of what it can do, {percent}th percentile",
                        took[percent],
                        note="from when a request was due, not from when it was sent",
                    )
        seldom: list[float] = []
        for _ in range(session.rounds):
            bare, before = session.bare(Bare()), processor_seconds(agent.pid)
            count = len(open_loop(line, SELDOM, 2 * session.seconds))
            seldom.append((processor_seconds(agent.pid) - before) / count * bare)
    session.add(PART, f"processor time of one request at {SELDOM}/s", seldom, unit="× bare loop's turn")
    session.curves += curves
