"""Decisions from before a reload are not used after it: neither remembered, nor queued, nor half sent."""

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.agent import RawConnection, RunningAgent
from support.audit_log import requests
from support.calls import result
from support.keyring import change, configuration, serving
from support.keys import recipient

from keyferry.protocol import wire

EXPORT = {"KeyId": "alias/a", **recipient("SM2PKE").params}
FAST = {"KeyId": "alias/a", "EncryptionContext": {"k": "v" * 300}, **recipient("RSAES_OAEP_SHA_256").params}
NOTHING = "kms:DescribeKey"


def stalled(
    connection: RawConnection, method: str, params: dict[str, Any], count: int, audit: Path
) -> tuple[int, bytes]:
    """Send so many equal requests, and read no answer until the agent waits for that.

    Returns the number of whole requests, and the missing part of the last one.

    The agent waits when two looks at the audit log, with its own turns of the event loop between them, see the same.
    """
    connection.socket.setblocking(False)
    messages = [wire.encode_request(number, method, params) for number in range(count)]
    data = b"".join(messages)
    sent = 0
    while sent < len(data):
        try:
            sent += connection.socket.send(data[sent:])
        except BlockingIOError:
            break
    connection.socket.setblocking(True)
    before = -1
    while before != (now := len(requests(audit))) or not now:
        before = now
        with RawConnection(Path(connection.socket.getpeername())) as other:
            for _ in range(30):
                other.call("GetAgentStatus", {})
        before += 30
    ends = [*itertools.accumulate(map(len, messages))]
    whole = sum(end <= sent for end in ends)
    return whole, data[sent : ends[whole]] if whole < count else b""


def codes_until(connection: RawConnection, count: int) -> Counter[str]:
    """Return the counts of the outcomes of some requests."""
    codes: Counter[str] = Counter()
    for _ in range(count):
        answer = connection.answer()
        codes["OK" if answer.error is None else answer.error["Code"]] += 1
    return codes


@pytest.mark.parametrize(("params", "most"), [(EXPORT, 3_000), (FAST, 3_000)], ids=["EC_SM2", "RSA_2048"])
def test_removed_grant_is_refused_after_the_reload(
    keyring: Path, socket_path: Path, tmp_path: Path, params: dict[str, Any], most: int
) -> None:
    """Requests wait behind a client that does not read: earlier answers stay, and all later requests are refused."""
    audit = tmp_path / "audit.jsonl"
    more = f'[audit]\npath = "{audit}"\n[limits]\nrequest_timeout = 60\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(socket_path) as connection:
        for _ in range(4):  # so that it is recalled
            assert connection.call("GenerateAndExportDataKey", params).error is None
        count, _ = stalled(connection, "GenerateAndExportDataKey", params, most, audit)
        refuse(agent, keyring, more)
        done = sum(entry["outcome"] == "OK" and entry["operation"].startswith("Generate") for entry in requests(audit))
        codes = codes_until(connection, count)
        granted = [entry for entry in requests(audit) if entry["outcome"] == "OK" and entry["grant"]]
        assert len([entry for entry in granted if entry["operation"].startswith("Generate")]) == done
        assert codes["OK"] == done - 4
        assert codes["Forbidden.NoPermission"] == count - codes["OK"] > 0


def refuse(agent: RunningAgent, keyring: Path, more: str) -> None:
    """Take all grants but one of nothing away, and wait for the reload."""
    beside = keyring.parent / "beside"
    beside.write_text(configuration(keyring, actions=NOTHING, more=more))
    os.replace(beside, keyring.parent / "agent.toml")
    agent.wait_for("reload.done")


@pytest.mark.parametrize("params", [EXPORT, FAST], ids=["EC_SM2", "RSA_2048"])
def test_disabled_or_rotated_key_is_not_used_after_the_reload(
    keyring: Path, socket_path: Path, tmp_path: Path, params: dict[str, Any]
) -> None:
    """The old version of a rotated key and a disabled key encrypt nothing."""
    audit = tmp_path / "audit.jsonl"
    more = f'[audit]\npath = "{audit}"\n[limits]\nrequest_timeout = 60\n'
    with serving(keyring, socket_path, more=more) as agent, RawConnection(socket_path) as connection:
        old = result(connection.call("GenerateAndExportDataKey", params))
        for _ in range(4):
            connection.call("GenerateAndExportDataKey", params)
        count, missing = stalled(connection, "GenerateAndExportDataKey", params, 3_000, audit)
        change(keyring, "rotate", "alias/a")
        agent.wait_for("reload.done")
        before = sum(entry["key_version_id"] == old["KeyVersionId"] for entry in requests(audit))
        codes = codes_until(connection, count)
        assert codes == {"OK": count}
        connection.send(missing)
        assert codes_until(connection, 1) == {"OK": 1}
        assert sum(entry["key_version_id"] == old["KeyVersionId"] for entry in requests(audit)) == before
        count, _ = stalled(connection, "GenerateAndExportDataKey", params, 3_000, audit)
        change(keyring, "disable", "alias/a")
        agent.wait_for("reload.done", count=2)
        done = sum(entry["outcome"] == "OK" for entry in requests(audit) if entry["operation"].startswith("Generate"))
        codes = codes_until(connection, count)
        assert codes["Rejected.Disabled"] == count - codes["OK"] > 0
        after = sum(entry["outcome"] == "OK" for entry in requests(audit) if entry["operation"].startswith("Generate"))
        assert after == done
