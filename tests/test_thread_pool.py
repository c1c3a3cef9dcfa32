"""Threads for slow jobs, and the moment in which a client is waited for: what comes back, and when nobody waits."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from keyferry_agent.server.readiness import ReadinessPoller
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


@contextmanager
def two_connections() -> Iterator[
    tuple[ReadinessPoller, tuple[socket.socket, socket.socket], tuple[socket.socket, socket.socket]]
]:
    """Two connections, each as the agent's end and the client's, and who looks at them."""
    arrivals, first, second = ReadinessPoller(), socket.socketpair(), socket.socketpair()
    for ours, _ in (first, second):
        arrivals.add(ours.fileno())
    try:
        yield arrivals, first, second
    finally:
        arrivals.close()
        for each in (*first, *second):
            each.close()


def test_who_has_sent_its_next_request_is_next() -> None:
    """As often as it does."""
    with two_connections() as (arrivals, (ours, theirs), _):
        for _ in range(5):
            theirs.send(b"request")
            assert arrivals.poll_for_next_request(ours.fileno())
            os.read(ours.fileno(), 100)


def test_nobody_is_next_while_another_has_sent_something() -> None:
    """Nor for a while after that: there is a crowd."""
    with two_connections() as (arrivals, (ours, theirs), (other, others)):
        theirs.send(b"request")
        others.send(b"request")
        assert not arrivals.poll_for_next_request(ours.fileno())
        os.read(other.fileno(), 100)
        looks = [arrivals.poll_for_next_request(ours.fileno()) for _ in range(100)]
        assert not any(looks[:60])
        assert looks[-1]


def test_who_does_not_ask_on_is_not_waited_for_the_next_times() -> None:
    """The wait itself ends after a moment."""
    with two_connections() as (arrivals, (ours, theirs), _):
        assert not arrivals.poll_for_next_request(ours.fileno())
        theirs.send(b"request")
        looks = [arrivals.poll_for_next_request(ours.fileno()) for _ in range(20)]
        assert not any(looks[:8])
        assert looks[-1]


def test_others_wait_when_they_have_sent_something() -> None:
    """Whatever the one that asks has sent itself. Then there is a crowd, for a moment."""
    with two_connections() as (arrivals, (ours, theirs), (other, others)):
        assert not arrivals.others_readable(ours.fileno())
        theirs.send(b"request")
        assert not arrivals.others_readable(ours.fileno())
        assert not arrivals.contended()
        others.send(b"request")
        assert arrivals.others_readable(ours.fileno())
        assert arrivals.contended()
        os.read(other.fileno(), 100)
        assert not arrivals.others_readable(ours.fileno())
