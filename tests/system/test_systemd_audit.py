"""The audit log and the log of an agent that runs as the shipped unit: nothing is lost in a burst or by logrotate."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.installed import AGENT, CONFIGURATION, SETTINGS, SYSTEMD, configure, drop_in, install, journal, status
from support.nspawn import Machine
from support.skip_unless import program, root

pytestmark = [root(), program("systemd-nspawn", "systemd-container"), program("logrotate", "logrotate")]

CALLS = 60_000
FILE = "/var/log/keyferry/audit.jsonl"
TO_A_FILE = f'[audit]\npath = "{FILE}"\n'
BURST = """
import sys, threading
from keyferry import Client

def work(count):
    with Client(timeout=60) as kms:
        for _ in range(count):
            kms.describe_key(key_id="alias/orders")

threads = [threading.Thread(target=work, args=(int(sys.argv[1]) // 4,)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine with the agent installed."""
    with Machine() as made:
        install(made)
        made.write("/srv/burst.py", BURST)
        yield made


@pytest.fixture(autouse=True)
def afresh(machine: Machine) -> Iterator[None]:
    """Begin each test with an empty journal and audit log, and no agent."""
    machine.run("systemctl", "stop", AGENT)
    machine.run("systemctl", "start", "keyferry-agent.socket")
    machine.run("sh", "-c", "rm -f /var/log/keyferry/audit.jsonl*")
    machine.run("journalctl", "--rotate", "--vacuum-time=1us")
    yield
    machine.run("rm", "-rf", f"/etc/systemd/system/{AGENT}.d")
    machine.write(CONFIGURATION, SETTINGS)
    machine.run("systemctl", "daemon-reload")


def burst(machine: Machine, calls: int) -> None:
    """Make this many calls as fast as they are answered."""
    with machine.start(
        "runuser", "-u", "orders", "--", "/opt/keyferry/bin/python", "/srv/burst.py", str(calls)
    ) as done:
        out, _ = done.communicate(timeout=300)
    assert (done.returncode, out) == (0, "")


def described(lines: list[Any]) -> int:
    """Return how many audit entries of DescribeKey are among these lines, each with a RequestId of its own."""
    return len({line["request_id"] for line in lines if line.get("operation") == "DescribeKey"})


@pytest.mark.parametrize("settings", ["", TO_A_FILE], ids=["journal", "file"])
def test_a_burst_of_calls_loses_no_audit_entry(machine: Machine, settings: str) -> None:
    """The journal's default rate limit would drop most entries of a burst."""
    configure(machine, settings)
    status(machine)
    burst(machine, CALLS)
    if settings:
        text = (machine.root / FILE[1:]).read_text()
        assert described([json.loads(line) for line in text.splitlines()]) == CALLS
        machine.run("keyferry-agent", "audit", "verify", "--config", CONFIGURATION)
    else:
        assert described(journal(machine)) == CALLS


def test_the_shipped_configuration_audits_to_a_file(machine: Machine) -> None:
    """The agent's user owns the audit log, and no other user can read it."""
    machine.run("cp", "/srv/systemd/agent.toml", CONFIGURATION)
    status(machine)
    assert machine.run("stat", "-c", "%U %a", FILE) == "keyferry 600"


def test_logrotate_loses_no_entry_of_an_agent_that_writes(machine: Machine) -> None:
    """With compression and dates in the names; `audit verify` reads all files and finds one whole chain."""
    configure(machine, TO_A_FILE)
    status(machine)
    assert machine.run("cat", "/etc/logrotate.d/keyferry") == (SYSTEMD / "keyferry.logrotate").read_text().strip()
    rotate = "logrotate --force /etc/logrotate.conf 2>&1"
    with machine.start("runuser", "-u", "orders", "--", "/opt/keyferry/bin/python", "/srv/burst.py", "20000") as load:
        for _ in range(3):
            machine.run("sh", "-c", f"sleep 1.1; test -s {FILE} || sleep 1.1; {rotate}")
        out, _ = load.communicate(timeout=300)
    assert (load.returncode, out) == (0, "")
    names = sorted(machine.run("sh", "-c", f"ls {FILE}*").split())
    assert len(names) >= 3  # a rotation after the last entry leaves the empty file
    assert [name.endswith(".gz") for name in names] == [False, *[True] * (len(names) - 2), False]
    assert machine.run("sh", "-c", f"stat -c '%U %a' {FILE}* | sort -u") == "keyferry 600"
    text = machine.run("sh", "-c", f"cd /var/log/keyferry; zcat -f {FILE}*")
    assert described([json.loads(line) for line in text.splitlines()]) == 20_000
    said = machine.run("sh", "-c", f"keyferry-agent audit verify --config {CONFIGURATION} 2>&1")
    assert "the audit log is complete from its beginning" in said


def errors(machine: Machine) -> list[Any]:
    """Return the agent's lines in the journal with the priority of an error."""
    return journal(machine, "-p", "err")


def test_errors_are_errors_for_the_journal(machine: Machine) -> None:
    """A failed reload and a failed audit entry have the journal's priority for errors; each line is JSON without a prefix."""
    drop_in(machine, "[Service]\nTemporaryFileSystem=/srv/small:size=16k,mode=1777\n")
    configure(machine, '[audit]\npath = "/srv/small/audit.jsonl"\n')
    status(machine)
    assert errors(machine) == []
    assert {"agent.serving"} <= {line["event"] for line in journal(machine)}
    machine.write(CONFIGURATION, "nonsense = 1")
    machine.run("systemctl", "reload", AGENT)
    machine.wait_until(["sh", "-c", f"systemctl show -P StatusText {AGENT} | cut -d, -f1"], "Not reloaded")
    assert {line["event"] for line in errors(machine)} == {"reload.failed"}
    for _ in range(40):
        machine.run("keyferry", "call", "DescribeKey", "--KeyId", "alias/orders", user="orders", check=False)
    assert {line["event"] for line in errors(machine)} == {"reload.failed", "audit.failed"}


def test_why_an_agent_did_not_start_is_an_error_for_the_journal(machine: Machine) -> None:
    """Every line of the message has the journal's priority for errors."""
    machine.write(CONFIGURATION, "nonsense = 1\nrubbish = 2\n")
    machine.run("systemctl", "start", AGENT, check=False)
    said = machine.run("journalctl", "--no-pager", "-o", "cat", "-p", "err", "-u", AGENT)
    assert "nonsense: unknown" in said
    assert "rubbish: unknown" in said
    assert "<3>" not in said
