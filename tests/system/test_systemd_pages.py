"""The commands of systemd/README.md of a host in service: no client is refused, and no key is forgotten."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pyrage.x25519 import Identity
from support.agent import PATIENCE
from support.installed import AGENT, CONFIGURATION, SETTINGS, SYSTEMD, call, configure, install, journal, status, typed
from support.nspawn import Machine
from support.skip_unless import program, root

pytestmark = [root(), program("systemd-nspawn", "systemd-container")]

OWN = "/run/keyferry/orders.sock"
COMMON = "/run/keyferry/agent.sock"
CHECK = f"runuser -u keyferry -- keyferry-agent check --systemd {CONFIGURATION} 2>&1 || true"
DESCRIBE = "runuser -u orders -- keyferry call DescribeKey --KeyId alias/orders 2>&1"
LOAD = """
import sys, threading
from keyferry import Client
done, failures, count = threading.Event(), [], 0

def load():
    global count
    try:
        while not done.is_set():
            with Client(sys.argv[1], timeout=60) as kms:
                kms.generate_data_key(key_id="alias/orders")
                count += 1
    except BaseException as error:
        failures.append(repr(error))

thread = threading.Thread(target=load)
thread.start()
print("loading", flush=True)
sys.stdin.readline()
done.set()
thread.join()
print(failures or "none failed", count > 0)
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine with the agent installed."""
    with Machine() as made:
        install(made)
        made.write("/srv/load.py", LOAD)
        yield made


@pytest.fixture(autouse=True)
def afresh(machine: Machine) -> Iterator[None]:
    """Begin each test with an agent that serves, and an empty journal."""
    machine.run("systemctl", "restart", AGENT)
    machine.run("journalctl", "--sync")  # else lines of the agent before can come after the rotation
    machine.run("journalctl", "--rotate", "--vacuum-time=1us")
    yield
    machine.write(CONFIGURATION, SETTINGS)


@contextmanager
def load(machine: Machine, path: str = COMMON) -> Iterator[None]:
    """An application that connects and asks all the time; no request of it may fail."""
    with machine.start("runuser", "-u", "orders", "--", "/opt/keyferry/bin/python", "/srv/load.py", path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        try:
            yield
        finally:
            out, _ = process.communicate("\n", timeout=PATIENCE)
        assert out.strip() == "none failed True"


def described(machine: Machine, path: str) -> Any:
    """Describe the key by a socket."""
    return call(machine, "call", "DescribeKey", "--KeyId", "alias/orders", "--socket", path)


def errors(machine: Machine) -> list[str]:
    """Return the events that the journal has as errors, with their reasons."""
    return [f"{line['event']}: {line.get('why')}" for line in journal(machine, "-p", "err")]


def of_the_page() -> str:
    """The listeners and the grant that the page shows."""
    section = (SYSTEMD / "README.md").read_text().split("## A socket for each application")[1]
    found = re.search(r"```toml\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


def test_the_installed_host_is_ready_for_the_next_boot(machine: Machine) -> None:
    """Both units are enabled, the offline identity opens the backup, and applications are not in the agent's group."""
    for unit in (AGENT, "keyferry-agent.socket"):
        assert machine.run("systemctl", "is-enabled", unit) == "enabled"
    listed = machine.run("keyferry-agent", "keyring", "list", "/srv/keyring-backup.age", "--unseal", "/srv/offline.key")
    assert "alias/orders" in listed
    assert machine.run("id", "-nG", "orders").split() == ["orders", "keyferry-clients"]
    refused = machine.run("sh", "-c", "runuser -u orders -- ls /etc/keyferry 2>&1 || true")
    assert "Permission denied" in refused


def test_a_broken_keyring_shows_at_the_start_of_the_service(machine: Machine) -> None:
    """The journal has the reason as an error before any client has connected."""
    machine.run("mv", "/etc/keyferry/keyring.age", "/root/away")
    try:
        machine.run("systemctl", "restart", AGENT, check=False)
        said = machine.run("journalctl", "--no-pager", "-o", "cat", "-p", "err", "-u", AGENT)
        assert "keyring.age: No such file or directory" in said
    finally:
        machine.run("mv", "/root/away", "/etc/keyferry/keyring.age")
    assert status(machine)["State"] == "Serving"


def test_an_application_is_added_and_revoked_and_keys_stay(machine: Machine) -> None:
    """No client is refused, kept keys need no secret, and at the end no socket of the application is left."""
    kept = f"keep_keys = true\n{SETTINGS}"
    machine.write(CONFIGURATION, kept)
    machine.run("systemctl", "restart", AGENT)
    assert machine.show(AGENT, "NFileDescriptorStore") == "2"
    machine.run("mv", "/etc/keyferry/host.key", "/root/away")
    try:
        with load(machine):
            machine.write(CONFIGURATION, kept + of_the_page())
            assert "no enabled socket unit has it" in machine.run("sh", "-c", CHECK)
            with secret(machine):  # the page's `check` looks for it
                typed(machine, "A socket for each application")
        assert described(machine, OWN)["KeyMetadata"]
        assert machine.show(AGENT, "NFileDescriptorStore") == "2"
        with load(machine, OWN):
            without = of_the_page().partition('[[listener]]\nname = "orders"')[2]
            machine.write(CONFIGURATION, f'{kept}[[listener]]\nname = "orders"{without}')
            typed(machine, "Without the common socket")
        assert not (machine.root / COMMON[1:]).exists()
        assert described(machine, OWN)["KeyMetadata"]
        machine.run("systemctl", "enable", "keyferry-agent.socket")
        machine.write(CONFIGURATION, kept)
        typed(machine, "Revoke an application")
        assert machine.run("sh", "-c", "ls /run/keyferry") == "agent.sock"
        assert described(machine, COMMON)["KeyMetadata"]
        assert machine.show(AGENT, "NFileDescriptorStore") == "2"
    finally:
        machine.run("mv", "/root/away", "/etc/keyferry/host.key")


@contextmanager
def secret(machine: Machine) -> Iterator[None]:
    """Put the unseal secret back for a moment."""
    machine.run("mv", "/root/away", "/etc/keyferry/host.key")
    yield
    machine.run("mv", "/etc/keyferry/host.key", "/root/away")


def test_a_removed_grant_is_refused_on_an_open_connection(machine: Machine) -> None:
    """The page's first step takes effect without a restart."""
    script = """
import sys
from keyferry import Client, AccessDenied
with Client() as kms:
    kms.describe_key(key_id="alias/orders")
    print("described", flush=True)
    sys.stdin.readline()
    try:
        kms.describe_key(key_id="alias/orders")
    except AccessDenied:
        print("refused")
"""
    machine.write("/srv/open.py", script)
    with machine.start("runuser", "-u", "orders", "--", "/opt/keyferry/bin/python", "/srv/open.py") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "described\n"
        machine.write(CONFIGURATION, SETTINGS.partition("[[grant]]")[0])
        machine.run("systemctl", "reload", AGENT)
        machine.wait_until(
            ["sh", "-c", f"journalctl -u {AGENT} -o cat | grep -c reload.done | sed 's/[1-9].*/some/'"], "some"
        )
        assert process.communicate("\n", timeout=PATIENCE)[0] == "refused\n"


def test_an_application_has_grants_in_a_file_of_its_own(machine: Machine) -> None:
    """The shipped unit lets the agent read the folder, and see that a file was added and removed."""
    machine.write(CONFIGURATION, SETTINGS.partition("[[grant]]")[0])
    machine.run("systemctl", "restart", AGENT)
    call = f"{DESCRIBE} | grep -o 'Forbidden.NoPermission\\|PrimaryKeyVersion'"
    try:
        assert machine.run("sh", "-c", call) == "Forbidden.NoPermission"
        assert "good; grants: 1" in typed(machine, "Grants of an application in a file of its own")
        machine.wait_until(["sh", "-c", call], "PrimaryKeyVersion")
        machine.run("mv", "/etc/keyferry/grants.d/orders.toml", "/etc/keyferry/grants.d/orders.off")
        machine.wait_until(["sh", "-c", call], "Forbidden.NoPermission")
    finally:
        machine.run("rm", "-rf", "/etc/keyferry/grants.d")


def test_an_operator_is_added_and_recorded(machine: Machine) -> None:
    """The identity of the new operator and the two old ones open the keyring, and the history has the new recipient."""
    alice = Identity.generate()
    machine.write("/srv/alice.key", str(alice))
    (machine.root / "srv/alice.key").chmod(0o600)
    machine.write("/srv/alice.pub", f"{alice.to_public()}\n")
    said = typed(machine, "Add an operator").splitlines()
    assert any(f"recipient {alice.to_public()}: added" in line for line in said[-4:])
    for identity in ("/srv/alice.key", "/srv/offline.key", "/etc/keyferry/host.key"):
        listed = machine.run("keyferry-agent", "keyring", "list", "/etc/keyferry/keyring.age", "--unseal", identity)
        assert "alias/orders" in listed
    machine.run("keyferry-agent", "audit", "verify", "/etc/keyferry/keyring.age.changes.jsonl")


def test_check_finds_faults_that_stop_the_service(machine: Machine) -> None:
    """`check` names a socket without a listener, a folder that is not writable for the service, and a missing credential."""
    assert machine.run("sh", "-c", CHECK) == f"{CONFIGURATION}: good; grants: 1"
    configure(machine, '[audit]\npath = "/var/tmp/audit.jsonl"\n[[listener]]\nname = "a"\npath = "/run/keyferry/a.sock"\n'
              '[[listener]]\nname = "b"\npath = "/run/keyferry/b.sock"\n')  # fmt: skip
    said = machine.run("sh", "-c", CHECK)
    assert "listener: systemd hands over a socket named 'default' at /run/keyferry/agent.sock" in said
    assert "audit.path: /var/tmp: keyferry-agent.service may not write there" in said
    machine.write(CONFIGURATION, SETTINGS.replace("/etc/keyferry/host.key", "credential:keyferry.unseal"))
    assert "loads no credential 'keyferry.unseal'" in machine.run("sh", "-c", CHECK)
    configure(
        machine, '[audit]\npath = "/var/log/keyferry/audit.jsonl"\n[metrics]\nlisten = "/run/keyferry-agent/m.sock"\n'
    )
    assert machine.run("sh", "-c", CHECK) == f"{CONFIGURATION}: good; grants: 1"


def test_the_secret_becomes_a_credential_without_failures(machine: Machine) -> None:
    """No reload fails on the way, and no file of the secret is left."""
    machine.run("cp", "/etc/keyferry/host.key", "/root/kept.key")
    try:
        with load(machine):
            typed(machine, "The unseal secret as a credential")
        assert not (machine.root / "etc/keyferry/host.key").exists()
        before = described(machine, COMMON)["KeyMetadata"]["PrimaryKeyVersion"]
        with load(machine):
            typed(machine, "Change the keyring with a credential")
            machine.wait_until(["sh", "-c", f"{DESCRIBE} | grep -c {before}"], "0")
        assert errors(machine) == []
    finally:
        machine.run("sh", "-c", f"rm -rf /etc/systemd/system/{AGENT}.d; cp /root/kept.key /etc/keyferry/host.key")
        machine.run("chown", "keyferry:", "/etc/keyferry/host.key")
        machine.write(CONFIGURATION, SETTINGS)
        machine.run("systemctl", "daemon-reload")


def test_an_upgrade_by_the_page_refuses_no_client(machine: Machine) -> None:
    """An upgrade installs first the packages and then the units, and no client is refused meanwhile."""
    with load(machine):
        machine.install()
        typed(machine, "Upgrade")
        assert status(machine)["State"] == "Serving"
    assert errors(machine) == []


def test_an_uninstalled_agent_leaves_keys_until_deletion(machine: Machine) -> None:
    """After the page's last steps, unit, user and files are gone. This is the last test of the file."""
    try:
        typed(machine, "Uninstall")
        assert machine.run("sh", "-c", "ls /etc/keyferry").split() == [
            "agent.toml",
            "host.key",
            "keyring.age",
            "keyring.age.changes.jsonl",
        ]
        typed(machine, "Delete the keys")
        left = machine.run("sh", "-c", "find / -xdev -path /srv -prune -o -path /root -prune -o -path /proc -prune -o "
                           "-name '*keyferry*' -print | grep -v '/journal/\\\\|^/tmp/' || true")  # fmt: skip
        assert [
            line for line in left.splitlines() if line.startswith(("/etc", "/usr/l", "/opt", "/run", "/var/l"))
        ] == []
        assert machine.run("sh", "-c", "getent passwd keyferry; getent group keyferry keyferry-clients; true") == ""
    finally:
        machine.write(CONFIGURATION, SETTINGS)
