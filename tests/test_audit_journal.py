"""The chains of streams: a journal, a pipe, standard error. Every start of an agent begins one; all of them are verified."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.agent import RawConnection
from support.audit_log import Log
from support.calls import call_ok
from support.keyring import serving

from keyferry_agent.audit import AuditLog
from keyferry_agent.audit.entry import AuditedRequest, AuditEntry
from keyferry_agent.config.settings import Audit
from keyferry_agent.peer import Peer

PEER = Peer(uid=1, gids=frozenset({1}), pid=1, listener="default")
SYSTEMD = [
    b"Starting keyferry-agent.service - the key agent of this host...\n",
    b"keyferry-agent.service: Deactivated successfully.\n",
    b'{"event": "agent.serving", "level": "info", "timestamp": "2026-11-30T12:00:00Z"}\n',
    b"-- Boot 0123456789abcdef --\n",
    b"\xff\xfe not UTF-8 \x00\n",
    b"\n",
]


@pytest.fixture
def log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Log:
    """The commands on files."""
    return Log(tmp_path, capsys)


def written(folder: Path, starts: int = 3, each: int = 4) -> list[list[bytes]]:
    """The lines of some agents that wrote to a stream, one after the other."""
    found = []
    for start in range(starts):
        code = (
            "import sys; from keyferry_agent.audit import AuditLog;"
            "from keyferry_agent.audit.entry import AuditedRequest, AuditEntry;"
            "from keyferry_agent.peer import Peer; from keyferry_agent.config.settings import Audit;"
            "audit = AuditLog(Audit()); audit.begin('2026-11-30T12:00:00Z');"
            "peer = Peer(uid=1, gids=frozenset({1}), pid=1, listener='default');"
            "entry = AuditEntry('Decrypt', key_id='k');"
            f"[audit.record([AuditedRequest(peer, f'id{start}-{{n}}', 0.0, entry, 'OK')]) for n in range({each})]"
        )
        ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=True, cwd=folder)
        found.append(ended.stderr.splitlines(keepends=True))
    assert all(len(lines) == each + 1 for lines in found)
    return found


def journal(folder: Path, chains: list[list[bytes]]) -> Path:
    """A file as `journalctl -o cat` prints a unit's lines."""
    path = folder / "journal"
    lines = []
    for chain in chains:
        lines += SYSTEMD[:1]
        for number, line in enumerate(chain):
            lines += [line, SYSTEMD[number % len(SYSTEMD)]]
    path.write_bytes(b"".join(lines))
    return path


def test_a_journal_of_several_starts_is_whole(log: Log) -> None:
    """Each chain is reported with its count; systemd's lines and the agent's log are skipped."""
    path = journal(log.folder, written(log.folder))
    assert log.run("verify", files=[path]) == 0, log.err
    lines = log.out.splitlines()
    assert [line.split(", from the start of agent")[0] for line in lines[:3]] == [
        f"chain {number}: whole: 5 lines" for number in (1, 2, 3)
    ]
    assert lines[3].startswith("whole: 15 lines in 3 chains, from the beginning; the last has the SHA-256 ")
    assert "lines that are not audit entries" in log.err
    assert log.run("who", key="k", files=[path]) == 0
    assert "Decrypt 12 times" in log.out


def test_a_journal_in_several_files_is_whole(log: Log) -> None:
    """Cut anywhere, named in any order; a copy of a part counts once."""
    first, second, third = written(log.folder)
    parts = [first[:2], [*first[2:], *second[:3]], [*second[3:], *SYSTEMD, *third]]
    paths = [log.folder / f"{number}.journal" for number in (2, 1, 3)]
    for path, lines in zip(paths, parts, strict=True):
        path.write_bytes(b"".join(lines))
    (log.folder / "copy").write_bytes(b"".join(third))
    for files in (paths, paths[::-1], [log.folder / "copy", *paths]):
        assert log.run("verify", files=files) == 0, log.err
        assert "whole: 15 lines in 3 chains" in log.out


DAMAGES: dict[str, tuple[Callable[[list[list[bytes]]], object], str]] = {
    "changed": (lambda c: c[1].__setitem__(2, c[1][2].replace(b"Decrypt", b"Encrypt")), "was changed or removed"),
    "taken out": (lambda c: c[1].pop(2), "was changed or removed"),
    "moved": (lambda c: c[1].insert(2, c[1].pop(3)), "a line was moved"),
    "between chains": (lambda c: c[0].append(c[2].pop(2)), "does not follow"),
    "start taken out": (lambda c: c[1].pop(0), "does not follow"),
    "first start taken out": (lambda c: c[0].pop(0), "the beginning of the audit log is missing"),
    "start changed": (lambda c: c[2].__setitem__(0, c[2][0].replace(b'"pid": ', b'"pid": 9')), "does not follow"),
    "damaged": (lambda c: c[0].__setitem__(2, c[0][2][:60] + c[0][2][90:]), "does not follow"),
    "damaged at the end": (lambda c: c[2].__setitem__(4, b"x" + c[2][4]), "not a line of an audit log"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tampering_with_a_journal_is_found(log: Log, damage: str) -> None:
    """A change in any chain and a missing start are found, and the whole chains are still named."""
    chains = written(log.folder)
    change, why = DAMAGES[damage]
    change(chains)
    assert log.run("verify", files=[journal(log.folder, chains)]) == 1
    assert why in log.err
    assert "INCOMPLETE" in log.err
    assert "NOT WHOLE" in log.out or damage == "damaged at the end"
    assert ": whole: 5 lines" in log.out
    assert not [line for line in log.out.splitlines() if line.startswith("whole")]
    assert log.run("who", key="k", files=[journal(log.folder, chains)]) == 1


def rechained(lines: list[bytes]) -> list[bytes]:
    """Return the lines with new hashes, as an attacker with write access could compute them."""
    from keyferry_agent.chained_log.chain import BEGINNING, link  # noqa: PLC0415

    previous, found = BEGINNING, []
    for line in lines:
        text = json.dumps({**json.loads(line), "previous": previous}).encode()
        previous = link(text)
        found.append(text + b"\n")
    return found


def test_a_chain_without_its_start_is_not_whole(log: Log) -> None:
    """Also where its hashes were computed anew: an agent of this version writes its start first."""
    (chain,) = written(log.folder, 1)
    path = log.folder / "journal"
    path.write_bytes(b"".join(rechained(chain[1:])))
    assert log.run("verify", files=[path]) == 1
    assert "the entry of the agent's start is missing" in log.err
    old = [json.dumps({k: v for k, v in json.loads(line).items() if k != "level"}).encode() for line in chain[1:]]
    path.write_bytes(b"".join(rechained(old)))
    assert log.run("verify", files=[path]) == 0, "an audit log of an older agent"


def test_a_new_chain_in_a_file_is_not_excused(log: Log, tmp_path: Path) -> None:
    """An agent that writes to a file continues its chain: the entries between were removed, or a file is missing."""
    log.current.write_bytes(b"")
    for name in ("audit.jsonl.1", "audit.jsonl"):
        audit = AuditLog(Audit(str(tmp_path / name)))
        audit.begin("2026-11-30T12:00:00Z")
        audit.record([AuditedRequest(PEER, "id", 0.0, AuditEntry("Decrypt"), "OK")])
    assert log.run("verify") == 1
    assert "begins a new chain" in log.err
    (stream,) = written(log.folder, 1)
    log.current.write_bytes((tmp_path / "audit.jsonl.1").read_bytes() + b"".join(stream))
    (tmp_path / "audit.jsonl.1").unlink()
    assert log.run("verify") == 1, "a stream's chain in a file that the agent writes to"


def test_restarts_on_standard_error_are_verified(keyring: Path, socket_path: Path, log: Log) -> None:
    """Two real agents, whose audit entries and logs go to one stream."""
    output = []
    for _ in range(2):
        with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
            for _ in range(3):
                made: dict[str, Any] = call_ok(connection, "GenerateDataKey", {"KeyId": "alias/a"})
            assert agent.stop() == 0
        output += ["Started keyferry-agent.service.\n", *agent.output]
    path = log.folder / "journal"
    path.write_text("".join(output))
    assert log.run("verify", files=[path]) == 0, log.err
    assert "whole: 10 lines in 2 chains, from the beginning" in log.out
    assert log.run("who", key="alias/a", files=[path]) == 0
    assert "GenerateDataKey 6 times" in log.out
    assert made["KeyId"] in log.out
    with path.open("rb") as file:
        arguments = [sys.executable, "-m", "keyferry_agent", "audit", "verify", "/dev/stdin"]
        piped = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
        ended = subprocess.run(arguments, stdin=piped.stdout, capture_output=True, text=True, check=False)
        piped.communicate()
    assert ended.returncode == 0, ended.stderr
    assert "in 2 chains" in ended.stdout
