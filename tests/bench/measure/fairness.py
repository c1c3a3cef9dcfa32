"""The latency of a client with one request at a time beside a greedy client whose pipeline is always full."""

from ..agent_under_test import requests, subject
from ..figures import percentile, ratios
from ..load import Connection, beside_greedy, one_at_a_time
from ..run_context import Session

PART = "Fairness"


def run(session: Session) -> None:
    """Measure the 99th percentile of the single client, over its value alone."""
    alone, beside = [], []
    with subject() as agent, Connection(agent.path, requests(agent.aliases)) as honest:
        for _ in range(session.rounds):
            alone.append(percentile(one_at_a_time(honest, 2 * session.seconds), 99))
            with Connection(agent.path, requests(agent.aliases)) as greedy:
                beside.append(percentile(beside_greedy(honest, greedy, 2 * session.seconds), 99))
            one_at_a_time(honest, session.seconds / 4)  # until the requests of the greedy client are answered
    session.add(
        PART,
        "one at a time beside a full pipeline, 99th percentile",
        ratios(beside, alone),
        unit="× alone",
        absolute=f"{percentile(beside, 50) * 1e6:,.0f} µs",
        note="both on connections of their own, of one user",
    )
