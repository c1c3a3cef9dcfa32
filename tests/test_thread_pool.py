"""Threads for offloaded jobs: their results, and the order in which users are served."""

import threading

import pytest
import trio

from keyferry_agent.server.thread_pool import FairThreadPool


async def results(made: FairThreadPool, jobs: int) -> list[object]:
    """Return the results of jobs, in the order in which they arrived."""
    got: list[object] = []
    every = trio.Event()

    def done(result: object, error: Exception | None) -> None:
        got.append(result if error is None else error)
        if len(got) == jobs:
            every.set()

    for number in range(jobs):
        made.submit("somebody", lambda number=number: 1 // (number % 3 - 1) and number, done)  # type: ignore[misc]
    assert made.busy == jobs
    await every.wait()
    return got


async def test_job_returns_its_result_or_raises_its_exception() -> None:
    """The result arrives in the event loop."""
    made = FairThreadPool(3)
    got = await results(made, 30)
    numbers = [each for each in got if isinstance(each, int)]
    assert sorted(numbers) == [number for number in range(30) if number % 3 != 1]
    assert sum(isinstance(each, ZeroDivisionError) for each in got) == 10
    assert made.busy == 0


async def test_users_are_served_in_turn() -> None:
    """A user's job waits at most for the few jobs of another user that threads have already taken."""
    made, ended, every = FairThreadPool(1), list[str](), trio.Event()

    def ask(user: str) -> None:
        def done(_result: object, _error: Exception | None) -> None:
            ended.append(user)
            if len(ended) == 103:
                every.set()

        made.submit(user, int, done)

    for _ in range(100):
        ask("greedy")
    for user in ("first", "second", "first"):
        ask(user)
    await every.wait()
    assert ended[:10].count("first") == 2
    assert ended[:10].count("second") == 1


async def test_pool_starts_no_more_threads_than_its_limit() -> None:
    """Threads start only when a job waits."""
    before = threading.active_count()
    made = FairThreadPool(2)
    assert threading.active_count() == before
    await results(made, 20)
    assert before < threading.active_count() <= before + 2


async def test_one_thread_suffices_if_no_other_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can start, the caller gets an error."""
    made = FairThreadPool(4)
    await results(made, 1)

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert len(await results(made, 12)) == 12
    with pytest.raises(RuntimeError, match="thread"):
        FairThreadPool(4).submit("somebody", int, lambda _result, _error: None)
