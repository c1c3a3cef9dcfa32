"""The record of requests: a chain that shows what was done to it, over rotated files, and when it cannot be written."""

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.agent import PATIENCE, RawConnection, RunningAgent
from support.audit_log import AT_START, requests
from support.calls import ok, refused
from support.keyring import configuration, serving
from support.keys import recipient

from keyferry_agent.audit import AuditLog
from keyferry_agent.audit.entry import AuditEntry
from keyferry_agent.chained_log import chain
from keyferry_agent.cli.main import main
from keyferry_agent.config.settings import Audit
from keyferry_agent.peer import Peer

RSA = recipient("RSAES_OAEP_SHA_256")
PEER = Peer(uid=1, gids=frozenset({1}), pid=1, listener="default")


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Where the record of a test goes."""
    return tmp_path / "audit.jsonl"


def written(path: Path, count: int = 5) -> list[bytes]:
    """A record of some requests; its lines."""
    audit = AuditLog(Audit(str(path)))
    audit.begin("2026-11-30T12:00:00Z")
    for number in range(count - 1):
        audit.record([(PEER, AuditEntry(f"id{number}", 0.0, "Decrypt", key_id="k", context_keys=("tenant",)), "OK")])
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture
def recording(keyring: Path, socket_path: Path, record: Path) -> Iterator[tuple[RunningAgent, RawConnection]]:
    """An agent that records into that file."""
    more = f'[audit]\npath = "{record}"\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
        yield agent, connection


def test_every_request_has_its_line_and_the_chain_is_whole(
    recording: tuple[RunningAgent, RawConnection], record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the refused ones, with the key that was asked for."""
    _, connection = recording
    made = ok(connection, "GenerateDataKey", {"KeyId": "alias/a", "EncryptionContext": {"tenant": "secret"}})
    refused(connection, "Decrypt", {"CiphertextBlob": made["CiphertextBlob"]}, "InvalidParameter")
    refused(connection, "Explode", {}, "InvalidAction.NotFound")
    lines = requests(record)
    assert [line["outcome"] for line in lines] == ["OK", "InvalidParameter", "InvalidAction.NotFound"]
    assert [line["key_id"] for line in lines] == [made["KeyId"], made["KeyId"], ""]
    assert lines[0]["context_keys"] == ["tenant"]
    assert "secret" not in record.read_text()
    assert main(["audit", "verify", str(record)]) == 0
    assert capsys.readouterr().out.startswith("whole: 5 lines, from the beginning; the last has the SHA-256 ")


@pytest.mark.parametrize("letter", ["a", "密", "\N{GRINNING FACE}", "\x01"])
def test_a_line_is_one_that_a_pipe_takes_whole(record: Path, letter: str) -> None:
    """Whatever the keys of a context are: what is too long is left out."""
    peer = Peer(4294967294, frozenset(range(2**32 - 100, 2**32)), 2**22, "default", unit="u" * 255 + ".service")
    keys = tuple(f"{letter * 39}{number}" for number in range(40))
    audited = AuditEntry(
        "i" * 36, 0.0, "GenerateDataKeyWithoutPlaintext", "g" * 64, recipient="p" * 71, context_keys=keys
    )
    for name in ("key_id", "key_version_id", "destination_key_id", "destination_key_version_id"):
        setattr(audited, name, "k" * 36)
    AuditLog(Audit(str(record))).record([(peer, audited, "Rejected.PendingDeletion")])
    assert record.stat().st_size <= select.PIPE_BUF
    listed = json.loads(record.read_bytes())["context_keys"]
    assert listed == sorted(key[:40] for key in keys)[: len(listed)]
    assert len(listed) >= 2


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda lines: [lines[0].replace(b"12:00", b"13:00"), *lines[1:]], "line 2: does not follow"),
        (lambda lines: [*lines[:1], lines[1].replace(b"Decrypt", b"Encrypt"), *lines[2:]], "line 3: does not follow"),
        (lambda lines: [*lines[:2], *lines[3:]], "line 3: does not follow"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "line 2: does not follow"),
        (lambda lines: [*lines[:4], lines[4][:-1]], "line 5: cut off"),
        (lambda lines: [*lines[:2], lines[0], *lines[2:]], "line 3: begins a new chain"),
        (lambda lines: [*lines[:2], b"nonsense" + lines[2], *lines[2:]], "line 3: not a line"),
        (lambda lines: [*lines[:4], lines[4].replace(b"{", b"[")], "line 5: not a line"),
        (lambda _: [b"nonsense\n"], "line 1: not a line"),
        (lambda _: [b"[" * 100_000 + b"\n"], "line 1: not a line"),
        (lambda _: [], "no entry"),
    ],
    ids=[
        "start changed",
        "changed",
        "taken out",
        "moved",
        "cut off",
        "begun anew",
        "damaged",
        "damaged at the end",
        "nonsense",
        "nested",
        "empty",
    ],
)
def test_what_was_done_to_a_record_is_found(
    record: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[list[bytes]], list[bytes]], why: str
) -> None:
    """By the line after it."""
    lines = written(record)
    assert main(["audit", "verify", str(record)]) == 0
    record.write_bytes(b"".join(damage(lines)))
    assert main(["audit", "verify", str(record)]) == 1
    assert why in capsys.readouterr().err


def test_each_changed_byte_is_found(record: Path) -> None:
    """By the chain, or in the last line by its hash, which somebody keeps elsewhere."""
    whole = b"".join(written(record, 3))
    before = chain.verify([record])
    for at in range(len(whole)):
        record.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with suppress(chain.ChainError):
            assert chain.verify([record]) != before, at


def test_a_record_that_is_moved_away_goes_on_in_a_new_file(
    recording: tuple[RunningAgent, RawConnection], record: Path, tmp_path: Path
) -> None:
    """As logrotate does it; the chain goes over both, in their order only."""
    agent, connection = recording
    ok(connection, "DescribeKey", {"KeyId": "alias/a"})
    record.rename(tmp_path / "audit.1")
    agent.wait_for("audit.reopened")
    ok(connection, "DescribeKey", {"KeyId": "alias/a"})
    assert record.stat().st_mode & 0o777 == 0o600
    assert chain.verify([tmp_path / "audit.1", record]).lines == AT_START + 2
    assert chain.verify([record]).lines == 1
    with pytest.raises(chain.ChainError, match="begins a new chain"):
        chain.verify([record, tmp_path / "audit.1"])


def test_a_record_that_is_deleted_is_begun_again(recording: tuple[RunningAgent, RawConnection], record: Path) -> None:
    """What follows is recorded; where the folder is gone too, nothing is answered that cannot be recorded."""
    agent, connection = recording
    ok(connection, "DescribeKey", {"KeyId": "alias/a"})
    record.unlink()
    agent.wait_for("audit.reopened")
    ok(connection, "DescribeKey", {"KeyId": "alias/a"})
    assert len(record.read_text().splitlines()) == 1


def test_what_a_full_disk_cut_off_does_not_run_into_the_next_line(
    record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it cannot be taken back at once: nothing is recorded until it is."""
    audit = AuditLog(Audit(str(record)))
    request = [(PEER, AuditEntry("id", 0.0, "Decrypt"), "OK")]
    assert audit.record(request).lines == 1
    with monkeypatch.context() as patch:
        real = os.write
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:10]))
        patch.setattr(os, "ftruncate", lambda _descriptor, _length: os.fstat(-1))
        assert audit.record(request).lines == 0
        patch.setattr(os, "write", real)
        assert audit.record(request).lines == 0
    assert audit.record(request).lines == 1
    assert chain.verify([record]).lines == 2


def test_a_record_that_was_moved_away_is_opened_anew_although_closing_it_fails(
    record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file system may report what it could not write: the descriptor is gone all the same."""
    audit = AuditLog(Audit(str(record)))
    request = [(PEER, AuditEntry("id", 0.0, "Decrypt"), "OK")]
    record.rename(record.with_suffix(".1"))
    with monkeypatch.context() as patch:
        real = os.close

        def fails(descriptor: int) -> None:
            real(descriptor)
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(os, "close", fails)
        audit.reopen()
    assert audit.record(request).lines == 1
    assert chain.verify([record]).lines == 1


@pytest.mark.parametrize("tail", [b"", b'{"time": "cut o'])
def test_a_restart_goes_on_with_the_chain(record: Path, tail: bytes) -> None:
    """A line that a crash has cut off is taken back: no answer left after it."""
    written(record)
    with open(record, "ab") as file:
        file.write(tail)
    written(record)
    assert chain.verify([record]).lines == 10


@pytest.mark.parametrize(("on_failure", "code"), [("refuse", "ServiceUnavailableTemporary"), ("serve", "")])
def test_what_cannot_be_recorded_is_refused_unless_the_operator_says_otherwise(
    keyring: Path, socket_path: Path, on_failure: str, code: str
) -> None:
    """A full disk; the log says so in either case."""
    more = f'[audit]\npath = "/dev/full"\non_failure = "{on_failure}"\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
        if code:
            refused(connection, "DescribeKey", {"KeyId": "alias/a"}, code)
        else:
            ok(connection, "DescribeKey", {"KeyId": "alias/a"})
        agent.wait_for("audit.failed")


def test_a_pipe_that_nobody_reads_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    """After a moment, once, the record could not be written; and when it is read again, lines are whole."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    audit = AuditLog(Audit(str(fifo)))
    lines = 0
    three = [(PEER, AuditEntry("id", 0.0), "OK")] * 3
    while (appended := audit.record(three)).error is None:
        lines += appended.lines
    assert appended.error.errno == errno.EAGAIN
    lines += appended.lines
    with open(fifo, "rb", buffering=0) as reader:
        taken = reader.read(1 << 20)
        assert audit.record(three) == (3, None)
        taken += reader.read(1 << 20)
    (tmp_path / "taken").write_bytes(taken)
    assert chain.verify([tmp_path / "taken"]).lines == lines + 3


def test_a_file_that_does_not_answer_is_waited_for_once_and_then_by_nobody(record: Path) -> None:
    """What is under way is done some time; when it is, the chain goes on behind it."""
    audit = AuditLog(Audit(str(record)))
    one = [(PEER, AuditEntry("id", 0.0), "OK")]
    hanging, begun = threading.Event(), threading.Event()

    def hangs() -> None:
        begun.set()
        hanging.wait()
        audit._file.append(['{"event": "audit", "request_id": "late"'])

    with pytest.raises(OSError, match="does not answer"):
        audit._writer.call(hangs)
    assert begun.is_set()
    with pytest.raises(OSError, match="does not answer"):
        audit.reopen()
    assert audit.record(one).lines == 0
    hanging.set()
    deadline = time.monotonic() + PATIENCE
    while audit.record(one) != (1, None):
        assert time.monotonic() < deadline
    assert [json.loads(line)["request_id"] for line in record.read_text().splitlines()] == ["late", "id"]
    assert chain.verify([record]).lines == 2


def test_a_signal_does_not_end_the_records_thread(record: Path) -> None:
    """The kernel gives a signal of the process to any thread."""
    before = signal.signal(signal.SIGHUP, lambda _number, _frame: None)
    try:
        audit = AuditLog(Audit(str(record)))
        for number in range(20):
            signal.pthread_kill(audit._writer.thread.ident or 0, signal.SIGHUP)
            assert audit.record([(PEER, AuditEntry(f"{number}", 0.0), "OK")]) == (1, None)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert chain.verify([record]).lines == 20


def test_a_reader_of_standard_error_that_stops_stops_nobody_else(keyring: Path, socket_path: Path) -> None:
    """Record and log both go there: requests are refused while nothing can be recorded, and answered when it can be again."""
    reading, writing = os.pipe()
    config = keyring.parent / "agent.toml"
    config.write_text(configuration(keyring))
    arguments = [sys.executable, "-m", "keyferry_agent", "run", "--config", str(config), "--socket", str(socket_path)]
    with subprocess.Popen(arguments, stderr=writing) as process, open(reading, "rb", buffering=0) as reader:
        os.close(writing)
        reads_again = threading.Thread(target=reader.readall)
        try:
            said = b""
            while b"agent.serving" not in said:
                said += reader.read(65_536)
            with RawConnection(socket_path) as connection:
                outcomes = [connection.call("DescribeKey", {"KeyId": "alias/a"}).error for _ in range(1_000)]
                codes = {error["Code"] if error else "OK" for error in outcomes}
                assert codes == {"OK", "ServiceUnavailableTemporary"}
                assert outcomes[-1] is not None
                reads_again.start()
                deadline = time.monotonic() + PATIENCE
                while connection.call("DescribeKey", {"KeyId": "alias/a"}).error:
                    assert time.monotonic() < deadline
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0
            reads_again.join(PATIENCE)


def test_who_was_given_data_keys_is_answered_from_the_record(
    recording: tuple[RunningAgent, RawConnection], record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By key, version and time: how often, for whom, and to which recipients."""
    _, connection = recording
    made = ok(connection, "GenerateAndExportDataKey", {"KeyId": "alias/a", **RSA.params})
    for _ in range(3):
        ok(connection, "ExportDataKey", {"CiphertextBlob": made["CiphertextBlob"], **RSA.params})
    ok(connection, "Decrypt", {"CiphertextBlob": made["CiphertextBlob"]})
    ok(connection, "DescribeKey", {"KeyId": "alias/a"})
    refused(connection, "Decrypt", {"CiphertextBlob": made["CiphertextBlob"][:-4] + "AAAA"}, "InvalidParameter")

    def who(*more: str) -> Any:
        capsys.readouterr()
        assert main(["audit", "who", str(record), "--key", made["KeyId"], "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    found = who()
    assert {entry["operation"]: entry["count"] for entry in found} == {
        "GenerateAndExportDataKey": 1,
        "ExportDataKey": 3,
        "Decrypt": 1,
    }
    assert {entry["recipient"] for entry in found if entry["operation"] == "ExportDataKey"} != {""}
    assert who("--version", made["KeyVersionId"]) == found
    assert who("--version", "other") == who("--since", "9999-01-01") == []
    assert main(["audit", "who", str(record), "--key", made["KeyId"]]) == 0
    assert f"uid {os.getuid()}" in capsys.readouterr().out
    assert main(["audit", "who", str(record.with_name("none")), "--key", "x"]) == 1


def test_the_configuration_leads_to_the_record_its_rotated_files_and_a_keys_alias(
    recording: tuple[RunningAgent, RawConnection], record: Path, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oldest first, as logrotate numbers them; without it, files have to be named, and keys by their ID or ARN."""
    agent, connection = recording
    for count, name in enumerate(("audit.jsonl.10", "audit.jsonl.9", "audit.jsonl.bak"), 1):
        made = ok(connection, "GenerateDataKeyWithoutPlaintext", {"KeyId": "alias/a"})
        ok(connection, "Decrypt", {"CiphertextBlob": made["CiphertextBlob"]})
        if name.endswith("bak"):
            shutil.copy(record, record.with_name(name))
        else:
            record.rename(record.with_name(name))
            agent.wait_for("audit.reopened", count)
    config = ["--config", str(keyring.parent / "agent.toml")]
    capsys.readouterr()
    assert main(["audit", "verify", *config]) == 0
    assert "whole: 8 lines, from the beginning" in capsys.readouterr().out
    for key in ("alias/a", made["KeyId"], f"acs:kms:local:0:key/{made['KeyId']}"):
        assert main(["audit", "who", "--key", key, *config]) == 0
        assert "Decrypt 3 times" in capsys.readouterr().out
    assert main(["audit", "who", "--key", "alias/none", *config]) == 1
    assert "no key or alias" in capsys.readouterr().err
    assert main(["audit", "who", "--key", "alias/a", str(record)]) == 1
    assert "--config is missing, which names the keyring" in capsys.readouterr().err
    assert main(["audit", "verify"]) == 1
    assert "--config" in capsys.readouterr().err
