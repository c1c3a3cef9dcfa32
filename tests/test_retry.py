"""Repeated calls: which failures are worth it, how long the delays are, and that both clients keep within their timeout."""

import functools
import pickle
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.agent import PATIENCE
from support.fake_server import respond_with, scripted_server

from keyferry import (
    AgentUnavailable,
    Client,
    InvalidRequest,
    KmsError,
    NotFound,
    Retry,
    ServiceUnavailable,
    Throttled,
    operations,
)
from keyferry import client as client_module
from keyferry.aio import Client as AsyncClient
from keyferry.errors import kms_error
from keyferry.protocol import wire
from keyferry.protocol.rpc import Call, PendingCall
from keyferry.retry import Attempts

Run = Callable[[Callable[[], Awaitable[Any]]], Any]
AT_ONCE = Retry(first=0)
THROTTLED = "Rejected.Throttling"
UNAVAILABLE = "ServiceUnavailableTemporary"


class Time:
    """A clock that only a sleep moves on."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """The blocking client's time."""
    made = Time()
    monkeypatch.setattr(client_module, "time", made)
    return made


@pytest.fixture(params=["trio", "asyncio"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run an async function in a fresh event loop of either kind."""
    return functools.partial(anyio.run, backend=request.param)


def delays(retry: Retry, error: KmsError, *, left: float = 1e9) -> Iterator[float]:
    """Return the delays of a call whose attempts all fail immediately, until the last."""
    attempts, now = Attempts(retry), 0.0
    while (delay := attempts.after_failure(error, now, left - now)) is not None:
        yield delay
        now += delay


def test_delays_double_up_to_the_maximum() -> None:
    """The sum of the delays stays within the bound."""
    retry = Retry(within=10, first=1, longest=3, random=lambda: 1.0)
    assert list(delays(retry, kms_error(UNAVAILABLE))) == [1, 2, 3, 3]


def test_delays_are_random_from_zero() -> None:
    """Full jitter spreads callers that failed together."""
    numbers = iter([0.0, 0.25, 0.5, 2.0])
    retry = Retry(within=10, first=4, longest=4, random=lambda: next(numbers))
    assert list(delays(retry, kms_error(UNAVAILABLE))) == [0, 1, 2]
    drawn = {Retry().random() for _ in range(100)}
    assert len(drawn) > 50
    assert all(0 <= number < 1 for number in drawn)


def test_delay_after_throttling_has_a_minimum() -> None:
    """An agent's allowance is per second, so a shorter delay would be refused again."""
    retry = Retry(within=10, first=0)
    assert list(delays(retry, kms_error(THROTTLED))) == [1.0] * 10
    assert Throttled.retry_after == 1.0


def test_no_repeat_begins_after_the_timeout() -> None:
    """The timeout is shorter than the policy's bound here."""
    retry = Retry(within=10, first=1, longest=1, random=lambda: 1.0)
    assert list(delays(retry, kms_error(UNAVAILABLE), left=3.5)) == [1, 1, 1]


def test_permanent_failure_is_not_retried() -> None:
    """Without a policy, a retryable failure is final too."""
    assert Attempts(Retry()).after_failure(kms_error("Forbidden.KeyNotFound"), 0, 30) is None
    assert Attempts(None).after_failure(kms_error(UNAVAILABLE), 0, 30) is None


def test_only_refused_calls_are_asked_again() -> None:
    """The others keep their answers."""
    asked = [PendingCall.of(Call("DescribeKey", {})) for _ in range(3)]
    for each, code in zip(asked, ["", UNAVAILABLE, "Forbidden.KeyNotFound"], strict=True):
        error = {"Code": code, "Message": "m"} if code else None
        each.pending.response = wire.Response(1, error, None if error else {})
    assert Attempts(AT_ONCE).after_answers(asked, 0, 30) == 0
    assert [each.pending.response is None for each in asked] == [False, True, False]


@pytest.mark.parametrize("wrong", [{"within": -1}, {"first": float("nan")}, {"longest": -0.1}])
def test_policy_with_invalid_numbers_is_refused(wrong: dict[str, float]) -> None:
    """The constructor raises, not the first failure."""
    with pytest.raises(ValueError, match="a number of seconds"):
        Retry(**wrong)  # type: ignore[arg-type]


def test_a_client_repeats_refused_calls(socket_path: Path, time: Time) -> None:
    """The client repeats a call until it has a result."""
    with (
        scripted_server(socket_path, respond_with(THROTTLED, UNAVAILABLE, "")),
        Client(socket_path, retry=AT_ONCE) as kms,
    ):
        assert kms.call("GetAgentStatus", {}) == {"RequestId": "GetAgentStatus"}
    assert time.slept == [1.0, 0.0]


def test_a_client_without_a_policy_repeats_nothing(socket_path: Path, time: Time) -> None:
    """A client without a policy raises the first refusal."""
    with (
        scripted_server(socket_path, respond_with(UNAVAILABLE)),
        Client(socket_path) as kms,
        pytest.raises(ServiceUnavailable),
    ):
        kms.call("GetAgentStatus", {})
    assert time.slept == []


def test_last_failure_is_raised(socket_path: Path, time: Time) -> None:
    """No agent listens; the delays are within the bound, and the message is the usual one."""
    retry = Retry(within=3, first=1, longest=1, random=lambda: 1.0)
    with Client(socket_path, retry=retry) as kms, pytest.raises(AgentUnavailable, match="does not exist"):
        kms.call("GetAgentStatus", {})
    assert time.slept == [1, 1, 1]
    time.slept.clear()
    with Client(socket_path, retry=retry, timeout=1.5) as kms, pytest.raises(AgentUnavailable, match="does not exist"):
        kms.call("GetAgentStatus", {})
    assert time.slept == [1]


def test_a_client_waits_for_an_agent_that_starts(
    socket_path: Path, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is refused is repeated."""
    with ExitStack() as started, Client(socket_path, retry=AT_ONCE) as kms:
        agent = scripted_server(socket_path, respond_with(""))
        monkeypatch.setattr(time, "sleep", lambda _seconds: started.enter_context(agent))
        assert kms.call("GetAgentStatus", {}) == {"RequestId": "GetAgentStatus"}


def test_pipeline_repeats_refused_requests(socket_path: Path, time: Time) -> None:
    """Results stay in their places."""
    codes = ["", UNAVAILABLE, "Forbidden.KeyNotFound", ""]
    calls: list[tuple[str, dict[str, Any]]] = [("A", {}), ("B", {}), ("C", {})]
    with scripted_server(socket_path, respond_with(*codes)), Client(socket_path, retry=AT_ONCE) as kms:
        first, second, third = kms.pipeline(calls)
    assert (first, second) == ({"RequestId": "A"}, {"RequestId": "B"})
    assert isinstance(third, NotFound)
    assert time.slept == [0.0]


def test_a_refused_connection_is_repeated(socket_path: Path, time: Time) -> None:
    """An agent without room closes the connection after its refusal."""

    def full(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(wire.encode_response(None, {"Code": THROTTLED, "Message": "m", "RequestId": "r"}, None))

    with scripted_server(socket_path, full, respond_with("")), Client(socket_path, retry=AT_ONCE) as kms:
        assert kms.call("GetAgentStatus", {}) == {"RequestId": "GetAgentStatus"}
    assert time.slept == [1.0]


def test_other_threads_call_while_a_client_waits(
    socket_path: Path, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's lock is free during a delay."""
    free = []
    with scripted_server(socket_path, respond_with(UNAVAILABLE, "")), Client(socket_path, retry=AT_ONCE) as kms:
        monkeypatch.setattr(time, "sleep", lambda _seconds: free.append(not kms._lock.locked()))
        kms.call("GetAgentStatus", {})
    assert free == [True]


def test_async_client_repeats_refused_calls(socket_path: Path, run: Run) -> None:
    """Calls and pipelines are repeated under trio and asyncio."""

    async def main() -> None:
        async with AsyncClient(socket_path, retry=AT_ONCE) as kms:
            assert await kms.call("GetAgentStatus", {}) == {"RequestId": "GetAgentStatus"}
            first, second = await kms.pipeline([("A", {}), ("B", {})])
            assert (first, second) == ({"RequestId": "A"}, {"RequestId": "B"})

    with scripted_server(socket_path, respond_with(UNAVAILABLE, "InternalFailure", "", UNAVAILABLE, "", "")):
        run(main)


def test_async_client_raises_the_last_failure(socket_path: Path, run: Run) -> None:
    """The failure is raised at the end of the bound, or immediately if it is permanent or the client has no policy."""

    async def main() -> None:
        async with AsyncClient(socket_path, retry=Retry(within=0.05, first=0.01)) as kms:
            with pytest.raises(AgentUnavailable, match="does not exist"):
                await kms.describe_key(key_id="alias/a")
        with scripted_server(socket_path, respond_with("InvalidParameter")):
            async with AsyncClient(socket_path, retry=AT_ONCE, timeout=PATIENCE) as kms:
                with pytest.raises(InvalidRequest):
                    await kms.describe_key(key_id="alias/a")
        async with AsyncClient(socket_path) as kms:
            with pytest.raises(AgentUnavailable, match="no process listens"):
                await kms.pipeline([operations.DescribeKey(key_id="alias/a")])

    run(main)


def test_an_unreachable_agent_is_retryable_where_time_helps(tmp_path: Path) -> None:
    """An agent may start; a regular file does not become a socket."""
    for path, retryable in ((tmp_path / "none", True), (tmp_path / "file", False)):
        if not retryable:
            path.touch()
        with Client(path) as kms, pytest.raises(AgentUnavailable) as caught:
            kms.get_agent_status()
        assert caught.value.retryable is retryable
        assert pickle.loads(pickle.dumps(caught.value)).retryable is retryable


def test_a_policy_is_pickled_with_its_client(tmp_path: Path) -> None:
    """The policy is pickled like the path and the timeout."""
    with Client(tmp_path / "none", retry=Retry(within=3)) as kms:
        assert repr(pickle.loads(pickle.dumps(kms))._retry) == "Retry(within=3, first=0.05, longest=2)"
