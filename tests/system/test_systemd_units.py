"""The units on a real systemd: installed as their README says, started by a connection, killed, reloaded, upgraded."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.agent import PATIENCE
from support.installed import install
from support.nspawn import Machine
from support.skip_unless import ROOT, program, root

pytestmark = [
    root(),
    program("systemd-nspawn", "systemd-container"),
    pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs /usr/bin/python3 (Debian package python3)"),
]

SYSTEMD = ROOT / "systemd"
AGENT = "keyferry-agent.service"
SOCKET = "/run/keyferry/agent.sock"
SETTINGS = """
keyring = "/etc/keyferry/keyring.age"
unseal = "/etc/keyferry/host.key"
{more}
[audit]
path = "/var/log/keyferry/audit.jsonl"

[[grant]]
name = "orders"
to = {{ {to} }}
actions = ["kms:*"]
keys = ["*"]
"""
LOAD = """
import sys, threading
from keyferry import Client
done = threading.Event()
counts, failures = [0, 0], []

def load(number):
    try:
        kms = Client(sys.argv[1], timeout=60)
        while not done.is_set():
            if number:
                kms.close()
                kms = Client(sys.argv[1], timeout=60)
            kms.generate_data_key_without_plaintext(key_id="alias/orders")
            counts[number] += 1
    except BaseException as error:
        failures.append(repr(error))

threads = [threading.Thread(target=load, args=(number,)) for number in range(2)]
for thread in threads: thread.start()
print("loading", flush=True)
sys.stdin.readline()
done.set()
for thread in threads: thread.join()
print(failures or "none failed", min(counts) > 0)
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Yield a machine with the agent installed by systemd/README.md, and a user for an application."""
    with Machine() as made:
        install(made)
        made.write("/srv/load.py", LOAD)
        made.write("/etc/keyferry/agent.toml", SETTINGS.format(more="", to='user = "orders"'))
        if int(made.run("systemctl", "--version").split()[1]) >= 253:
            made.write(
                f"/etc/systemd/system/{AGENT}.d/notify-reload.conf", (SYSTEMD / "notify-reload.conf").read_text()
            )
            made.run("systemctl", "daemon-reload")
        yield made


@pytest.fixture(autouse=True)
def afresh(machine: Machine) -> Iterator[None]:
    """Each test begins with the units as they were installed, and no agent running."""
    machine.run("systemctl", "stop", AGENT)
    machine.run("systemctl", "start", "keyferry-agent.socket")
    yield
    machine.run("rm", "-f", f"/etc/systemd/system/{AGENT}.d/test.conf")
    machine.write("/etc/keyferry/agent.toml", SETTINGS.format(more="", to='user = "orders"'))
    machine.run("systemctl", "daemon-reload")


def drop_in(machine: Machine, text: str) -> None:
    """Add to the agent's unit."""
    machine.write(f"/etc/systemd/system/{AGENT}.d/test.conf", text)
    machine.run("systemctl", "daemon-reload")


def call(machine: Machine, *arguments: str, user: str = "orders") -> Any:
    """Return the output of `keyferry` for a user."""
    return json.loads(machine.run("keyferry", *arguments, user=user))


def status(machine: Machine) -> Any:
    """The agent's health."""
    return call(machine, "status", "--wait", "60")


@contextmanager
def load(machine: Machine, path: str = SOCKET) -> Iterator[None]:
    """An application that asks all the time, over one connection and over fresh ones; no request of it may fail."""
    command = ["runuser", "-u", "orders", "--", "/opt/keyferry/bin/python", "/srv/load.py", path]
    with machine.start(*command) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        try:
            yield
        finally:
            out, _ = process.communicate("\n", timeout=PATIENCE)
        assert out.strip() == "none failed True"


def test_units_are_valid_and_have_low_exposure(machine: Machine) -> None:
    """systemd-analyze verifies the units and rates their exposure."""
    units = [str(SYSTEMD / name) for name in (AGENT, "keyferry-agent.socket")]
    said = machine.run("systemd-analyze", "verify", f"/etc/systemd/system/{AGENT}")
    assert "keyferry" not in said
    arguments = ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", units[0]]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def test_first_connection_starts_a_protected_agent(machine: Machine) -> None:
    """Socket activation starts the agent under its own user and with minimal privileges."""
    assert machine.run("systemctl", "is-active", AGENT, check=False) == "inactive"
    assert status(machine)["MemoryProtection"] == "memfd_secret"
    assert machine.run("systemctl", "is-active", AGENT) == "active"
    assert machine.show(AGENT, "StatusText").startswith("Serving: 1 key in memfd_secret memory, loaded ")
    assert machine.run("ps", "-o", "user=", "-p", machine.show(AGENT, "MainPID")) == "keyferry"
    of_process = machine.run("cat", f"/proc/{machine.show(AGENT, 'MainPID')}/status")
    assert "NoNewPrivs:\t1" in of_process
    assert "CapEff:\t0000000000000000" in of_process
    assert "Seccomp:\t2" in of_process
    call(machine, "call", "GenerateDataKeyWithoutPlaintext", "--KeyId", "alias/orders")
    assert machine.run("stat", "-c", "%U %a", "/var/log/keyferry/audit.jsonl") == "keyferry 600"
    machine.run("keyferry-agent", "audit", "verify", "--config", "/etc/keyferry/agent.toml")


def test_user_outside_the_group_cannot_connect(machine: Machine) -> None:
    """The socket's mode keeps a user outside the agent's group out."""
    machine.run("useradd", "--system", "stranger")
    said = machine.run("sh", "-c", "runuser -u stranger -- keyferry status 2>&1; echo $?")
    assert "may not open" in said
    assert said.endswith("3")


def test_restarts_and_crashes_under_load_fail_no_request(machine: Machine) -> None:
    """The manager owns the socket, so clients that connect during a restart wait."""
    with load(machine):
        for _ in range(2):
            before = machine.show(AGENT, "MainPID")
            machine.run("systemctl", "restart", AGENT)
            after = machine.show(AGENT, "MainPID")
            assert after not in (before, "0")
            machine.run("kill", "-KILL", after)
            machine.run("sh", "-c", f"while kill -0 {after} 2>/dev/null; do sleep 0.05; done")
            assert status(machine)["State"] == "Serving"
    assert machine.show(AGENT, "NRestarts") != "0"


def test_watchdog_restarts_a_hanging_agent(machine: Machine) -> None:
    """A hanging agent answers no request and sends no watchdog notification, so systemd restarts it."""
    drop_in(machine, "[Service]\nWatchdogSec=1\n")
    status(machine)
    before = machine.show(AGENT, "MainPID")
    with load(machine):
        machine.run("kill", "-STOP", before)
        machine.wait_until(["sh", "-c", f"kill -0 {before} 2>/dev/null || echo gone"], "gone")
        assert status(machine)["State"] == "Serving"
    assert "Watchdog timeout" in machine.run("journalctl", "--no-pager", "-u", AGENT)


def test_a_reload_swaps_the_keyring_under_load(machine: Machine) -> None:
    """The unit's status names the reloaded keyring; an invalid configuration changes nothing."""
    with load(machine):
        machine.run(
            "keyferry-agent", "keyring", "create-key", "/etc/keyferry/keyring.age", "--unseal", "/etc/keyferry/host.key"
        )
        machine.run("systemctl", "reload", AGENT)
        machine.wait_until(["sh", "-c", f"systemctl show -P StatusText {AGENT} | cut -d' ' -f1-3"], "Serving: 2 keys")
        machine.write("/etc/keyferry/agent.toml", "nonsense = 1")
        machine.run("systemctl", "reload", AGENT)
        machine.wait_until(["sh", "-c", f"systemctl show -P StatusText {AGENT} | cut -d, -f1"], "Not reloaded")
    assert machine.run("systemctl", "is-active", AGENT) == "active"


def test_kept_keys_survive_restarts_and_end_with_a_stop(machine: Machine) -> None:
    """Systemd holds the locked memory across restarts and crashes; `systemctl stop` releases it."""
    machine.write("/etc/keyferry/agent.toml", SETTINGS.format(more="keep_keys = true", to='user = "orders"'))
    made = call(machine, "call", "GenerateDataKey", "--KeyId", "alias/orders")
    assert machine.show(AGENT, "NFileDescriptorStore") == "2"
    machine.run("mv", "/etc/keyferry/host.key", "/root/away")
    try:
        for end in (["systemctl", "restart", AGENT], ["systemctl", "kill", "-s", "KILL", AGENT]):
            with load(machine):
                machine.run(*end)
                opened = call(machine, "call", "Decrypt", "--CiphertextBlob", made["CiphertextBlob"])
                assert opened["Plaintext"] == made["Plaintext"]
                assert status(machine)["MemoryProtection"] == "memfd_secret"
        assert "keyring.kept" in machine.run("journalctl", "--no-pager", "-u", AGENT)
        machine.run("systemctl", "stop", AGENT)
        assert machine.show(AGENT, "NFileDescriptorStore") == "0"
        machine.run("systemctl", "start", AGENT, check=False)
        assert "host.key: No such file" in machine.run("journalctl", "--no-pager", "-u", AGENT)
    finally:
        machine.run("mv", "/root/away", "/etc/keyferry/host.key")
    assert status(machine)["State"] == "Serving"  # it was tried again all the time


def test_unit_is_identified_by_its_control_group(machine: Machine) -> None:
    """The same user in another unit is refused."""
    machine.write("/etc/keyferry/agent.toml", SETTINGS.format(more="", to='user = "orders", unit = "orders.service"'))
    ask = ["keyferry", "call", "DescribeKey", "--KeyId", "alias/orders"]
    for unit, expected in (("orders.service", '"KeyState": "Enabled"'), ("other.service", "Forbidden.NoPermission")):
        options = ["--quiet", "--wait", "--pipe", "--collect", f"--unit={unit}", "--uid=orders"]
        groups = ["-p", "SupplementaryGroups=keyferry-clients"]
        assert expected in machine.run(
            "sh", "-c", " ".join(["systemd-run", *options, *groups, *ask, "2>&1", "||", "true"])
        )


def test_an_application_has_a_socket_of_its_own(machine: Machine) -> None:
    """Only the application's user opens the example's socket, and its grants name the listener."""
    settings = SETTINGS.format(more="", to='listener = "orders"')
    listeners = "".join(
        f'[[listener]]\nname = "{name}"\npath = "/run/keyferry/{file}.sock"\n'
        for name, file in (("default", "agent"), ("orders", "orders"))
    )
    machine.write("/etc/keyferry/agent.toml", settings + listeners)
    machine.run("cp", "/srv/systemd/examples/keyferry-orders.socket", "/etc/systemd/system/")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "keyferry-orders.socket")
    try:
        own = ["--socket", "/run/keyferry/orders.sock"]
        assert call(machine, "call", "DescribeKey", "--KeyId", "alias/orders", *own)["KeyMetadata"]
        refused = machine.run(
            "sh", "-c", "runuser -u orders -- keyferry call DescribeKey --KeyId alias/orders 2>&1 || true"
        )
        assert "Forbidden.NoPermission" in refused
        with load(machine, own[1]):
            machine.run("systemctl", "restart", AGENT)
    finally:
        machine.run("systemctl", "stop", AGENT)
        machine.run("systemctl", "stop", "keyferry-orders.socket")
        machine.run("rm", "/etc/systemd/system/keyferry-orders.socket")


def test_the_package_is_upgraded_while_the_agent_serves(machine: Machine) -> None:
    """The agent serves while pip replaces its files, and a restart then runs the new ones without a failed request."""
    status(machine)
    with load(machine):
        machine.install()
        call(machine, "call", "DescribeKey", "--KeyId", "alias/orders")
        machine.run("systemctl", "restart", AGENT)
        assert status(machine)["State"] == "Serving"
