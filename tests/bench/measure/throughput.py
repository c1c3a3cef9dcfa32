"""How many GenerateAndExportDataKey to an RSA key the agent answers on one core: one at a time, in pipelines, of any size."""

from functools import partial

from ..agent_under_test import agent_under_test, distinct_requests, requests
from ..figures import Curve, Target
from ..load import Connection, closed_loop_rate, pipelined
from ..run_context import Bare, Session

PART = "RSA_2048, agent on one core"
DEPTH = 64
"""Requests under way at a time, where nothing else is said."""
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SIZES = (16, 32, 64, 128, 190)


def run(session: Session) -> None:
    """One at a time and pipelined; by depth of the pipeline; by size of the data key."""
    with agent_under_test() as agent:
        with (
            Connection(agent.path, requests(agent.aliases)) as line,
            Connection(agent.path, distinct_requests(agent.aliases)) as other,
        ):
            made = session.beside(
                {
                    "one": partial(closed_loop_rate, line),
                    "many": partial(pipelined, line, DEPTH),
                    "unlike": partial(pipelined, other, DEPTH),
                },
                watched=[agent.pid],
            )
            by_depth = session.beside(
                {str(depth): partial(pipelined, line, depth) for depth in session.places(DEPTHS)}, watched=[agent.pid]
            )
        by_size = Curve("size", "RSA_2048", "bytes of the data key", "throughput, × bare loop with that size")
        for size in session.places(SIZES):
            with Connection(agent.path, requests(agent.aliases, size=size)) as line:
                ways = {"many": partial(pipelined, line, DEPTH)}
                by_size.add(size, session.beside(ways, Bare(size=size), [agent.pid])["many"].ratios)
    one, many, others = made["one"], made["many"], made["unlike"]
    session.add(
        PART, f"pipelined, {DEPTH} under way", many.ratios, absolute=many.absolute, target=Target("at least", 0.5)
    )
    session.add(
        PART,
        "the same, each under a context of its own",
        others.ratios,
        absolute=others.absolute,
        note="above, ten different requests come again and again, and are recalled; here none is",
    )
    session.add(PART, "one request at a time", one.ratios, absolute=one.absolute, target=Target("at least", 0.28))
    curve = Curve("depth", "RSA_2048", "requests under way on one connection", "throughput, × bare loop")
    for depth, measured in by_depth.items():
        curve.add(int(depth), measured.ratios)
    session.curves += [curve, by_size]
