"""The rate of requests, by a clock of the test's own."""

from keyferry_agent.authz.caller import Caller
from keyferry_agent.peer import Peer
from keyferry_agent.server import rate_limit
from keyferry_agent.server.rate_limit import Rate


def test_rate_is_per_user_and_refills() -> None:
    """Each user has a bucket that is full again after a second; idle users are forgotten."""
    rate = Rate(2)
    assert [rate.allows(1, 0.0) for _ in range(3)] == [True, True, False]
    assert rate.allows(2, 0.0)
    assert [rate.allows(1, 0.5), rate.allows(1, 0.5)] == [True, False]
    for user in range(5_000):
        assert rate.allows(user + 10, 100.0 + user)
    assert len(rate._buckets) < 5_000
    assert all(Rate(0).allows(1, 0.0) for _ in range(100))
    assert (Rate(0).unlimited, Rate(1).unlimited) == (True, False)


def test_limits_count_for_an_access_key_if_there_is_one() -> None:
    """Two access keys of one user have two allowances."""
    peer = Peer(uid=5, gids=frozenset(), pid=None, listener="kms")
    over_tcp = peer._replace(uid=None, access_key="LTAIone")
    assert [Caller(each).user for each in (peer, peer._replace(access_key="LTAItwo"), over_tcp)] == [
        5,
        "LTAItwo",
        "LTAIone",
    ]


def test_fraction_of_an_allowance_allows_no_request() -> None:
    """A quarter of a second after it was used up, a rate of 2 has half a request."""
    rate = Rate(2)
    assert [rate.allows(1, now) for now in (0.0, 0.0, 0.25, 0.49, 0.5, 0.51)] == [True, True, False, False, True, False]


def test_batch_is_allowed_as_a_whole_or_refused() -> None:
    """A refusal uses nothing of the allowance, which never exceeds one second's."""
    rate = Rate(3)
    assert [rate.allows(1, 0.0, count) for count in (2, 2, 1, 0)] == [True, False, True, True]
    assert [rate.allows(1, 100.0, count) for count in (4, 3, 1)] == [False, True, False]


def test_users_that_are_forgotten_are_those_seen_longest_ago() -> None:
    """A user whose allowance is used up does not have it back because others come."""
    rate, users = Rate(1), 10_000
    for user in range(users):
        assert rate.allows(user, user / 1e6)
    assert len(rate._buckets) <= rate_limit._MAX_USERS
    assert not rate.allows(users - 1, users / 1e6)
    assert rate.allows(0, users / 1e6)  # the price of a bound


def test_users_whose_allowance_is_full_again_are_forgotten_first() -> None:
    """No user who has used up an allowance has it back, although the others were seen later."""
    rate, half = Rate(8), rate_limit._MAX_USERS // 2
    quiet, busy = range(half), range(half, 2 * half)
    assert all(rate.allows(user, 9.75, 6) for user in busy)
    assert all(rate.allows(user, 9.875) for user in quiet)
    assert rate.allows(-1, 10.0)  # now the quiet ones have all eight again, and the busy ones four
    assert not any(rate.allows(user, 10.0, 5) for user in busy)
    assert rate._buckets.keys() == {*busy, -1}


def test_users_seen_longest_ago_are_forgotten_whatever_is_left() -> None:
    """A user who has used up the allowance a moment ago is remembered longer than one who sent a single request before."""
    rate, half = Rate(8), rate_limit._MAX_USERS // 2
    assert all(rate.allows(user, 0.0, 1) for user in range(half))
    assert all(rate.allows(user, 0.01, 8) for user in range(half, 2 * half))
    assert rate.allows(-1, 0.02)
    assert not any(rate.allows(user, 0.02) for user in range(half, 2 * half))
    assert rate.allows(half - 1, 0.02, 8)  # half of the users, and no more
