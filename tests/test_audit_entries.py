"""The content of audit entries: data keys, severities, the start of an agent, and the names of its keys."""

import base64
import hashlib
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.agent import RawConnection
from support.audit_log import requests
from support.calls import call_ok, call_refused
from support.inside import new_audit_log
from support.keyring import change, serving
from support.keys import recipient

from keyferry import __version__
from keyferry_agent.audit import AuditLog, agent_entries, log
from keyferry_agent.audit.entry import AuditedRequest, AuditEntry
from keyferry_agent.chained_log import chain
from keyferry_agent.config.settings import Audit
from keyferry_agent.peer import HttpOrigin, Peer

RSA = recipient("RSAES_OAEP_SHA_256")
PEER = Peer(uid=1, gids=frozenset({1}), pid=1, listener="default")
OTHER = {"tenant": "other"}


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """The audit log of a test."""
    return tmp_path / "audit.jsonl"


def sha256sum(blob: str) -> str:
    """The hash of a CiphertextBlob as the documentation computes it: base64 -d | sha256sum."""
    printed = subprocess.run(
        ["sh", "-c", "base64 -d | sha256sum"], input=blob.encode(), capture_output=True, check=True
    )
    return f"sha256:{printed.stdout.split()[0].decode()}"


def entries(path: Path) -> list[dict[str, Any]]:
    """All entries of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_entry_has_the_hash_of_its_ciphertext(keyring: Path, socket_path: Path, record: Path) -> None:
    """Generated, exported, decrypted and re-encrypted ciphertexts are hashed, those of refused requests included."""
    more = f'[audit]\npath = "{record}"\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
        made = [
            call_ok(connection, "GenerateDataKey", {"KeyId": "alias/a"}),
            call_ok(connection, "GenerateDataKeyWithoutPlaintext", {"KeyId": "alias/a"}),
            call_ok(connection, "GenerateAndExportDataKey", {"KeyId": "alias/a", **RSA.params}),
            call_ok(connection, "Encrypt", {"KeyId": "alias/a", "Plaintext": "AAAA"}),
        ]
        blob = made[0]["CiphertextBlob"]
        call_ok(connection, "Decrypt", {"CiphertextBlob": blob})
        call_ok(connection, "Decrypt", {"CiphertextBlob": base64.b64decode(blob)})
        call_ok(connection, "ExportDataKey", {"CiphertextBlob": blob, **RSA.params})
        call_refused(connection, "Decrypt", {"CiphertextBlob": blob, "EncryptionContext": OTHER}, "InvalidParameter")
        again = call_ok(
            connection,
            "ReEncrypt",
            {"CiphertextBlob": blob, "DestinationKeyId": "alias/a", "DestinationEncryptionContext": OTHER},
        )
        call_ok(connection, "DescribeKey", {"KeyId": "alias/a"})
        call_refused(connection, "Decrypt", {"CiphertextBlob": "AAAA"}, "InvalidParameter")
    *first, decrypted, binary, exported, denied, moved, described, nonsense = requests(record)
    assert [entry["ciphertext"] for entry in first] == [sha256sum(each["CiphertextBlob"]) for each in made]
    for entry in (decrypted, binary, exported, denied, moved):
        assert entry["ciphertext"] == sha256sum(blob)
    assert moved["destination_ciphertext"] == sha256sum(again["CiphertextBlob"])
    assert described["ciphertext"] == described["destination_ciphertext"] == decrypted["destination_ciphertext"] == ""
    assert nonsense["ciphertext"] == sha256sum("AAAA")
    text = record.read_text()
    assert not any(each["CiphertextBlob"][20:60] in text for each in made)


def test_level_separates_refusals_from_failures() -> None:
    """The level is info for success, warning for a refusal, and error for a failure of the agent."""
    expected = {
        "OK": "info",
        "DryRunOperationError": "info",
        "Forbidden.NoPermission": "warning",
        "Rejected.Throttling": "warning",
        "InvalidParameter": "warning",
        "AccessDeniedError": "warning",
        "InternalFailure": "error",
        "ServiceUnavailableTemporary": "error",
        "Another": "warning",
    }
    for outcome, level in expected.items():
        request = AuditedRequest(PEER, "id", 0.0, AuditEntry(""), outcome)
        line = log._line("2026-11-30T12:00:00.000+00:00", log._of_peer(PEER), request)
        fields = json.loads(f"{line}}}")
        assert (fields["outcome"], fields["level"]) == (outcome, level)


@pytest.mark.parametrize("http", [None, HttpOrigin("ACS3", "", True, '"' * 128)])
def test_longest_entry_fits_an_atomic_pipe_write(record: Path, http: HttpOrigin | None) -> None:
    """An entry with its longest fields, a program and two hashes has at most PIPE_BUF bytes; also through a gateway."""
    peer = Peer(
        4294967294,
        frozenset(range(2**32 - 100, 2**32)),
        2**22,
        "l" * 64,
        unit="u" * 255 + ".service",
        exe="/" + "\N{GRINNING FACE}" * 1_000,
        sha256="sha256:" + "0" * 64,
        access_key="A" * 128 if http else "",
        http=http,
    )
    keys = tuple(f"{chr(0x1F600)}{number}" * 20 for number in range(40))
    ids, blob_hash = ("k" * 36,) * 4, "sha256:" + "0" * 64
    entry = AuditEntry("G" * 64, "g" * 64, True, *ids, "p" * 71, keys, blob_hash)
    request = AuditedRequest(peer, "i" * 36, 0.0, entry, "Rejected.PendingDeletion", blob_hash)
    AuditLog(Audit(str(record))).record([request])
    assert record.stat().st_size < select.PIPE_BUF
    assert requests(record)[0]["sha256"] == "sha256:" + "0" * 64


def test_agent_records_its_start_and_its_keys_first(keyring: Path, socket_path: Path, record: Path) -> None:
    """The chain continues in a file of an earlier agent; a reload records names only if they changed."""
    more = f'[audit]\npath = "{record}"\n'
    change(keyring, "create-key", "--alias", "alias/b")
    for _ in range(2):
        with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
            status = call_ok(connection, "GetAgentStatus", {})
            ids = {name: call_ok(connection, "DescribeKey", {"KeyId": name}) for name in ("alias/a", "alias/b")}
            assert agent.stop() == 0
    found = entries(record)
    assert [entry["event"] for entry in found] == ["audit.start", "audit.keys", *["audit"] * 3] * 2
    assert [found[place]["chain"] for place in (0, 5)] == ["new", "continued"]
    assert found[5]["previous"] == hashlib.sha256(record.read_bytes().splitlines()[4]).hexdigest()
    assert (found[5]["version"], found[5]["started_at"]) == (__version__, status["StartedAt"])
    assert found[5]["pid"] == agent.process.pid
    key_ids = {name: description["KeyMetadata"]["KeyId"] for name, description in ids.items()}
    assert found[6]["keys"] == {key_ids["alias/a"]: ["alias/a"], key_ids["alias/b"]: ["alias/b"]}
    assert chain.verify([record]) == (10, hashlib.sha256(record.read_bytes().splitlines()[-1]).hexdigest(), True)


def test_reload_records_keys_whose_names_changed(keyring: Path, socket_path: Path, record: Path) -> None:
    """A rotation changes no name, so it records none."""
    more = f'[audit]\npath = "{record}"\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
        agent.signal(signal.SIGHUP)
        agent.wait_for("reload.done")
        change(keyring, "rotate", "alias/a")
        agent.wait_for("reload.done", 2)
        change(keyring, "create-key", "--alias", "alias/new")
        agent.wait_for("reload.done", 3)
        call_ok(connection, "DescribeKey", {"KeyId": "alias/new"})
    found = entries(record)
    assert [entry["event"] for entry in found] == ["audit.start", "audit.keys", "audit.keys", "audit"]
    assert found[2]["keys"][found[3]["key_id"]] == ["alias/new"]
    assert len(found[2]["keys"]) == 2


@pytest.mark.parametrize(("keys", "aliases"), [(0, 0), (1, 0), (1, 1_000), (3_000, 1), (200, 3)])
def test_names_of_a_large_keyring_are_split_over_entries(keys: int, aliases: int) -> None:
    """Each entry has the total, and all entries together have every name once."""
    named = [
        (f"{key:036}", tuple(f"alias/{key}/{number}/{'x' * 230}"[:255] for number in range(aliases)))
        for key in range(keys)
    ]
    lines = agent_entries.key_lists("2026-11-30T12:00:00.000+00:00", "2026-11-30T12:00:00Z", named)
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        whole = f'{line}, "previous": "{"0" * 64}"}}\n'
        assert len(whole) < select.PIPE_BUF
        fields = json.loads(whole)
        assert (fields["part"], fields["parts"]) == (number, len(lines))
        for key_id, its in agent_entries.names_in(fields).items():
            found.setdefault(key_id, []).extend(its)
    assert found == {key_id: [*its] for key_id, its in named}


def test_delayed_start_entry_precedes_the_first_request(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a start on a full disk, the start has one entry before those of all requests."""
    real, full = os.write, True
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:7] if full else data))
    audit = AuditLog(Audit(str(record)))
    audit.begin("2026-11-30T12:00:00Z")
    for _ in range(20):
        audit._announce(['{"event": "audit.keys", "level": "info", "keys": {}'])
    assert audit.record([AuditedRequest(PEER, "id", 0.0, AuditEntry(""), "OK")]).lines == 0
    assert record.read_bytes() == b""
    full = False
    assert audit.record([AuditedRequest(PEER, "id", 0.0, AuditEntry(""), "OK")]) == (1, None)
    events = [entry["event"] for entry in entries(record)]
    assert (events[0], events[-1]) == ("audit.start", "audit")
    assert events.count("audit.keys") < 10
    assert chain.verify([record]).beginning


def test_log_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    """The mode of a new audit log is 0600 under any umask."""
    before = os.umask(0)
    try:
        new_audit_log(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600
