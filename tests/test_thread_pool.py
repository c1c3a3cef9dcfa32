"""Threads for slow jobs: what comes back, and in which order users are served."""

import threading

import pytest
import trio

from keyferry_agent.server.thread_pool import FairThreadPool


async def results(made: FairThreadPool, jobs: int) -> list[object]:
    """What so many jobs gave, in the order in which they came back."""
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


async def test_each_job_gives_what_it_gave_or_what_it_raised() -> None:
    """In the event loop."""
    made = FairThreadPool(3)
    got = await results(made, 30)
    numbers = [each for each in got if isinstance(each, int)]
    assert sorted(numbers) == [number for number in range(30) if number % 3 != 1]
    assert sum(isinstance(each, ZeroDivisionError) for each in got) == 10
    assert made.busy == 0


async def test_users_are_served_in_turn() -> None:
    """Nobody's job waits for all that another has asked for; a few of them may be in the threads' hands already."""
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


async def test_no_more_threads_than_that_are_made() -> None:
    """And those only when there is something to do."""
    before = threading.active_count()
    made = FairThreadPool(2)
    assert threading.active_count() == before
    await results(made, 20)
    assert before < threading.active_count() <= before + 2


async def test_with_one_thread_jobs_are_done_although_no_other_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none at all, whoever asks is told."""
    made = FairThreadPool(4)
    await results(made, 1)

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert len(await results(made, 12)) == 12
    with pytest.raises(RuntimeError, match="thread"):
        FairThreadPool(4).submit("somebody", int, lambda _result, _error: None)
