"""The Python client: the time of a call, the client's own share of it, and the time of its import."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

from support.keys import recipient

from keyferry import Client

from ..agent_under_test import CONTEXT, agent_under_test, requests
from ..canned_server import CannedServer
from ..figures import Target, percentile, ratios
from ..load import Connection, closed_loop_latencies
from ..run_context import Session

PART = "The Python client"


def run(session: Session) -> None:
    """Latency of calls one at a time, overhead, import."""
    with agent_under_test() as agent, Client(agent.path) as kms:
        asked = _call(kms, agent.aliases[0])
        with Connection(agent.path, requests(agent.aliases)) as line, CannedServer(line.answer) as stub:
            _latency(session, asked, agent.pid)
            _overhead(session, stub)
    _import(session)


def _call(kms: Client, alias: str) -> Callable[[], object]:
    arguments = recipient("RSAES_OAEP_SHA_256").arguments
    return lambda: kms.generate_and_export_data_key(key_id=alias, encryption_context=CONTEXT, **arguments)


def _calls(asked: Callable[[], object], seconds: float) -> list[float]:
    took, until = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        asked()
        took.append(time.perf_counter() - began)
    return took


def _latency(session: Session, asked: Callable[[], object], pid: int) -> None:
    tails: list[float] = []
    medians: list[float] = []

    def measure(seconds: float) -> float:
        took = _calls(asked, 2 * seconds)
        medians.append(percentile(took, 50))
        tails.append(percentile(took, 99))
        return 1 / medians[-1]

    made = session.beside({"median": measure}, watched=[pid])["median"]
    session.add(
        PART,
        "a call, median",
        [1 / ratio for ratio in made.ratios],
        absolute=f"{_micro(medians)} µs",
        target=Target("at most", 4),
    )
    session.add(
        PART,
        "a call, 99th percentile",
        ratios(tails, medians),
        unit="× its median",
        absolute=f"{_micro(tails)} µs",
        target=Target("at most", 4),
    )


def _overhead(session: Session, stub: CannedServer) -> None:
    """Beside a bare socket, against a server that computes nothing."""
    overheads: list[float] = []
    seconds = session.seconds
    with Client(stub.path) as kms, Connection(stub.path, requests(["alias/k0"])) as line:
        asked = _call(kms, "alias/k0")
        for _ in range(session.rounds):
            whole, socket = _calls(asked, seconds), closed_loop_latencies(line, seconds)
            overheads.append((percentile(whole, 50) - percentile(socket, 50)) * 1e6)
    session.add(
        PART,
        "overhead of a call",
        overheads,
        unit="µs",
        target=Target("at most", 40),
        note="median call against a server with a canned answer, less the same over a bare socket",
    )


def _import(session: Session) -> None:
    milliseconds: list[float] = []
    _interpreter("import keyferry")  # compiled now, if it was not
    for _ in range(3 * session.rounds):
        bare, whole = _interpreter("pass"), _interpreter("import keyferry")
        milliseconds.append((whole - bare) * 1e3)
    session.add(
        PART,
        "import keyferry",
        milliseconds,
        unit="ms",
        target=Target("at most", 25),
        note="over an interpreter that imports nothing",
    )


def _interpreter(code: str) -> float:
    began = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return time.perf_counter() - began


def _micro(seconds: list[float]) -> str:
    return f"{percentile(seconds, 50) * 1e6:.0f}"
