"""`keyferry-agent explain` with an operator's data: a RequestId, a key ID, names; and the missing grant."""

import getpass
import grp
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from support.agent import RawConnection, RunningAgent
from support.keyring import change, opened, serving
from support.keys import recipient

from keyferry_agent.cli.main import main
from keyferry_agent.config import settings

RSA = recipient("RSAES_OAEP_SHA_256")
PIN = "sha256:" + "0" * 64
PINNED = f"""
[[grant]]
name = "pinned"
to = {{ uid = {os.getuid()} }}
actions = ["kms:*"]
keys = ["alias/orders"]
recipients = ["{PIN}"]
"""
DEMANDING = f"""
[[grant]]
name = "demanding"
to = {{ uid = {os.getuid()}, pod = "0b5f2a4e-0000-4000-8000-000000000000" }}
actions = ["kms:GenerateDataKey"]
keys = ["alias/orders"]
encryption_context = {{ tenant = "acme" }}
"""
Explain: TypeAlias = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(keyring: Path) -> Path:
    """Where the configuration is: grants on alias/orders only, and an audit log in a file."""
    change(keyring, "create-key", "--alias", "alias/orders")
    return keyring.parent / "agent.toml"


@pytest.fixture
def agent(config: Path, keyring: Path, socket_path: Path) -> Iterator[RunningAgent]:
    """An agent with that configuration."""
    more = f'[audit]\npath = "{keyring.parent / "audit.jsonl"}"\n{PINNED}{DEMANDING}'
    with serving(keyring, socket_path, more=more, actions="kms:ListKeys") as agent:
        assert config.exists()
        yield agent


@pytest.fixture
def explain(config: Path, capsys: pytest.CaptureFixture[str]) -> Explain:
    """Return a function that runs the command, and returns its exit code and output."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["explain", "--config", str(config), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def request_id(socket: Path, method: str, params: dict[str, Any]) -> str:
    """Return the RequestId of the answer to a request, a result or an error."""
    with RawConnection(socket) as connection:
        response = connection.call(method, params)
        found: str = (response.error or response.result or {})["RequestId"]
        return found


def test_a_key_is_explained_by_any_name(agent: RunningAgent, keyring: Path, explain: Explain) -> None:
    """The error and the audit log have its ID; the grant has its alias."""
    key_id = opened(keyring).find("alias/orders").key_id
    for name in ("alias/orders", key_id, f"acs:kms:local:0:key/{key_id}", "acs:kms:local:0:alias/orders"):
        code, out, err = explain("--uid", os.getuid(), "--action", "kms:DescribeKey", "--key", name)
        assert (code, err) == (0, "")
        assert "pinned: allows it\n" in out
        assert out.splitlines()[-1].startswith("Allowed: kms:DescribeKey on ")
    assert agent.stop() == 0


def test_a_grant_with_recipients_is_never_plainly_allowed(agent: RunningAgent, explain: Explain) -> None:
    """Without --recipient, `explain` prints the grant's recipients."""
    question = ("--uid", os.getuid(), "--action", "kms:GenerateAndExportDataKey", "--key", "alias/orders")
    code, out, _ = explain(*question)
    assert code == 0
    assert f"pinned: allows it for these recipients only: {PIN}\n" in out
    assert f"Allowed for these recipients only: {PIN}: kms:GenerateAndExportDataKey on alias/orders" in out
    assert "Allowed: " not in out
    assert "Allowed: kms:" in explain(*question, "--recipient", PIN)[1]
    code, out, _ = explain(*question, "--recipient", "sha256:" + "1" * 64)
    assert code == 1
    assert "is not in the list" in out
    code, out, _ = explain("--uid", os.getuid(), "--action", "kms:ReEncryptFrom", "--key", "alias/orders")
    assert code == 0
    assert "Allowed under a condition: " in out
    assert "ReEncrypt keeps the key and the EncryptionContext" in out
    assert agent.has_logged("agent.serving")


def test_names_of_an_unreadable_keyring_come_from_the_audit_log(
    agent: RunningAgent, keyring: Path, explain: Explain
) -> None:
    """The names are those that the keys had last; without an audit log, only the given names are judged."""
    key_id = opened(keyring).find("alias/orders").key_id
    assert agent.stop() == 0
    (keyring.parent / "identity").unlink()
    question = ("--uid", os.getuid(), "--action", "kms:DescribeKey", "--key", key_id)
    code, out, err = explain(*question)
    assert code == 0, out
    assert "the keyring was not read" in err
    assert "the key's other names are from the audit log" in err
    (keyring.parent / "audit.jsonl").unlink()
    code, out, err = explain(*question)
    assert code == 1
    assert "only the names on the command line are judged" in err
    assert explain(*question, "--key", "alias/orders")[0] == 0


def test_a_key_that_is_missing_or_disabled_is_not_allowed(agent: RunningAgent, keyring: Path, explain: Explain) -> None:
    """Grants do not help, and names of two keys are not one key."""
    change(keyring, "create-alias", "alias/second", "alias/a")
    config = keyring.parent / "agent.toml"
    config.write_text(config.read_text() + PINNED.replace("pinned", "all").replace('"alias/orders"', '"*"'))
    question = ("--uid", os.getuid(), "--action", "kms:GenerateDataKeyWithoutPlaintext")
    code, out, _ = explain(*question, "--key", "alias/none")
    assert (code, "Refused: the keyring has no alias/none, so the agent answers Forbidden.AliasNotFound" in out) == (
        1,
        True,
    )
    change(keyring, "disable", "alias/orders")
    code, out, _ = explain(*question, "--key", "alias/orders")
    assert (code, "Refused: the key's state is Disabled, so the agent answers Rejected.Disabled" in out) == (1, True)
    assert explain("--uid", os.getuid(), "--action", "kms:DescribeKey", "--key", "alias/orders")[0] == 0
    code, _, err = explain(*question, "--key", "alias/orders", "--key", "alias/second")
    assert (code, "--key names 2 different keys" in err) == (1, True)
    assert agent.has_logged("agent.serving")


def test_users_and_groups_have_names(agent: RunningAgent, explain: Explain) -> None:
    """A user's groups come with it; a name that this host does not have is explained."""
    rest = ("--action", "kms:DescribeKey", "--key", "alias/orders")
    code, _, err = explain("--user", getpass.getuser(), *rest)
    assert (code, f"user {getpass.getuser()} has the uid {os.getuid()}, and the groups" in err) == (0, True)
    assert explain("--uid", os.getuid(), "--group", grp.getgrgid(os.getgid()).gr_name, *rest)[0] == 0
    for option in ("--user", "--group"):
        more = ("--uid", "1") if option == "--group" else ()
        code, _, err = explain(option, "no-such-name", *more, *rest)
        assert (code, f"{option} no-such-name: this host has no such" in err) == (1, True)
    assert agent.has_logged("agent.serving")


def test_a_request_is_explained_by_its_id(agent: RunningAgent, keyring: Path, explain: Explain) -> None:
    """From the audit log, rotated files too, as far as the entry goes; letters of the ID may be small."""
    demanded = {"KeyId": "alias/orders", "EncryptionContext": {"tenant": "other"}}
    exported = {"KeyId": "alias/orders", **RSA.params}
    ids = {
        name: request_id(agent.socket, method, params)
        for name, method, params in (
            ("described", "DescribeKey", {"KeyId": "alias/orders"}),
            ("generated", "GenerateDataKey", demanded),
            ("without", "GenerateDataKey", {"KeyId": "alias/orders"}),
            ("exported", "GenerateAndExportDataKey", exported),
            ("other", "DescribeKey", {"KeyId": "alias/a"}),
            ("missing", "DescribeKey", {"KeyId": "alias/none"}),
            ("listed", "ListKeys", {}),
            ("nothing", "Explode", {}),
            ("damaged", "Decrypt", {"CiphertextBlob": "AAAA"}),
        )
    }
    log = keyring.parent / "audit.jsonl"
    log.rename(log.with_name("audit.jsonl.1"))
    agent.wait_for("audit.reopened")
    assert agent.stop() == 0
    expected: dict[str, tuple[int, list[str]]] = {
        "described": (0, ["uid", "It was allowed by the grant 'pinned'", "Allowed: kms:DescribeKey on "]),
        "generated": (
            0,
            [
                "It was refused, because no grant covered it then.",
                "if the caller's pod is 0b5f2a4e-0000-4000-8000-000000000000, which is not recorded",
                "if tenant is acme, as values are not recorded",
                "Allowed under a condition",
            ],
        ),
        "without": (1, ["encryption_context: the grant requires tenant=acme", "This grant would allow it"]),
        "exported": (1, ["recipients: sha256:", "is not in the list", "recipients = ["]),
        "other": (1, ["alias/a", "Refused: kms:DescribeKey", 'keys = ["alias/a"]']),
        "missing": (0, ["the key is one of alias/orders, which is not recorded"]),
        "listed": (0, ["Allowed: kms:ListKeys on every key"]),
        "nothing": (1, ["the agent has no operation 'Explode'"]),
        "damaged": (1, ["It was not refused by the grants", "never covers kms:Decrypt", 'keys = ["alias/NAME"]']),
    }
    for name, (code, words) in expected.items():
        found, out, err = explain("--request-id", ids[name].lower())
        assert found == code, (name, out, err)
        for word in words:
            assert word in out + err, (name, word, out, err)
    code, _, err = explain("--request-id", "00000000-0000-4000-8000-000000000000")
    assert code == 1
    assert "no request 00000000-0000-4000-8000-000000000000 is in the audit log" in err
    assert "complete from its beginning" in err
    code, out, _ = explain("--request-id", ids["exported"], "--json")
    answer = json.loads(out)
    assert (code, answer["allowed"], answer["request"]["request_id"]) == (1, False, ids["exported"])


def test_a_request_is_found_in_a_journal(keyring: Path, config: Path, socket_path: Path, explain: Explain) -> None:
    """The journal's files are named if the audit log goes to standard error."""
    with serving(keyring, socket_path) as agent:
        asked = request_id(agent.socket, "DescribeKey", {"KeyId": "alias/orders"})
        assert agent.stop() == 0
    journal = config.with_name("journal")
    journal.write_text("Started keyferry-agent.service.\n" + "".join(agent.output))
    code, _, err = explain("--request-id", asked)
    assert (code, "--audit-log FILE" in err) == (1, True)
    code, out, _ = explain("--request-id", asked, "--audit-log", journal)
    assert (code, "Allowed: kms:DescribeKey" in out) == (0, True)


@pytest.mark.parametrize(
    "question",
    [
        (
            "--uid",
            "1234",
            "--action",
            "kms:Decrypt",
            "--key",
            "alias/orders",
            "--context",
            'tenant=a"b',
            "--context",
            "x y=z",
        ),
        (
            "--uid",
            "1234",
            "--action",
            "kms:ExportDataKey",
            "--key",
            "alias/a",
            "--recipient",
            PIN,
            "--unit",
            "o.service",
        ),
        ("--uid", "1234", "--action", "kms:ListKeys"),
        ("--user", getpass.getuser(), "--action", "kms:Encrypt", "--key", "alias/a"),
    ],
)
def test_suggested_grant_allows_the_refused_request(
    agent: RunningAgent, config: Path, explain: Explain, question: tuple[str, ...]
) -> None:
    """The request is allowed after the printed grant was appended to the configuration."""
    code, out, _ = explain(*question, "--json")
    answer = json.loads(out)
    assert (code, answer["allowed"]) == (1, False)
    toml = answer["needed_grant"]
    assert explain(*question)[1].endswith(f"This grant would allow it:\n\n{toml}\n")
    config.write_text(f"{config.read_text()}\n{toml}\n")
    settings.read(config)
    code, out, _ = explain(*question)
    assert (code, out.splitlines()[-1].startswith("Allowed: ")) == (0, True)
    assert json.loads(explain(*question, "--json")[1])["needed_grant"] is None
    assert agent.has_logged("agent.serving")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "--request-id, --uid, --user or --access-key is required"),
        (("--uid", "1"), "--action is required"),
        (("--uid", "1", "--action", "kms:Decrypt"), "--key is required"),
        (("--uid", "orders", "--action", "kms:Decrypt"), "an integer is expected, in the digits 0 to 9, not 'orders'"),
    ],
)
def test_missing_argument_of_explain_is_named(
    explain: Explain, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], why: str
) -> None:
    """The exit code is the one for usage."""
    with pytest.raises(SystemExit) as ended:
        explain(*arguments)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err
