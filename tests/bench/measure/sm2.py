"""GenerateAndExportDataKey to an SM2 key, on all cores: against libcrypto with as many threads as cores."""

from functools import partial

from ..agent_under_test import agent_under_test, requests
from ..cpu import ALL
from ..figures import Target
from ..load import Connection, closed_loop_rate, pipelined
from ..run_context import Bare, Session

PART = "EC_SM2, agent on all cores"
IN_FLIGHT = 16


def run(session: Session) -> None:
    """One at a time against one thread; several in flight against as many threads as cores."""
    alone, together = Bare("bare EC_SM2"), Bare("bare EC_SM2", threads=len(ALL))
    with (
        agent_under_test(cores=ALL) as agent,
        Connection(agent.path, requests(agent.aliases, algorithm="SM2PKE")) as line,
    ):
        made = session.beside(
            {
                "many": partial(pipelined, line, IN_FLIGHT),
                "one": partial(closed_loop_rate, line),
            },
            {"one": alone, "many": together},
        )
    many, one = made["many"], made["one"]
    session.add(
        PART,
        f"{IN_FLIGHT} in flight",
        many.ratios,
        absolute=many.absolute,
        target=Target("at least", 0.9),
        note=f"over the bare loop in {len(ALL)} threads; who asks runs on the same cores",
    )
    session.add(
        PART, "one request at a time", one.ratios, absolute=one.absolute, note="over the bare loop in one thread"
    )
