"""Runs an exchange's offloaded jobs in the thread pool."""

from collections.abc import Callable
from typing import Any

from ..state import ServerState
from .dispatch import Exchange, OffloadedJob
from .refusals import refusal
from .thread_pool import FairThreadPool

__all__ = ["offload"]


def offload(agent: ServerState, pool: FairThreadPool, exchange: Exchange, then: Callable[[], None]) -> None:
    """Submit the offloaded jobs of an exchange. Each finished job is added to the exchange, and `then` is called.

    Call in the event loop's thread, which also makes the calls.
    """
    jobs, exchange.offloaded = exchange.offloaded, []
    for job in jobs:
        _submit(agent, pool, exchange, job, then)


def _submit(
    agent: ServerState, pool: FairThreadPool, exchange: Exchange, job: OffloadedJob, then: Callable[[], None]
) -> None:
    def run() -> Any:
        # After a reload, the decision no longer holds, so the job's result would be discarded.
        return job.job.run() if agent.generation == job.generation else None

    def done(result: Any, error: Exception | None) -> None:
        outcome = result if error is None else refusal(error, job.request_id, job.entry)
        exchange.finished.append((job, outcome))
        then()

    try:
        pool.submit(exchange.caller.user, run, done)
    except RuntimeError as error:
        done(None, error)
