"""`keyferry-agent audit who`: the questions of an incident, by caller, key, recipient and time, and for single data keys."""

import json
import os
import pwd
import re
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from support.agent import RawConnection
from support.audit_log import START, requests
from support.calls import call_ok
from support.gateway import call_v1, connect, grant_table, new_access_key, prepare, serving_gateway
from support.keyring import change, opened, serving
from support.keys import recipient

from keyferry.ciphertext import ciphertext_hash
from keyferry_agent.chained_log.chain import BEGINNING, link
from keyferry_agent.cli.audit import times
from keyferry_agent.cli.main import main

RSA = recipient("RSAES_OAEP_SHA_256")
SM2 = recipient("SM2PKE")
MORE = """
[[grant]]
name = "export"
to = {{ uid = {uid} }}
actions = ["kms:GenerateAndExportDataKey"]
keys = ["alias/b"]
"""
Who: TypeAlias = Callable[..., Any]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """The audit log of a test."""
    return tmp_path / "audit.jsonl"


@pytest.fixture
def who(record: Path, capsys: pytest.CaptureFixture[str]) -> Who:
    """`audit who --json` on the file, or on other arguments."""

    def ask(*arguments: object, code: int = 0, files: tuple[object, ...] = ()) -> Any:
        capsys.readouterr()
        assert main(["audit", "who", *map(str, files or (record,)), *map(str, arguments), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return ask


@pytest.fixture
def made(keyring: Path, socket_path: Path, record: Path) -> dict[str, dict[str, Any]]:
    """The answers of an agent to some requests, by their names; it has exited."""
    more = f'[audit]\npath = "{record}"\n'
    change(keyring, "create-key", "--alias", "alias/b")
    with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
        answers = {
            "plain": call_ok(
                connection, "GenerateDataKey", {"KeyId": "alias/a", "EncryptionContext": {"tenant": "acme"}}
            ),
            "rsa": call_ok(connection, "GenerateAndExportDataKey", {"KeyId": "alias/a", **RSA.params}),
            "sm2": call_ok(connection, "GenerateAndExportDataKey", {"KeyId": "alias/b", **SM2.params}),
        }
        blob = answers["rsa"]["CiphertextBlob"]
        answers["exported"] = call_ok(connection, "ExportDataKey", {"CiphertextBlob": blob, **SM2.params})
        answers["moved"] = call_ok(connection, "ReEncrypt", {"CiphertextBlob": blob, "DestinationKeyId": "alias/b"})
        answers["unseen"] = call_ok(connection, "GenerateDataKeyWithoutPlaintext", {"KeyId": "alias/b"})
        call_ok(connection, "DescribeKey", {"KeyId": "alias/a"})
        assert agent.stop() == 0
    return answers


def test_every_filter_selects_entries(made: dict[str, dict[str, Any]], who: Who, record: Path) -> None:
    """Filters work alone and together, and a value that no entry has selects none."""
    mine, pins = os.getuid(), {entry["request_id"]: entry["recipient"] for entry in requests(record)}
    rsa, sm2 = (pins[made[name]["RequestId"]] for name in ("rsa", "sm2"))
    all_of_it = ["plain", "rsa", "sm2", "exported", "moved"]
    ciphertext = ciphertext_hash(made["rsa"]["CiphertextBlob"])
    questions: list[tuple[list[object], list[str]]] = [
        ([], all_of_it),
        (["--uid", mine], all_of_it),
        (["--user", pwd.getpwuid(mine).pw_name], all_of_it),
        (["--uid", mine + 1], []),
        (["--unit", "orders.service"], []),
        (["--recipient", rsa], ["rsa"]),
        (["--recipient", sm2], ["sm2", "exported"]),
        (["--recipient", sm2, "--key", made["rsa"]["KeyId"]], ["exported"]),
        (["--grant", "me"], all_of_it),
        (["--grant", "other"], []),
        (["--key", made["sm2"]["KeyId"]], ["sm2", "moved"]),
        (["--key", f"acs:kms:local:0:key/{made['sm2']['KeyId']}"], ["sm2", "moved"]),
        (["--key", "alias/a"], ["plain", "rsa", "exported", "moved"]),
        (["--key", "acs:kms:local:0:alias/a"], ["plain", "rsa", "exported", "moved"]),
        (["--key", "00000000-0000-4000-8000-000000000000"], []),
        (["--version", made["sm2"]["KeyVersionId"]], ["sm2", "moved"]),
        (["--operation", "ReEncrypt"], ["moved"]),
        (["--operation", "GenerateDataKeyWithoutPlaintext"], ["unseen"]),
        (["--operation", "Encrypt"], []),
        (["--context-key", "tenant"], ["plain"]),
        (["--context-key", "none"], []),
        (["--ciphertext", ciphertext], ["rsa", "exported", "moved"]),
        (["--ciphertext", ciphertext_hash(made["moved"]["CiphertextBlob"])], ["moved"]),
        (["--since", "1h", "--until", "now"], all_of_it),
        (["--since", "2026-01-01", "--until", "2026-01-02"], []),
        (["--until", "1h"], []),
        (["--since", "9999-12-31"], []),
    ]
    for arguments, expected in questions:
        listed = who("--list", *arguments)
        assert [entry["request_id"] for entry in listed] == [made[name]["RequestId"] for name in expected], arguments
        assert sum(group["count"] for group in who(*arguments)) == len(expected), arguments


def test_single_data_keys_are_listed(
    made: dict[str, dict[str, Any]], who: Who, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with its hash, key, version, recipient and caller, in the order of the log, from rotated files too."""
    lines = record.read_bytes().splitlines(keepends=True)
    rotated = record.with_name("audit.jsonl.1")
    rotated.write_bytes(b"".join(lines[:5]))
    record.write_bytes(b"".join(lines[5:]))
    listed = who("--list", files=(record, rotated))
    assert [entry["request_id"] for entry in listed] == [
        made[name]["RequestId"] for name in ("plain", "rsa", "sm2", "exported", "moved")
    ]
    assert [entry["ciphertext"] for entry in listed] == [
        ciphertext_hash(made[name]["CiphertextBlob"]) for name in ("plain", "rsa", "sm2", "rsa", "rsa")
    ]
    assert listed[4]["destination_ciphertext"] == ciphertext_hash(made["moved"]["CiphertextBlob"])
    assert {entry["uid"] for entry in listed} == {os.getuid()}
    assert listed[0]["context_keys"] == ["tenant"]
    capsys.readouterr()
    assert main(["audit", "who", str(record), str(rotated), "--list", "--key", "alias/b"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    for word in (
        made["sm2"]["RequestId"],
        made["sm2"]["KeyVersionId"],
        listed[2]["ciphertext"],
        listed[2]["recipient"],
    ):
        assert word in first
    assert f" as {listed[4]['destination_ciphertext']}, " in second
    assert main(["audit", "who", str(record), str(rotated), "--list", "--grant", "none"]) == 0
    assert capsys.readouterr().out == "No caller received such a data key.\n"
    assert main(["audit", "who", str(record), "--list", "--grant", "none"]) == 1
    assert "incomplete" in capsys.readouterr().out


def test_an_alias_is_found_where_the_keyring_cannot_be_opened(
    made: dict[str, dict[str, Any]], who: Who, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The audit log has the names of a stopped agent's keys, whose credential is gone."""
    config = ("--config", keyring.parent / "agent.toml")
    (keyring.parent / "identity").unlink()
    assert len(who("--list", "--key", "alias/b", *config)) == 2
    main(["audit", "who", *map(str, config), "--key", "alias/b"])
    said = capsys.readouterr().err
    assert f"alias/b was key {made['sm2']['KeyId']} at 20" in said
    assert "identity: No such file" in said
    assert main(["audit", "who", *map(str, config), "--key", "alias/none"]) == 1
    said = capsys.readouterr().err
    assert "alias/none: neither the audit log nor the keyring has this alias" in said
    assert "name the key by its ID" in said


def test_alias_is_resolved_as_of_the_time_of_the_entry(
    keyring: Path, socket_path: Path, record: Path, who: Who, capsys: pytest.CaptureFixture[str]
) -> None:
    """An alias that has moved leads to the keys of both times, and the times are printed."""
    change(keyring, "create-key", "--alias", "alias/b")
    old, new = (opened(keyring).find(name).key_id for name in ("alias/a", "alias/b"))
    more = f'[audit]\npath = "{record}"\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
        call_ok(connection, "GenerateDataKey", {"KeyId": "alias/a"})
        change(keyring, "update-alias", "alias/a", "alias/b")
        agent.wait_for("reload.done")
        call_ok(connection, "GenerateDataKey", {"KeyId": "alias/a"})
        assert agent.stop() == 0
    assert [entry["key_id"] for entry in who("--list", "--key", "alias/a")] == [old, new]
    assert main(["audit", "who", str(record), "--key", "alias/a", "--config", str(keyring.parent / "agent.toml")]) == 0
    said = capsys.readouterr().err
    assert f"alias/a is key {new} in the keyring" in said
    assert f"alias/a was key {old} at " in said


def test_truncated_context_keys_make_the_answer_incomplete(record: Path, who: Who) -> None:
    """An entry holds 32 context keys, so a filter by another key cannot exclude it."""
    fields = {
        "time": START.isoformat(),
        "event": "audit",
        "outcome": "OK",
        "operation": "Decrypt",
        "previous": BEGINNING,
    }
    record.write_text(json.dumps({**fields, "context_keys": [f"k{number:02}" for number in range(32)]}) + "\n")
    assert who("--list", "--context-key", "z", code=1) == []
    assert len(who("--list", "--context-key", "k07")) == 1


@pytest.mark.parametrize(
    ("text", "ago"),
    [
        ("2h", timedelta(hours=2)),
        ("90m", timedelta(minutes=90)),
        ("90min", timedelta(minutes=90)),
        ("3d", timedelta(3)),
    ],
)
def test_time_may_be_relative(text: str, ago: timedelta) -> None:
    """A duration is a time that long before now."""
    for parse in (times.since, times.until):
        assert abs(datetime.now(UTC) - ago - parse(text)) < timedelta(seconds=5)


def test_day_starts_at_since_and_ends_at_until() -> None:
    """Days are of this host's time zone; a weekday is the last one."""
    today = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)  # noqa: DTZ005
    day = timedelta(days=1)
    for text, begins in (
        ("today", today),
        ("yesterday", today - day),
        (today.strftime("%A"), today),
        ((today - day).strftime("%A").lower(), today - day),
        ("2026-01-31", datetime(2026, 1, 31)),  # noqa: DTZ001 - the host's time zone
        ("20260131", datetime(2026, 1, 31)),  # noqa: DTZ001
    ):
        assert times.since(text) == begins.astimezone()
        assert times.until(text) == (begins + day).astimezone()
    for text in ("2026-01-31T12:00:00Z", "2026-01-31T13:00+01:00"):
        assert times.since(text) == times.until(text) == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert times.until("9999-12-31") >= datetime(9999, 12, 31, tzinfo=UTC) - day


@pytest.mark.parametrize(
    "text", ["next week", "", "2026-13-01", "5y", "-2h", "999999w", "0000-00-00", "monday morning"]
)
@pytest.mark.parametrize("option", ["--since", "--until"])
def test_a_bad_time_is_explained(record: Path, capsys: pytest.CaptureFixture[str], text: str, option: str) -> None:
    """The message has the expected forms in words, and no function's name."""
    with pytest.raises(SystemExit) as ended:
        main(["audit", "who", str(record), f"{option}={text}"])
    assert ended.value.code == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert f"argument {option}: {text!r} is not a time: expected a time like 2026-01-31" in said


def test_impossible_queries_are_explained(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`audit who` explains an unknown user, and a period that ends before it begins."""
    line = json.dumps({"event": "audit", "previous": BEGINNING}).encode()
    record.write_bytes(line + b"\n")
    assert len(link(line)) == 64
    for arguments, why in (
        (["--user", "no-such-user"], "this host has no such user; give its number with --uid"),
        (["--since", "today", "--until", "2h", "--until", "yesterday"], "is not after --since"),
    ):
        assert main(["audit", "who", str(record), *arguments]) == 1
        assert why in capsys.readouterr().err


def test_access_keys_of_a_gateway_are_told_apart(
    tmp_path: Path, record: Path, who: Who, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each caller is named by the access key; another access key's requests are another group."""
    prepared = prepare(tmp_path, more=f'[audit]\npath = "{record}"\n')
    other = new_access_key(prepared.keyring)
    with prepared.config.open("a") as config:
        config.write(grant_table("other", f'access_key = "{other.access_key_id}"'))
    with serving_gateway(prepared), closing(connect(prepared)) as connection:
        for credentials in (prepared.credentials, other, other):
            assert call_v1(connection, credentials, "GenerateDataKey", KeyId="alias/a").status == 200
    assert [(group["access_key"], group["count"]) for group in who()] == [
        (prepared.credentials.access_key_id, 1),
        (other.access_key_id, 2),
    ]
    assert [entry["access_key"] for entry in who("--list", "--access-key", other.access_key_id)] == [
        other.access_key_id
    ] * 2
    capsys.readouterr()
    assert main(["audit", "who", str(record), "--access-key", other.access_key_id]) == 0
    assert capsys.readouterr().out.startswith(f"access key {other.access_key_id}: GenerateDataKey 2 times")
