"""`keyferry-agent explain`: the explanation of each grant, and its agreement with the agent's decision."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.authorization import allows

from keyferry_agent.authz.grants import PLAINTEXT, Grant
from keyferry_agent.cli.explain import mismatch
from keyferry_agent.cli.main import main
from keyferry_agent.peer import Peer

PIN = "sha256:" + "0" * 64
CONFIGURATION = f"""
[[grant]]
name = "export"
to = {{ uid = 1000, unit = "orders.service" }}
actions = ["kms:ExportDataKey", "kms:Decrypt"]
keys = ["alias/orders-*"]
recipients = ["{PIN}"]
encryption_context = {{ tenant = "acme" }}

[[grant]]
name = "describe"
to = {{ gid = 5 }}
actions = ["kms:Describe*"]
keys = ["acs:kms:local:0:alias/orders-eu"]
"""
GOOD = {
    "--uid": "1000",
    "--unit": "orders.service",
    "--action": "kms:ExportDataKey",
    "--key": "alias/orders-eu",
    "--recipient": PIN,
    "--context": "tenant=acme",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with two grants."""
    path = tmp_path / "agent.toml"
    path.write_text(CONFIGURATION)
    return path


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "export: allows it"),
        ({"--uid": "1001"}, "export: to.uid: the grant is to 1000; the caller's is 1001"),
        ({"--uid": "0"}, "export: to.uid: the grant is to 1000; the caller's is 0"),
        ({"--unit": "web.service"}, "export: to.unit: the grant is to orders.service; the caller's is web.service"),
        ({"--action": "kms:Encrypt"}, "export: actions: kms:Encrypt is not one of"),
        ({"--key": "alias/web"}, "export: keys: alias/web, acs:kms:local:0:alias/web does not match alias/orders-*"),
        ({"--recipient": "sha256:" + "1" * 64}, "export: recipients: sha256:1"),
        ({"--action": "kms:Decrypt"}, "export: recipients: a grant with recipients never covers kms:Decrypt"),
        ({"--context": "tenant=other"}, "export: encryption_context: the grant requires tenant=acme"),
        ({"--action": "kms:DescribeKey", "--gid": "5"}, "describe: allows it"),
        ({"--action": "kms:DescribeKey"}, "describe: to.gid: the grant is to 5; the caller's is none"),
        (
            {"--action": "kms:DescribeKey", "--gid": "5", "--key": "acs:kms:local:0:alias/orders-eu"},
            "describe: allows it",
        ),
    ],
)
def test_first_mismatch_of_each_grant_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, str], expected: str
) -> None:
    """Every grant has its line, and the exit code is 0 if one allows the request."""
    arguments = [part for pair in {**GOOD, **changed}.items() for part in pair]
    code = main(["explain", "--config", str(config), *arguments])
    out = capsys.readouterr().out
    assert expected in out
    assert (code == 0) == ("allows it" in out) == out.splitlines()[2].startswith("Allowed: ")
    assert (len(out.splitlines()) == 3) == (code == 0)


def test_callers_of_a_gateway_are_named_by_access_key(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A caller over TCP has no uid; a caller on a Unix socket has one besides its access key."""
    with config.open("a") as text:
        text.write(
            '[[grant]]\nname = "gateway"\nto = { access_key = "LTAIone" }\nactions = ["kms:ListKeys"]\nkeys = ["*"]\n'
            '[[grant]]\nname = "both"\nto = { access_key = "LTAItwo", uid = 5 }\nactions = ["kms:ListKeys"]\nkeys = ["*"]\n'
        )
    command = ["explain", "--config", str(config), "--action", "kms:ListKeys", "--listener", "kms"]
    assert main([*command, "--access-key", "LTAIone"]) == 0
    printed = capsys.readouterr().out
    assert "gateway: allows it" in printed
    assert "both: to.uid: the grant is to 5; the caller's is not known" in printed
    assert main([*command, "--access-key", "LTAItwo", "--uid", "5"]) == 0
    assert "both: allows it" in capsys.readouterr().out
    assert main([*command, "--uid", "5"]) == 1
    assert "to.access_key: the grant is to LTAIone; the caller's is missing" in capsys.readouterr().out
    assert main([*command, "--access-key", "LTAIthree"]) == 1
    assert 'name = "LTAIthree-ListKeys"\nto = { access_key = "LTAIthree" }' in capsys.readouterr().out


def test_unusable_arguments_of_explain_are_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`explain` names a context pair without a value, and an invalid configuration."""
    arguments = [part for pair in GOOD.items() for part in pair]
    assert main(["explain", "--config", str(config), *arguments, "--context", "nonsense"]) == 1
    assert "expected a pair like tenant=acme" in capsys.readouterr().err
    config.write_text("nonsense")
    assert main(["explain", "--config", str(config), *arguments]) == 1
    assert "TOML" in capsys.readouterr().err


GRANTS = st.builds(
    Grant,
    st.just("g"),
    st.dictionaries(st.sampled_from(["uid", "gid"]), st.integers(0, 2), min_size=1),
    st.lists(st.sampled_from(["kms:Decrypt", "kms:E*"]), min_size=1).map(tuple),
    st.lists(st.sampled_from(["alias/a", "alias/*", "*"]), min_size=1).map(tuple),
    st.one_of(st.none(), st.just(frozenset({PIN}))),
    st.dictionaries(st.sampled_from("ab"), st.sampled_from("12")),
)


@given(
    grant=GRANTS,
    uid=st.integers(0, 2),
    gids=st.frozensets(st.integers(0, 2)),
    action=st.sampled_from(["kms:Decrypt", "kms:Encrypt"]),
    name=st.sampled_from(["alias/a", "alias/b"]),
    fingerprint=st.sampled_from([None, PIN, PLAINTEXT, "sha256:other"]),
    context=st.dictionaries(st.sampled_from("ab"), st.sampled_from("12")),
)
def test_explanation_agrees_with_the_decision(
    grant: Grant,
    uid: int,
    gids: frozenset[int],
    action: str,
    name: str,
    fingerprint: str | None,
    context: dict[str, str],
) -> None:
    """`explain` and the agent agree for any grant and request."""
    peer = Peer(uid=uid, gids=gids, pid=1, listener="default")
    decided = allows(
        [grant] if grant.matches_caller(peer) else [], action, [name], fingerprint=fingerprint, context=context
    )
    assert (mismatch(grant, peer, action, [name], fingerprint, context) is None) == (decided is grant)
