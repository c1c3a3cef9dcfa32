"""Processes that exec another program in the middle of their requests, and programs in the audit log."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.agent import PATIENCE, RawConnection
from support.audit_log import requests
from support.keyring import serving
from support.keys import recipient
from test_identity import this_program

from keyferry.protocol import wire

FLOOD = """
import os, socket, sys, threading
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
requests = bytes.fromhex(sys.argv[2]) * 4_000
threading.Thread(target=connection.sendall, args=[requests], daemon=True).start()
print("sends", flush=True)
sys.stdin.read(1)
os.dup2(connection.fileno(), 0)
os.execv("/bin/cat", ["cat"])
"""


@pytest.mark.parametrize("algorithm", ["RSAES_OAEP_SHA_256", "SM2PKE"])
def test_exec_of_another_program_gets_no_new_decision(
    keyring: Path, socket_path: Path, tmp_path: Path, algorithm: str
) -> None:
    """The agent checks the program again for buffered requests, however slowly the client reads."""
    audit = tmp_path / "audit.jsonl"
    more = f'[audit]\npath = "{audit}"\n[limits]\nrequest_timeout = 60\n'
    to = f'uid={os.getuid()}, exe="{this_program()[0]}"'
    params = {"KeyId": "alias/a", "EncryptionContext": {"k": "v" * 300}, **recipient(algorithm).params}
    request = wire.encode_request(1, "GenerateAndExportDataKey", params)
    with serving(keyring, socket_path, to=to, more=more) as agent:
        arguments = [sys.executable, "-c", FLOOD, str(socket_path), request.hex()]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdin is not None
            assert other.stdout.readline() == b"sends\n"
            before = -1
            while before != (now := recorded(audit)) or not now:  # until the agent waits for a reader
                before = now
                for _ in range(20):  # inspections of one user are sequential, so each follows the earlier ones
                    with RawConnection(socket_path) as looking:
                        assert looking.call("GetAgentStatus", {}).error is None
            other.stdin.write(b"x")
            other.stdin.flush()
            received = other.stdout.read()
            assert other.wait(PATIENCE) in (0, 1)  # 1: the agent has closed before it has read all
        agent.wait_for("connection.program_changed")
    entries = requests(audit)
    granted = [entry for entry in entries if entry["operation"] == "GenerateAndExportDataKey"]
    assert len(granted) == before
    assert 0 < received.count(b"CiphertextBlob") <= before
    assert {(entry["exe"], entry["grant"]) for entry in granted} == {(this_program()[0], "me")}


def recorded(audit: Path) -> int:
    """How many exports are in the audit log."""
    return audit.read_bytes().count(b'"operation": "GenerateAndExportDataKey"') if audit.exists() else 0


def test_audit_entry_names_the_program_of_the_grant(keyring: Path, socket_path: Path, tmp_path: Path) -> None:
    """A grant that does not depend on a program leaves the field out, because no program was inspected."""
    audit, (path, digest) = tmp_path / "audit.jsonl", this_program()
    more = f'[audit]\npath = "{audit}"\n'
    by_user = f'[[grant]]\nname="user"\nto={{uid={os.getuid()}}}\nactions=["kms:ListKeys"]\nkeys=["*"]\n'
    to = f'uid={os.getuid()}, sha256="sha256:{digest}"'
    with serving(keyring, socket_path, to=to, more=more + by_user), RawConnection(socket_path) as connection:
        for method, params in (("DescribeKey", {"KeyId": "alias/a"}), ("ListKeys", {}), ("GetAgentStatus", {})):
            assert connection.call(method, params).error is None
    described, listed, status = requests(audit)
    assert (described["exe"], described["sha256"]) == (path, f"sha256:{digest}")
    assert "exe" not in listed
    assert "exe" not in status
