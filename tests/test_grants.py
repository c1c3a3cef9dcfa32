"""Grants: what matches, what does not, what a caller without any may learn; then with real other users."""

import os
import re
import tempfile
import tracemalloc
import uuid
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.agent import RawConnection, RunningAgent
from support.authorization import allows, may_name
from support.keyring import change, two_callers
from support.keys import recipient
from support.skip_unless import root

from keyferry.parameters import decode_base64
from keyferry_agent.authz.grants import PLAINTEXT, CallerGrants, Grant, Policy
from keyferry_agent.crypto.public_key import fingerprint
from keyferry_agent.peer import Groups, Peer

PIN = "sha256:" + "0" * 64
OTHER_USER = 12_345


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
def test_a_grant_is_to_whom_all_its_selectors_match(to: dict[str, object], *, matches: bool) -> None:
    """One that names nobody is to nobody."""
    grant = Grant("g", to, ("kms:*",), ("*",))
    assert grant.matches_caller(peer()) is matches


def test_evidence_that_cannot_be_had_matches_nothing() -> None:
    """A user or group that the kernel cannot name is nobody, not number None."""
    nobody = peer(uid=None, gids=frozenset())
    for selector in ("uid", "user", "gid", "group"):
        for value in (None, -1, 0, 65_534):
            assert not Grant("g", {selector: value}, ("kms:*",), ("*",)).matches_caller(nobody)


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
    """A sole star is every key."""
    assert Grant("g", {"uid": 1}, ("kms:*",), (pattern,)).has_key([name]) is matches


@given(st.text("ab*/:", max_size=12).filter(lambda text: text != "*"), st.text("ab/:", max_size=12))
def test_stars_match_as_in_a_shell_part_by_part(pattern: str, name: str) -> None:
    """Also where they could match in several ways."""
    pieces, names = re.split("([/:])", pattern), re.split("([/:])", name)
    same = len(pieces) == len(names) and all(map(fnmatchcase, names, pieces))
    assert Grant("g", {"uid": 1}, ("kms:*",), (pattern,)).has_key([name]) is same


def test_a_name_that_nearly_matches_many_stars_is_told_at_once() -> None:
    """Whoever connects says the name. Looking for every way in which stars could share it out would take for ever."""
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
    """kms:* is all of them."""
    assert Grant("g", {"uid": 1}, (action,), ("*",)).has_action(asked) is matches


def test_pins_hold_for_exports_and_shut_out_plaintext() -> None:
    """A pinned grant allows what hands out no key, exports to its pins, and nothing in plaintext."""
    grant = Grant("g", {"uid": 1}, ("kms:*",), ("*",), recipients=frozenset({PIN}))
    assert allows([grant], "kms:ExportDataKey", ["k"], pin=PIN, context={})
    assert not allows([grant], "kms:ExportDataKey", ["k"], pin=PIN[:-1] + "1", context={})
    assert allows([grant], "kms:DescribeKey", ["k"])
    assert not allows([grant], "kms:Decrypt", ["k"], pin=PLAINTEXT, context={})


def test_a_demanded_context_must_be_there_with_its_value() -> None:
    """More pairs are welcome; an operation that has no context is not held to it."""
    grant = Grant("g", {"uid": 1}, ("kms:*",), ("*",), encryption_context={"tenant": "acme"})
    for context, allowed in (
        ({"tenant": "acme", "x": "y"}, True),
        ({"tenant": "other"}, False),
        ({}, False),
        (None, True),
    ):
        assert bool(allows([grant], "kms:Decrypt", ["k"], context=context)) is allowed


def test_only_who_could_be_granted_a_missing_key_learns_that_it_is_missing() -> None:
    """The pattern decides, and the rest of the grant."""
    grant = Grant("g", {"uid": 1}, ("kms:Decrypt",), ("alias/orders-*",), encryption_context={"t": "a"})
    assert may_name([grant], "kms:Decrypt", ["alias/orders-9"], context={"t": "a"})
    assert not may_name([grant], "kms:Decrypt", ["alias/else"], context={"t": "a"})
    assert not may_name([grant], "kms:Encrypt", ["alias/orders-9"], context={"t": "a"})
    assert not may_name([grant], "kms:Decrypt", ["alias/orders-9"], context={})
    assert may_name([grant], "kms:Decrypt", None, context={"t": "a"})
    assert not may_name([], "kms:Decrypt", None)


# --- with a real agent, and real other users ----------------------------------------------------------------------------

RSA = recipient("RSAES_OAEP_SHA_256")
CONFIG = f"""
mode = "0666"
[[grant]]
name = "other"
to = {{ uid = {OTHER_USER} }}
actions = ["kms:GenerateAndExportDataKey", "kms:DescribeKey", "kms:ExportDataKey", "kms:Decrypt"]
keys = ["alias/dev"]
recipients = ["{fingerprint(RSA.der)}"]
encryption_context = {{ tenant = "acme" }}
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningAgent]:
    """An agent that any user can reach, with one grant to another user."""
    with tempfile.TemporaryDirectory(prefix="keyferry-test-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "agent.toml").write_text(CONFIG)
        with RunningAgent(["--dev", "--config", str(folder / "agent.toml")], folder / "agent.sock") as agent:
            yield agent


def asked_as(uid: int, path: Path, calls: list[tuple[str, dict[str, object]]]) -> list[str]:
    """The codes that another user's calls end in ("OK" for success): asked in a child that becomes that user."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            with RawConnection(path) as connection:
                outcomes = [connection.call(method, params).error for method, params in calls]
            os.write(writing, "\n".join(error["Code"] if error else "OK" for error in outcomes).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as said:
        codes = said.read().split("\n")
    os.waitpid(child, 0)
    return codes


@root()
def test_another_user_may_do_what_its_grant_says_and_nothing_else(shared: RunningAgent) -> None:
    """Action, key, recipient and context: each alone decides."""
    good = {"KeyId": "alias/dev", "EncryptionContext": {"tenant": "acme"}, **RSA.params}
    with shared.client() as client:
        made = client.generate_and_export_data_key(
            key_id="alias/dev", encryption_context={"tenant": "acme"}, **RSA.arguments
        )
    blob = {"CiphertextBlob": made.ciphertext_blob, "EncryptionContext": {"tenant": "acme"}}
    calls = {
        "export": ("ExportDataKey", {**blob, **RSA.params}, "OK"),
        "plaintext, past the pins": ("Decrypt", blob, "Forbidden.NoPermission"),
        "as granted": ("GenerateAndExportDataKey", good, "OK"),
        "describe": ("DescribeKey", {"KeyId": "alias/dev"}, "OK"),
        "other context": (
            "GenerateAndExportDataKey",
            {**good, "EncryptionContext": {"tenant": "x"}},
            "Forbidden.NoPermission",
        ),
        "other recipient": (
            "GenerateAndExportDataKey",
            {**good, **recipient("SM2PKE").params},
            "Forbidden.NoPermission",
        ),
        "other key": ("DescribeKey", {"KeyId": "alias/dev-sm4"}, "Forbidden.NoPermission"),
        "no such key": ("DescribeKey", {"KeyId": "alias/dev-none"}, "Forbidden.NoPermission"),
        "bad parameter": ("DescribeKey", {"KeyId": 5}, "InvalidParameter"),
        "dry run": ("GenerateAndExportDataKey", {**good, "DryRun": True}, "DryRunOperationError"),
        "dry run refused": (
            "GenerateAndExportDataKey",
            {**good, "KeyId": "alias/x", "DryRun": True},
            "AccessDeniedError",
        ),
        "status": ("GetAgentStatus", {}, "OK"),
    }
    codes = asked_as(OTHER_USER, shared.socket, [(method, params) for method, params, _ in calls.values()])
    assert dict(zip(calls, codes, strict=True)) == {name: code for name, (_, _, code) in calls.items()}


@root()
def test_a_user_without_a_grant_learns_nothing_about_keys(shared: RunningAgent) -> None:
    """Keys that exist and keys that do not look the same, and so do ciphertexts."""
    with shared.client() as client:
        made = client.generate_and_export_data_key(key_id="alias/dev", **RSA.arguments)
    unknown = str(uuid.uuid4()).encode() + decode_base64(made.ciphertext_blob)[36:]
    codes = asked_as(
        OTHER_USER + 1,
        shared.socket,
        [
            ("DescribeKey", {"KeyId": "alias/dev"}),
            ("DescribeKey", {"KeyId": "alias/none"}),
            ("DescribeKey", {"KeyId": made.key_id}),
            ("DescribeKey", {"KeyId": made.key_id[:-1] + "x"}),
            ("Decrypt", {"CiphertextBlob": made.ciphertext_blob}),
            ("Decrypt", {"CiphertextBlob": unknown}),
            ("Decrypt", {"CiphertextBlob": made.ciphertext_blob, "DryRun": True}),
        ],
    )
    assert codes == ["Forbidden.NoPermission"] * 6 + ["AccessDeniedError"]


@root()
def test_the_overflow_uid_is_nobody(socket_path: Path) -> None:
    """Users of other user namespaces all look like 65534: a grant to that number matches none of them."""
    config = socket_path.with_suffix(".toml")
    config.write_text('mode = "0666"\n[[grant]]\nname="n"\nto={uid=65534}\nactions=["kms:*"]\nkeys=["*"]\n')
    for parent in (socket_path.parent, *socket_path.parent.parents[:3]):
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    with RunningAgent(["--dev", "--config", str(config)], socket_path) as agent:
        assert asked_as(65_534, agent.socket, [("DescribeKey", {"KeyId": "alias/dev"})]) == ["Forbidden.NoPermission"]


def test_without_grants_everybody_is_refused(socket_path: Path, tmp_path: Path) -> None:
    """Also the user the agent runs as."""
    from keyferry_agent.cli.main import main  # noqa: PLC0415

    keyring, identity = tmp_path / "k.age", tmp_path / "id"
    assert main(["keyring", "init", str(keyring), "--new-identity", str(identity)]) == 0
    assert main(["keyring", "create-key", str(keyring), "--unseal", str(identity), "--alias", "alias/a"]) == 0
    with RunningAgent(["--keyring", str(keyring), "--unseal", str(identity)], socket_path) as agent:
        agent.wait_for("startup.no_grants")
        with RawConnection(agent.socket) as connection:
            for name in ("alias/a", "alias/b"):
                error = connection.call("DescribeKey", {"KeyId": name}).error
                assert error is not None
                assert error["Code"] == "Forbidden.NoPermission"
            status = connection.call("GetAgentStatus", {}).result
            assert status is not None
            assert status["Keys"] == 0
            assert "Counters" not in status


def test_names_of_keys_that_are_not_there_are_not_remembered() -> None:
    """Whoever connects makes them up: a name of 512 characters can take two kilobytes."""
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
def test_grants_are_found_by_names_and_prefixes_as_if_each_had_been_looked_at(
    made: list[tuple[list[str], str]], names: list[str]
) -> None:
    """In their order, for an action that some of them have."""
    grants = tuple(Grant(str(place), {"uid": 1}, (action,), tuple(keys)) for place, (keys, action) in enumerate(made))
    for action in ("kms:Encrypt", "kms:Decrypt"):
        each = tuple(grant for grant in grants if grant.has_action(action) and grant.has_key(names))
        assert CallerGrants(grants).covering(action, "key", lambda: names) == each


def test_what_a_policy_remembers_of_callers_is_bounded() -> None:
    """Whoever has 65,536 users, or as many groups, takes a few MiB; and callers with the same grants share their tables."""
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


PLANTED: dict[str, dict[str, Any]] = {
    "Encrypt": {"KeyId": "alias/a", "Plaintext": "A" * 43 + "="},
    "Encrypt, to see": {"KeyId": "alias/a", "Plaintext": "A" * 43 + "=", "DryRun": True},
    "GenerateDataKey": {"KeyId": "alias/a"},
}


def test_a_grant_with_recipients_lets_its_holder_neither_learn_nor_choose_a_data_key(keyring: Path) -> None:
    """Not by Encrypt, nor by ReEncrypt of something that it chose under a key of its own; what was drawn it may export."""
    change(keyring, "create-key", "--alias", "alias/own")
    pinned = f'actions=["kms:*"]\nkeys=["alias/a"]\nrecipients=["{fingerprint(RSA.der)}"]'
    own = 'actions=["kms:*"]\nkeys=["alias/own"]'
    with two_callers(keyring, [pinned, own]) as (admin, app):
        for name, params in PLANTED.items():
            error = app.call(name.split(",")[0], params).error
            assert error is not None, name
            assert error["Code"] in ("Forbidden.NoPermission", "AccessDeniedError"), name
        chosen = app.call("Encrypt", {"KeyId": "alias/own", "Plaintext": "A" * 43 + "="}).result
        assert chosen is not None
        move = {"CiphertextBlob": chosen["CiphertextBlob"], "DestinationKeyId": "alias/a"}
        refused = app.call("ReEncrypt", move).error
        assert refused is not None
        assert refused["Code"] == "Forbidden.NoPermission"
        assert admin.call("ReEncrypt", move).error is None
        drawn = app.call("GenerateDataKeyWithoutPlaintext", {"KeyId": "alias/a"}).result
        assert drawn is not None
        assert app.call("ExportDataKey", {"CiphertextBlob": drawn["CiphertextBlob"], **RSA.params}).error is None
        stays = {"CiphertextBlob": drawn["CiphertextBlob"], "DestinationKeyId": "alias/a"}
        assert app.call("ReEncrypt", stays).error is None
