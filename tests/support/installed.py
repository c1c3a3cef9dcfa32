"""An agent on a machine with systemd, installed by the commands of systemd/README.md, and an operator's actions."""

import json
import shutil
from typing import Any

from pyrage.x25519 import Identity

from .nspawn import Machine
from .skip_unless import ROOT

SYSTEMD = ROOT / "systemd"
AGENT = "keyferry-agent.service"
CONFIGURATION = "/etc/keyferry/agent.toml"
SETTINGS = """
keyring = "/etc/keyferry/keyring.age"
unseal = "/etc/keyferry/host.key"

[[grant]]
name = "orders"
to = { user = "orders" }
actions = ["kms:*"]
keys = ["*"]
"""


def commands(heading: str) -> list[str]:
    """The commands that systemd/README.md shows under a heading: of the lines with four spaces, each but a continuation."""
    section = f"\n{(SYSTEMD / 'README.md').read_text()}".split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ")]
    assert lines, heading
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def typed(machine: Machine, heading: str) -> str:
    """Run the commands of a heading as root in one shell, which ends at the first failure. Return their output."""
    return machine.run("bash", "-ec", "\n".join(["cd /srv", *commands(heading)]))


def install(machine: Machine) -> None:
    """Install the agent with a key that the user `orders` may use."""
    shutil.copytree(SYSTEMD, machine.root / "srv/systemd")
    machine.run("useradd", "--system", "orders")
    offline = Identity.generate()
    machine.write("/srv/offline.key", str(offline))
    (machine.root / "srv/offline.key").chmod(0o600)
    machine.write("/srv/offline.pub", f"{offline.to_public()}\n")
    typed(machine, "Install")
    machine.write(CONFIGURATION, SETTINGS)


def configure(machine: Machine, text: str) -> None:
    """Put more into the configuration than `SETTINGS`, at its end."""
    machine.write(CONFIGURATION, SETTINGS + text)


def drop_in(machine: Machine, text: str, name: str = "test") -> None:
    """Add to the agent's unit."""
    machine.write(f"/etc/systemd/system/{AGENT}.d/{name}.conf", text)
    machine.run("systemctl", "daemon-reload")


def call(machine: Machine, *arguments: str, user: str = "orders") -> Any:
    """Return the agent's answer to a call of `keyferry` by a user."""
    return json.loads(machine.run("keyferry", *arguments, user=user))


def status(machine: Machine, *arguments: str) -> Any:
    """Return the agent's status; wait for the agent."""
    return call(machine, "status", "--wait", "60", *arguments)


def journal(machine: Machine, *arguments: str) -> list[Any]:
    """Return the lines of the agent's log in the journal, those of systemd left out."""
    machine.run("journalctl", "--sync")
    text = machine.run("journalctl", "--no-pager", "-o", "cat", "-u", AGENT, *arguments)
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
