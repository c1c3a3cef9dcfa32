"""The cost of connections, keys and grants: the same load on agents with few and with many of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from statistics import median

from ..agent_under_test import AgentUnderTest, agent_under_test, requests
from ..figures import Curve, Target, ratios
from ..load import Connection, closed_loop_rate, concurrent_rate, pipelined
from ..run_context import Bare, Session
from .throughput import DEPTH

PART = "What much of something costs"
CONNECTIONS = (1, 10, 100, 300, 1_000)
_SOME = 100
TOGETHER = {"64 connections, one request each": (64, 1), "16 connections, four under way each": (16, 4)}
"""How most hosts ask: many clients, few requests of each at a time."""
KEYS = GRANTS = (10, 100, 1_000, 10_000)
_LITTLE = Target("at least", 0.9)
_SETTLE = 1.0
"""Seconds in which the agent takes leave of a thousand connections."""


def run(session: Session) -> None:
    """Connections, keys, grants."""
    _connections(session)
    _of(session, "keys", session.places(KEYS), lambda number: agent_under_test(keys=number))
    _of(session, "grants", session.places(GRANTS), lambda number: agent_under_test(grants=number))


def _connections(session: Session) -> None:
    """Measure equal numbers of requests in flight over few and many connections, and one busy among idle ones."""
    with agent_under_test() as agent, ExitStack() as stack:
        lines = [
            stack.enter_context(Connection(agent.path, requests(agent.aliases)[at % 10 :]))
            for at in range(CONNECTIONS[-1])
        ]
        active = session.beside(
            {
                str(number): partial(concurrent_rate, lines[:number], 1)
                for number in (CONNECTIONS[2:] if session.quick else CONNECTIONS)
            },
            watched=[agent.pid],
        )
        together = session.beside(
            {name: partial(concurrent_rate, lines[:number], depth) for name, (number, depth) in TOGETHER.items()},
            watched=[agent.pid],
        )
        among = session.beside({"among": partial(pipelined, lines[0], DEPTH)}, watched=[agent.pid])["among"]
        for line in lines[1:]:
            line.socket.close()
        closed_loop_rate(lines[0], _SETTLE)
        alone = session.beside({"alone": partial(pipelined, lines[0], DEPTH)}, watched=[agent.pid])["alone"]
    curve = Curve("connections", "all active", "connections", "throughput, × bare loop")
    for number, measured in active.items():
        curve.add(int(number), measured.ratios)
    session.curves.append(curve)
    for name, measured in together.items():
        session.add(PART, name, measured.ratios, absolute=measured.absolute)
    few, all_of_them = active[str(_SOME)], active[str(CONNECTIONS[-1])]
    session.add(
        PART,
        f"{CONNECTIONS[-1]:,} connections, all but one idle",
        ratios(among.ratios, alone.ratios),
        unit="× one connection",
        absolute=among.absolute,
        target=_LITTLE,
    )
    session.add(
        PART,
        f"{CONNECTIONS[-1]:,} connections, each one request at a time",
        ratios(all_of_them.ratios, few.ratios),
        unit=f"× {_SOME} such connections",
        absolute=all_of_them.absolute,
        target=_LITTLE,
    )


def _of(
    session: Session, what: str, numbers: tuple[int, ...], make: Callable[[int], AbstractContextManager[AgentUnderTest]]
) -> None:
    """Measure agents with few and many, side by side, in turn."""
    curve = Curve(what, "RSA_2048", what, "throughput, × bare loop")
    with ExitStack() as stack:
        agents: dict[int, AgentUnderTest] = {number: stack.enter_context(make(number)) for number in numbers}
        lines = {
            number: stack.enter_context(Connection(agent.path, requests(agent.aliases)))
            for number, agent in agents.items()
        }
        first: dict[int, float] = {}
        for number, line in lines.items():
            every, bare = len(line.requests), session.bare(Bare())
            first[number] = pipelined(line, DEPTH, 0, fewest=every) / bare
            pipelined(line, DEPTH, 0, fewest=2 * every)  # from then on each is recalled
        made = session.beside(
            {str(number): partial(pipelined, line, DEPTH) for number, line in lines.items()},
            watched=[agent.pid for agent in agents.values()],
        )
    for label, measured in made.items():
        curve.add(int(label), measured.ratios)
    session.curves.append(curve)
    least, most = made[str(numbers[0])], made[str(numbers[-1])]
    session.add(
        PART,
        f"{numbers[-1]:,} {what}",
        ratios(most.ratios, least.ratios),
        unit=f"× {numbers[0]} {what}",
        absolute=most.absolute,
        target=_LITTLE,
    )
    if what == "keys":
        session.add(
            PART,
            f"{numbers[-1]:,} {what}, when each is asked for the first time",
            [first[numbers[-1]] / median(least.ratios)],
            unit=f"× {numbers[0]} {what}",
            note="once, before they are measured as above; the second time is a little faster, the third is recalled",
        )
