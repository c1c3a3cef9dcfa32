"""Grants: what matches a caller, a key, an action, a recipient and a context, and the tables of a policy."""

import re
import tracemalloc
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.authorization import allows, may_name

from keyferry_agent.authz.grants import PLAINTEXT, SELECTORS, CallerGrants, Grant, Policy, numbered
from keyferry_agent.peer import Groups, Peer

PIN = "sha256:" + "0" * 64


def peer(uid: int | None = 1000, gids: frozenset[int] = frozenset({1000}), listener: str = "default") -> Peer:
    """A caller."""
    return Peer(uid=uid, gids=gids, pid=1, listener=listener)


@pytest.mark.parametrize(
    ("to", "matches"),
    [
        ({"uid": 1000}, True),
        ({"uid": 1001}, False),
        ({"user": 1000}, True),
        ({"gid": 1000}, True),
        ({"group": 5}, False),
        ({"listener": "default"}, True),
        ({"listener": "orders"}, False),
        ({"uid": 1000, "gid": 1000, "listener": "default"}, True),
        ({"uid": 1000, "gid": 1001}, False),
        ({}, False),
    ],
)
def test_grant_applies_if_all_its_selectors_match(to: dict[str, object], *, matches: bool) -> None:
    """A grant without a selector applies to no caller."""
    grant = Grant("g", to, ("kms:*",), ("*",))
    assert grant.matches_caller(peer()) is matches


def test_missing_evidence_matches_nothing() -> None:
    """A user or group without a name in the kernel's evidence does not match a number."""
    nobody = peer(uid=None, gids=frozenset())
    for selector in ("uid", "user", "gid", "group"):
        for value in (None, -1, 0, 65_534):
            assert not Grant("g", {selector: value}, ("kms:*",), ("*",)).matches_caller(nobody)


EVIDENCE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "uid": (1000, (0, 999, 1001)),
    "user": (1000, (0, 999, 1001)),
    "gid": (5, (0, 4, 6)),
    "group": (5, (0, 4, 6)),
    "unit": ("orders.service", ("a.service", "orders.servic", "orders.service2", "z.service", "")),
    "pod": ("0b", ("0a", "0", "0bc", "")),
    "exe": ("/usr/bin/orders", ("/usr/bin/a", "/usr/bin/order", "/usr/bin/orders2", "/usr/bin/z", "")),
    "sha256": ("sha256:5", ("sha256:4", "sha256:6", "sha256:", "")),
    "access_key": ("LTAI5", ("LTAI4", "LTAI", "LTAI55", "ltai5", "")),
    "listener": ("orders", ("default", "order", "orders2", "z", "")),
}


@pytest.mark.parametrize("selector", EVIDENCE)
def test_selector_matches_exactly_its_value(selector: str) -> None:
    """Neither a smaller nor a larger value matches, nor a part of it, nor evidence that is not there."""
    value, others = EVIDENCE[selector]
    grant = Grant("g", {selector: value}, ("kms:*",), ("*",))

    def with_evidence(of: Any) -> Peer:
        if selector in ("gid", "group"):
            return peer(gids=frozenset() if of is None else frozenset({of}))
        return peer()._replace(**{"uid" if selector == "user" else selector: of})

    assert [each for each in (value, *others, None) if grant.matches_caller(with_evidence(each))] == [value]


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*", "alias/a/b", True),
        ("alias/orders-*", "alias/orders-1", True),
        ("alias/orders-*", "alias/orders-", True),
        ("alias/orders-*", "alias/orders", False),
        ("alias/orders-*", "alias/orders-1/x", False),
        ("alias/*", "alias/a", True),
        ("alias/*", "alias/a/b", False),
        ("alias/*/b", "alias/a/b", True),
        ("alias/a", "alias/a", True),
        ("alias/a", "alias/ab", False),
        ("alias/a", "xalias/a", False),
        ("alias/a", "alias/a\n", False),
        ("alias/a.", "alias/ab", False),
        ("acs:kms:local:0:key/*", "acs:kms:local:0:key/1-2", True),
        ("acs:kms:*:0:key/*", "acs:kms:local:0:key/1-2", True),
        ("acs:kms:*:key/*", "acs:kms:local:0:key/1-2", False),
        ("alias/*-a-*-b-*", "alias/1-a-2-a-3-b-4-b-5", True),
        ("alias/*-a-*-b", "alias/1-a-2-b-3-b", True),
        ("alias/*-a-*-b", "alias/1-b-2-a", False),
        ("alias/*-a-*-b", "alias/1-a-2/1-b", False),
        ("alias/*a*/*b*/c", "alias/xaax/xbbx/c", True),
        ("alias/a**b", "alias/ab", True),
    ],
)
def test_a_star_stays_within_one_part_of_a_name(pattern: str, name: str, *, matches: bool) -> None:
    """A sole star matches every key."""
    assert Grant("g", {"uid": 1}, ("kms:*",), (pattern,)).has_key([name]) is matches


@given(st.text("ab*/:", max_size=12).filter(lambda text: text != "*"), st.text("ab/:", max_size=12))
def test_stars_match_as_in_a_shell_part_by_part(pattern: str, name: str) -> None:
    """Stars match like a shell's, also if they could match in several ways."""
    pieces, names = re.split("([/:])", pattern), re.split("([/:])", name)
    same = len(pieces) == len(names) and all(map(fnmatchcase, names, pieces))
    assert Grant("g", {"uid": 1}, ("kms:*",), (pattern,)).has_key([name]) is same


def test_near_miss_of_many_stars_is_decided_quickly() -> None:
    """Any peer chooses the name, and backtracking over every split of it would take exponential time."""
    grant = Grant("g", {"uid": 1}, ("kms:*",), ("alias/" + "*a" * 20 + "*b", "alias/**********"))
    assert not grant.has_key(["alias/" + "a" * 500 + "/"])
    assert grant.has_key(["alias/" + "a" * 500 + "b"])


@pytest.mark.parametrize(
    ("action", "asked", "matches"),
    [
        ("kms:*", "kms:Decrypt", True),
        ("kms:Generate*", "kms:GenerateDataKey", True),
        ("kms:Decrypt", "kms:Decrypt", True),
        ("kms:Decrypt", "kms:DecryptX", False),
        ("kms:Encrypt", "kms:ReEncrypt", False),
    ],
)
def test_actions_match_whole_or_up_to_a_star(action: str, asked: str, *, matches: bool) -> None:
    """kms:* matches all operations."""
    assert Grant("g", {"uid": 1}, (action,), ("*",)).has_action(asked) is matches


def test_recipients_restrict_exports_and_exclude_plaintext() -> None:
    """A grant with recipients allows operations without key output and exports to its fingerprints, and never a plaintext."""
    grant = Grant("g", {"uid": 1}, ("kms:*",), ("*",), recipients=frozenset({PIN}))
    assert allows([grant], "kms:ExportDataKey", ["k"], fingerprint=PIN, context={})
    assert not allows([grant], "kms:ExportDataKey", ["k"], fingerprint=PIN[:-1] + "1", context={})
    assert allows([grant], "kms:DescribeKey", ["k"])
    assert not allows([grant], "kms:Decrypt", ["k"], fingerprint=PLAINTEXT, context={})


def test_required_context_pairs_have_to_match() -> None:
    """Further pairs are allowed, and operations without a context are exempt."""
    grant = Grant("g", {"uid": 1}, ("kms:*",), ("*",), encryption_context={"tenant": "acme"})
    for context, allowed in (
        ({"tenant": "acme", "x": "y"}, True),
        ({"tenant": "other"}, False),
        ({}, False),
        (None, True),
    ):
        assert bool(allows([grant], "kms:Decrypt", ["k"], context=context)) is allowed


def test_missing_key_is_reported_to_matching_grants_only() -> None:
    """The grant's key pattern and its other conditions have to match."""
    grant = Grant("g", {"uid": 1}, ("kms:Decrypt",), ("alias/orders-*",), encryption_context={"t": "a"})
    assert may_name([grant], "kms:Decrypt", ["alias/orders-9"], context={"t": "a"})
    assert not may_name([grant], "kms:Decrypt", ["alias/else"], context={"t": "a"})
    assert not may_name([grant], "kms:Encrypt", ["alias/orders-9"], context={"t": "a"})
    assert not may_name([grant], "kms:Decrypt", ["alias/orders-9"], context={})
    assert may_name([grant], "kms:Decrypt", None, context={"t": "a"})
    assert not may_name([], "kms:Decrypt", None)


def test_names_of_missing_keys_are_not_remembered() -> None:
    """Any peer can make up names, and a name of 512 characters can take two kilobytes."""
    granted = CallerGrants((Grant("g", {"uid": 1}, ("kms:*",), ("alias/a*",)),))
    assert may_name(granted.grants, "kms:Decrypt", ["alias/ab"])
    tracemalloc.start()
    try:
        for number in range(1_000):
            name = f"alias/{number}" + "\N{GRINNING FACE}" * 500
            assert not granted.would_cover("kms:Decrypt", [name])
        assert tracemalloc.get_traced_memory()[0] < 65_536
    finally:
        tracemalloc.stop()


NAMES = st.sampled_from(["alias/a", "alias/ab", "alias/b/c", "alias/b", "k1", "k2", "acs:kms:local:0:key/k1"])
KEYS = st.sampled_from(["*", "alias/*", "alias/a*", "alias/*/c", "k*", "acs:kms:*:0:key/*", "*1"]) | NAMES


@given(st.lists(st.tuples(st.lists(KEYS, min_size=1), st.sampled_from(["kms:*", "kms:Encrypt"]))), st.lists(NAMES))
def test_grant_index_agrees_with_a_linear_search(made: list[tuple[list[str], str]], names: list[str]) -> None:
    """The index keeps the order of the grants that match an action."""
    grants = tuple(Grant(str(place), {"uid": 1}, (action,), tuple(keys)) for place, (keys, action) in enumerate(made))
    for action in ("kms:Encrypt", "kms:Decrypt"):
        each = tuple(grant for grant in grants if grant.has_action(action) and grant.has_key(names))
        assert CallerGrants(grants).covering(action, "key", lambda: names) == each


def test_memory_of_a_policy_for_callers_is_bounded() -> None:
    """65,536 users or groups take a few MiB, and callers with the same grants share their tables."""
    policy = Policy([Grant("g", {"uid": 1}, ("kms:*",), ("*",)), Grant("l", {"gid": 7}, ("kms:*",), ("*",))])
    granted = policy.granted(Peer(1, Groups([7]), 1, "default"))
    assert granted is policy.granted(Peer(1, Groups([7, 8]), 2, "default"))
    tracemalloc.start()
    for uid in range(2, 40_002):
        assert policy.granted(Peer(uid, Groups([uid + 100]), uid, "default")).grants == ()
    for uid in range(2, 60):
        assert policy.granted(Peer(uid, Groups(range(uid * 1_000, uid * 1_000 + 65_536)), uid, "default")).grants == ()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20
    more = Policy([Grant(str(n), {"gid": n}, ("kms:*",), ("*",)) for n in range(13)])
    for number in range(2**13):
        more.granted(Peer(1, Groups(n for n in range(13) if number >> n & 1), 1, "default"))
    assert len(more._sets) <= 1_024


def test_policy_looks_6990_callers_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 MiB hold the evidence of 6,990 callers without groups. One more, and all are looked up again."""
    looked_up: set[int | None] = set()

    def is_listener(caller: Peer, _name: str) -> bool:
        looked_up.add(caller.uid)
        return True

    monkeypatch.setitem(SELECTORS, "listener", is_listener)
    policy = Policy([Grant("g", {"listener": "default"}, ("kms:*",), ("*",))])

    def look_ups(*uids: int) -> set[int | None]:
        looked_up.clear()
        for uid in uids:
            policy.granted(Peer(uid, Groups([]), uid, "default"))
        return looked_up

    assert look_ups(*range(6_990)) == {*range(6_990)}
    assert look_ups(0, 6_989) == set()
    assert look_ups(6_990, 6_989, 0, 6_990) == {6_990, 6_989, 0}
    assert look_ups(0, 6_989, 6_990) == set()


def test_grants_are_numbered_per_file_from_0() -> None:
    """A message names the grant of the file that the operator opens."""
    plain, filed = Grant("a", {"uid": 1}, (), ()), Grant("b", {"uid": 1}, (), (), file=Path("/g/b"))
    places = [place for place, _ in numbered([plain, filed, plain, filed, plain])]
    assert places == ["grant[0]", "/g/b: grant[0]", "grant[1]", "/g/b: grant[1]", "grant[2]"]


def test_policy_names_the_users_of_grants_to_programs() -> None:
    """Users whose grants ask for no program are not waited for, and neither is a grant without a user."""
    to: list[dict[str, Any]] = [{"uid": 1}, {"uid": 2, "exe": "/bin/a"}, {"unit": "a.service", "exe": "/bin/a"}]
    assert Policy([Grant("g", each, ("kms:*",), ("*",)) for each in to]).users_by_program == {2}
