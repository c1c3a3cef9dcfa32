"""The unseal secret in an operator's hands, on a real systemd: sealed, unsealed, restarted, stopped."""

from collections.abc import Iterator

import pytest
from support.installed import AGENT, call, install, journal, status, typed
from support.nspawn import Machine
from support.skip_unless import program, root

pytestmark = [root(), program("systemd-nspawn", "systemd-container")]

DESCRIBE = "keyferry call DescribeKey --KeyId alias/orders 2>&1 || true"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine with the agent installed."""
    with Machine() as made:
        install(made)
        yield made


def told(machine: Machine) -> str:
    """Return the line of `systemctl status`."""
    return machine.show(AGENT, "StatusText")


def test_an_operator_unseals_the_agent_by_the_page(machine: Machine) -> None:
    """A restart needs no secret, a stop seals the agent, and systemd shows each state."""
    secret = (machine.root / "etc/keyferry/host.key").read_text()
    typed(machine, "A secret that an operator gives")
    assert not (machine.root / "etc/keyferry/host.key").exists()
    assert call(machine, "call", "DescribeKey", "--KeyId", "alias/orders")["KeyMetadata"]
    assert machine.run("stat", "-c", "%U %a", "/run/keyferry-agent/unseal.sock") == "keyferry 600"
    for end in (["restart", AGENT], ["kill", "-s", "KILL", AGENT]):
        machine.run("systemctl", *end)
        shown = status(machine)
        assert (shown["State"], shown["KeyringSource"]) == ("Serving", "Kept")
        assert call(machine, "call", "DescribeKey", "--KeyId", "alias/orders")["KeyMetadata"]
    machine.run("systemctl", "stop", AGENT)
    machine.run("systemctl", "start", AGENT)
    assert machine.show(AGENT, "ActiveState") == "active"
    assert told(machine).startswith("Sealed: no keyring is open; calls are refused until an operator")
    assert status(machine)["State"] == "Sealed"
    machine.run("keyferry", "status", "--live", user="orders")
    assert "agent is sealed" in machine.run("runuser", "-u", "orders", "--", "sh", "-c", DESCRIBE)
    refused = machine.run("runuser", "-u", "orders", "--", "sh", "-c", "echo x | keyferry-agent unseal 2>&1 || true")
    assert "Permission denied" in refused
    assert "unsealed: 1 key" in machine.run("keyferry-agent", "unseal", given=secret)
    assert told(machine).startswith("Serving: 1 key in memfd_secret memory")
    assert call(machine, "call", "DescribeKey", "--KeyId", "alias/orders")["KeyMetadata"]
    events = [line["event"] for line in journal(machine)]
    assert "unseal.done" in events
    assert "reload.failed" not in events
