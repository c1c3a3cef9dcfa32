"""The steps of systemd/README.md after a leak: afterwards the leaked secret and its ciphertexts open nothing."""

import json
from collections.abc import Iterator

import pytest
from support.installed import AGENT, CONFIGURATION, SETTINGS, call, install, journal, typed
from support.nspawn import Machine
from support.skip_unless import program, root

pytestmark = [root(), program("systemd-nspawn", "systemd-container")]

KEYRING = "/etc/keyferry/keyring.age"
IDENTITY = "/etc/keyferry/host.key"
STORE = "sqlite:////srv/orders/records.sqlite"
MODULE = "--module /srv/orders/module.age --passphrase-file /srv/orders/passphrase"
AUDIT = '\n[audit]\npath = "/var/log/keyferry/audit.jsonl"\n'


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine with the agent, and an application of the user `orders` with a record and two encrypted files."""
    with Machine(extra="store") as made:
        install(made)
        made.write(CONFIGURATION, SETTINGS + AUDIT)
        made.run("systemctl", "restart", AGENT)
        made.run("install", "-d", "-o", "orders", "-m", "0700", "/srv/orders")
        as_orders(
            made,
            f"cd /srv/orders; umask 077; echo correct horse battery > passphrase; echo first > 1; echo second > 2; "
            f"keyferry module init module.age --passphrase-file passphrase; "
            f"keyferry records add orders --KeyId alias/orders --store {STORE}; "
            f"for name in 1 2; do keyferry encrypt-file $name $name.kf --record orders --store {STORE} {MODULE}; done",
        )
        yield made


def as_orders(machine: Machine, script: str, *, check: bool = True) -> str:
    """Run a script as the application's user."""
    return machine.run("bash", "-ec", script, user="orders", check=check)


def opens(machine: Machine, identity: str, keyring: str = KEYRING) -> bool:
    """Whether an identity opens a keyring."""
    script = f"keyferry-agent keyring list {keyring} --unseal {identity} >/dev/null 2>&1 && echo opens || echo refused"
    return machine.run("sh", "-c", script) == "opens"


def test_after_the_steps_the_leak_opens_nothing_new(machine: Machine) -> None:
    """Neither the leaked identity nor the leaked version opens anything new, and the application's calls go on."""
    leak = "/root/leaked.key"
    machine.run("cp", IDENTITY, leak)
    machine.run("cp", KEYRING, "/root/leaked.age")
    old = call(machine, "call", "Encrypt", "--KeyId", "alias/orders", "--Plaintext", "AAAA")
    machine.run("journalctl", "--rotate", "--vacuum-time=1us")
    typed(machine, "A leaked secret")
    machine.wait_until(
        ["sh", "-c", f"journalctl -u {AGENT} -o cat | grep -c reload.done | sed 's/[1-9].*/some/'"], "some"
    )
    assert opens(machine, leak, "/root/leaked.age")
    assert not opens(machine, leak)
    assert opens(machine, IDENTITY)
    assert opens(machine, "/srv/offline.key", "/srv/keyring-backup.age")
    blob = old["CiphertextBlob"]
    decrypt = [
        "sh",
        "-c",
        f"runuser -u orders -- keyferry call Decrypt --CiphertextBlob {blob} 2>&1 | grep -o Rejected.Disabled || true",
    ]
    machine.wait_until(decrypt, "Rejected.Disabled")
    records = json.loads(as_orders(machine, f"keyferry records list --json --store {STORE}"))
    assert {record["Name"].partition("@")[0] for record in records} == {"orders"}
    assert old["KeyVersionId"] not in {record["KeyVersionId"] for record in records}
    for name, content in (("1", "first"), ("2", "second")):
        assert as_orders(machine, f"keyferry decrypt-file /srv/orders/{name}.kf - {MODULE}") == content
        assert machine.run("grep", "-ac", old["KeyVersionId"], f"/srv/orders/{name}.kf", check=False) == "0"
    assert [line["event"] for line in journal(machine, "-p", "err")] == []


def test_a_leaked_credential_is_replaced_without_failures(machine: Machine) -> None:
    """The host's new credential opens the keyring, and the old identity does not."""
    leak = "/root/leaked-credential.key"
    machine.run("cp", IDENTITY, leak)
    typed(machine, "The unseal secret as a credential")
    machine.run("journalctl", "--rotate", "--vacuum-time=1us")
    typed(machine, "A leaked credential")
    machine.wait_until(
        ["sh", "-c", f"journalctl -u {AGENT} -o cat | grep -c reload.done | sed 's/[1-9].*/some/'"], "some"
    )
    assert not opens(machine, leak)
    assert call(machine, "call", "DescribeKey", "--KeyId", "alias/orders")["KeyMetadata"]
    assert [line["event"] for line in journal(machine, "-p", "err")] == []
