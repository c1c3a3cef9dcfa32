"""The latency of a client with one request at a time beside a greedy client whose pipeline is always full."""

from ..agent_under_test import agent_under_test, requests
from ..figures import percentile, ratios
from ..load import Connection, closed_loop_latencies, latencies_beside_greedy
from ..run_context import Session

PART = "Fairness"


def run(session: Session) -> None:
    """Measure the 99th percentile of the single client, over its value alone."""
    alone, beside = [], []
    with agent_under_test() as agent, Connection(agent.path, requests(agent.aliases)) as honest:
        for _ in range(session.rounds):
            alone.append(percentile(closed_loop_latencies(honest, 2 * session.seconds), 99))
            with Connection(agent.path, requests(agent.aliases)) as greedy:
                beside.append(percentile(latencies_beside_greedy(honest, greedy, 2 * session.seconds), 99))
            closed_loop_latencies(honest, session.seconds / 4)  # until the requests of the greedy client are answered
    session.add(
        PART,
        "one at a time beside a full pipeline, 99th percentile",
        ratios(beside, alone),
        unit="× alone",
        absolute=f"{percentile(beside, 50) * 1e6:,.0f} µs",
        note="both on connections of their own, of one user",
    )
