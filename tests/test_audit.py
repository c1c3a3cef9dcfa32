"""The audit log: a chain that shows tampering, over rotated files, and after failed writes."""

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
from support.calls import call_ok, call_refused
from support.keyring import configuration, serving
from support.keys import recipient

from keyferry_agent.audit import AuditLog
from keyferry_agent.audit.entry import AuditedRequest, AuditEntry
from keyferry_agent.chained_log import chain
from keyferry_agent.cli.main import main
from keyferry_agent.config.settings import Audit
from keyferry_agent.peer import Peer

RSA = recipient("RSAES_OAEP_SHA_256")
PEER = Peer(uid=1, gids=frozenset({1}), pid=1, listener="default")


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Return the path of a test's audit log."""
    return tmp_path / "audit.jsonl"


def written(path: Path, count: int = 5) -> list[bytes]:
    """A record of some requests; its lines."""
    audit = AuditLog(Audit(str(path)))
    audit.begin("2026-11-30T12:00:00Z")
    entry = AuditEntry("Decrypt", key_id="k", context_keys=("tenant",))
    for number in range(count - 1):
        audit.record([AuditedRequest(PEER, f"id{number}", 0.0, entry, "OK")])
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture
def recording(keyring: Path, socket_path: Path, record: Path) -> Iterator[tuple[RunningAgent, RawConnection]]:
    """An agent that records into that file."""
    more = f'[audit]\npath = "{record}"\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
        yield agent, connection


def test_every_request_has_an_entry_in_a_whole_chain(
    recording: tuple[RunningAgent, RawConnection], record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused requests have entries too, with the requested key."""
    _, connection = recording
    made = call_ok(connection, "GenerateDataKey", {"KeyId": "alias/a", "EncryptionContext": {"tenant": "secret"}})
    call_refused(connection, "Decrypt", {"CiphertextBlob": made["CiphertextBlob"]}, "InvalidParameter")
    call_refused(connection, "Explode", {}, "InvalidAction.NotFound")
    lines = requests(record)
    assert [line["outcome"] for line in lines] == ["OK", "InvalidParameter", "InvalidAction.NotFound"]
    assert [line["key_id"] for line in lines] == [made["KeyId"], made["KeyId"], ""]
    assert lines[0]["context_keys"] == ["tenant"]
    assert "secret" not in record.read_text()
    assert main(["audit", "verify", str(record)]) == 0
    assert capsys.readouterr().out.startswith("whole: 5 lines, from the beginning; the last has the SHA-256 ")


@pytest.mark.parametrize("letter", ["a", "密", "\N{GRINNING FACE}", "\x01"])
def test_line_fits_an_atomic_pipe_write(record: Path, letter: str) -> None:
    """An entry leaves out context keys that would make it longer than PIPE_BUF."""
    peer = Peer(4294967294, frozenset(range(2**32 - 100, 2**32)), 2**22, "default", unit="u" * 255 + ".service")
    keys = tuple(f"{letter * 39}{number}" for number in range(40))
    ids = ("k" * 36,) * 4
    entry = AuditEntry("GenerateDataKeyWithoutPlaintext", "g" * 64, False, *ids, "p" * 71, keys)
    request = AuditedRequest(peer, "i" * 36, 0.0, entry, "Rejected.PendingDeletion")
    AuditLog(Audit(str(record))).record([request])
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
def test_tampering_with_an_entry_is_found(
    record: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[list[bytes]], list[bytes]], why: str
) -> None:
    """The hash in the following entry shows a change."""
    lines = written(record)
    assert main(["audit", "verify", str(record)]) == 0
    record.write_bytes(b"".join(damage(lines)))
    assert main(["audit", "verify", str(record)]) == 1
    assert why in capsys.readouterr().err


def test_every_changed_byte_is_found(record: Path) -> None:
    """The chain shows a changed byte; in the last line, a hash that is kept elsewhere shows it."""
    whole = b"".join(written(record, 3))
    before = chain.verify([record])
    for at in range(len(whole)):
        record.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with suppress(chain.ChainError):
            assert chain.verify([record]) != before, at


def test_chain_continues_in_a_new_file_after_rotation(
    recording: tuple[RunningAgent, RawConnection], record: Path, tmp_path: Path
) -> None:
    """The chain covers both files, as logrotate leaves them, in their order only."""
    agent, connection = recording
    call_ok(connection, "DescribeKey", {"KeyId": "alias/a"})
    record.rename(tmp_path / "audit.1")
    agent.wait_for("audit.reopened")
    call_ok(connection, "DescribeKey", {"KeyId": "alias/a"})
    assert record.stat().st_mode & 0o777 == 0o600
    assert chain.verify([tmp_path / "audit.1", record]).lines == AT_START + 2
    assert chain.verify([record]).lines == 1
    with pytest.raises(chain.ChainError, match="begins a new chain"):
        chain.verify([record, tmp_path / "audit.1"])


def test_deleted_audit_log_is_created_again(recording: tuple[RunningAgent, RawConnection], record: Path) -> None:
    """Later requests are recorded; if the folder is gone too, requests are refused."""
    agent, connection = recording
    call_ok(connection, "DescribeKey", {"KeyId": "alias/a"})
    record.unlink()
    agent.wait_for("audit.reopened")
    call_ok(connection, "DescribeKey", {"KeyId": "alias/a"})
    assert len(record.read_text().splitlines()) == 1


def test_line_cut_off_by_a_full_disk_is_removed(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is recorded until a partial line is truncated, also where truncating fails at first."""
    audit = AuditLog(Audit(str(record)))
    request = [AuditedRequest(PEER, "id", 0.0, AuditEntry("Decrypt"), "OK")]
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


def test_rotation_is_noticed_although_close_fails(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """close(2) may report a delayed write error; the descriptor is closed all the same."""
    audit = AuditLog(Audit(str(record)))
    request = [AuditedRequest(PEER, "id", 0.0, AuditEntry("Decrypt"), "OK")]
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
def test_restart_continues_the_chain(record: Path, tail: bytes) -> None:
    """A line that a crash cut off is truncated: its answer was not sent."""
    written(record)
    with open(record, "ab") as file:
        file.write(tail)
    written(record)
    assert chain.verify([record]).lines == 10


@pytest.mark.parametrize(("on_failure", "code"), [("refuse", "ServiceUnavailableTemporary"), ("serve", "")])
def test_unrecordable_requests_follow_the_on_failure_setting(
    keyring: Path, socket_path: Path, on_failure: str, code: str
) -> None:
    """On a full disk, requests are refused or served by the setting, and the log reports the failure in both cases."""
    more = f'[audit]\npath = "/dev/full"\non_failure = "{on_failure}"\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(agent.socket) as connection:
        if code:
            call_refused(connection, "DescribeKey", {"KeyId": "alias/a"}, code)
        else:
            call_ok(connection, "DescribeKey", {"KeyId": "alias/a"})
        agent.wait_for("audit.failed")


def test_full_pipe_blocks_the_audit_log_for_a_bounded_time(tmp_path: Path) -> None:
    """The first failed write is given up after a moment; when the pipe is read again, lines are whole."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    audit = AuditLog(Audit(str(fifo)))
    lines = 0
    three = [AuditedRequest(PEER, "id", 0.0, AuditEntry(""), "OK")] * 3
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


def test_hanging_audit_file_delays_requests_only_once(record: Path) -> None:
    """A write that hangs ends at some time, and the chain then continues behind it."""
    audit = AuditLog(Audit(str(record)))
    one = [AuditedRequest(PEER, "id", 0.0, AuditEntry(""), "OK")]
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


def test_signal_does_not_end_the_audit_thread(record: Path) -> None:
    """The kernel delivers a signal of the process to any of its threads."""
    before = signal.signal(signal.SIGHUP, lambda _number, _frame: None)
    try:
        audit = AuditLog(Audit(str(record)))
        for number in range(20):
            signal.pthread_kill(audit._writer.thread.ident or 0, signal.SIGHUP)
            assert audit.record([AuditedRequest(PEER, f"{number}", 0.0, AuditEntry(""), "OK")]) == (1, None)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert chain.verify([record]).lines == 20


def test_stopped_reader_of_stderr_blocks_no_client(keyring: Path, socket_path: Path) -> None:
    """Requests are refused while audit log and log share a blocked standard error, and answered when its reader continues."""
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


def test_data_key_accesses_are_listed_from_the_audit_log(
    recording: tuple[RunningAgent, RawConnection], record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accesses are listed by key, version and time, with their number, callers and recipients."""
    _, connection = recording
    made = call_ok(connection, "GenerateAndExportDataKey", {"KeyId": "alias/a", **RSA.params})
    for _ in range(3):
        call_ok(connection, "ExportDataKey", {"CiphertextBlob": made["CiphertextBlob"], **RSA.params})
    call_ok(connection, "Decrypt", {"CiphertextBlob": made["CiphertextBlob"]})
    call_ok(connection, "DescribeKey", {"KeyId": "alias/a"})
    call_refused(connection, "Decrypt", {"CiphertextBlob": made["CiphertextBlob"][:-4] + "AAAA"}, "InvalidParameter")

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


def test_audit_files_and_aliases_come_from_the_configuration(
    recording: tuple[RunningAgent, RawConnection], record: Path, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rotated files are read oldest first; without a configuration, files and key IDs or ARNs are named by the operator."""
    agent, connection = recording
    for count, name in enumerate(("audit.jsonl.10", "audit.jsonl.9", "audit.jsonl.bak"), 1):
        made = call_ok(connection, "GenerateDataKeyWithoutPlaintext", {"KeyId": "alias/a"})
        call_ok(connection, "Decrypt", {"CiphertextBlob": made["CiphertextBlob"]})
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
