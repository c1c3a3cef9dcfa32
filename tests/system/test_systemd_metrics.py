"""Metrics of an agent that runs as the shipped unit, with all its restrictions: on a socket, and on a TCP port."""

from collections.abc import Iterator

import pytest
from support.installed import AGENT, SETTINGS, configure, install, journal, status, typed
from support.nspawn import Machine
from support.skip_unless import program, root

pytestmark = [root(), program("systemd-nspawn", "systemd-container")]

UNIX = "/run/keyferry-agent/metrics.sock"
TCP = "127.0.0.1:9464"
SCRAPE = """
import socket, sys
address = sys.argv[1]
if address.startswith("/"):
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(address)
else:
    host, port = address.split(":")
    peer = socket.create_connection((host, int(port)), 30)
peer.sendall(b"GET /metrics HTTP/1.0\\r\\n\\r\\n")
while data := peer.recv(65536):
    sys.stdout.write(data.decode())
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine with the agent installed."""
    with Machine() as made:
        install(made)
        made.write("/srv/scrape.py", SCRAPE)
        yield made


@pytest.fixture(autouse=True)
def afresh(machine: Machine) -> Iterator[None]:
    """Stop the agent before each test, and remove drop-ins after it."""
    machine.run("systemctl", "stop", AGENT)
    machine.run("systemctl", "start", "keyferry-agent.socket")
    machine.run("journalctl", "--rotate", "--vacuum-time=1us")
    yield
    machine.run("rm", "-rf", f"/etc/systemd/system/{AGENT}.d")
    machine.write("/etc/keyferry/agent.toml", SETTINGS)
    machine.run("systemctl", "daemon-reload")


def scraped(machine: Machine, address: str) -> str:
    """Return the answer to a scrape."""
    return machine.run("/usr/bin/python3", "/srv/scrape.py", address)


def test_metrics_on_a_socket_need_no_change_of_the_unit(machine: Machine) -> None:
    """Metrics on a Unix socket work under RestrictAddressFamilies=AF_UNIX and PrivateNetwork=yes."""
    assert machine.show(AGENT, "RestrictAddressFamilies") == "AF_UNIX"
    configure(machine, f'[metrics]\nlisten = "{UNIX}"\n')
    assert status(machine)["State"] == "Serving"
    assert "keyferry_keys 1.0" in scraped(machine, UNIX)
    assert machine.run("stat", "-c", "%U:%G %a", UNIX) == "keyferry:keyferry 660"


def test_metrics_on_a_port_are_refused_with_the_drop_in_named(machine: Machine) -> None:
    """The message names the setting and the drop-in."""
    configure(machine, f'[metrics]\nlisten = "{TCP}"\n')
    machine.run("systemctl", "start", AGENT, check=False)
    said = machine.run("journalctl", "--no-pager", "-o", "cat", "-u", AGENT)
    assert f'keyferry-agent: metrics: listen = "{TCP}": Address family not supported' in said
    assert "systemd/examples/metrics-tcp.conf" in said


def test_metrics_on_a_port_work_with_the_commands_of_the_page(machine: Machine) -> None:
    """The socket of the agent is the manager's, and no client is refused."""
    configure(machine, f'[metrics]\nlisten = "{TCP}"\n')
    typed(machine, "Metrics")
    assert status(machine)["State"] == "Serving"
    assert "keyferry_keys 1.0" in scraped(machine, TCP)
    assert "agent.serving" in [line["event"] for line in journal(machine)]


def test_missing_metrics_folder_is_named(machine: Machine) -> None:
    """The message names the setting and the folder."""
    configure(machine, '[metrics]\nlisten = "/run/nowhere/metrics.sock"\n')
    machine.run("systemctl", "start", AGENT, check=False)
    said = machine.run("journalctl", "--no-pager", "-o", "cat", "-u", AGENT)
    assert "keyferry-agent: metrics: listen: /run/nowhere: No such file or directory" in said
