"""A gateway of an agent that runs as the shipped unit: on a port that systemd opens for it, and on one that it opens itself."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.installed import AGENT, SETTINGS, configure, install, journal, status, typed
from support.nspawn import Machine
from support.skip_unless import program, root

pytestmark = [root(), program("systemd-nspawn", "systemd-container")]

LISTEN = "127.0.0.1:8461"
CA = "/usr/local/share/keyferry/ca.pem"
DROP_INS = f"/etc/systemd/system/{AGENT}.d"
UNSEAL = ("--unseal", "/etc/keyferry/host.key")
CALL = """
import base64, hashlib, hmac, json, ssl, sys, time, urllib.request, uuid
from urllib.parse import quote, urlencode

access_key_id, secret, ca = sys.argv[1:]
parameters = {
    "Action": "GenerateDataKey", "KeyId": "alias/orders", "Version": "2016-01-20", "Format": "JSON",
    "AccessKeyId": access_key_id, "SignatureMethod": "HMAC-SHA1", "SignatureVersion": "1.0",
    "SignatureNonce": str(uuid.uuid4()), "Timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
}
query = urlencode(sorted(parameters.items()), quote_via=quote, safe="-_.~")
text = f"GET&%2F&{quote(query, safe='-_.~')}".encode()
signature = base64.b64encode(hmac.new(f"{secret}&".encode(), text, hashlib.sha1).digest()).decode()
url = f"https://127.0.0.1:8461/?{query}&{urlencode({'Signature': signature})}"
context = ssl.create_default_context(cafile=ca)
with urllib.request.urlopen(url, timeout=60, context=context) as answer:
    sys.stdout.write(answer.read().decode())
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine with the agent installed."""
    with Machine() as made:
        install(made)
        made.write("/srv/call.py", CALL)
        yield made


@pytest.fixture(scope="module")
def access_key(machine: Machine) -> dict[str, str]:
    """An access key in the keyring."""
    printed = machine.run(
        "keyferry-agent", "keyring", "create-access-key", "/etc/keyferry/keyring.age", *UNSEAL, "--json"
    )
    machine.run("chown", "keyferry:", "/etc/keyferry/keyring.age")
    return dict(json.loads(printed))


@pytest.fixture(autouse=True)
def afresh(machine: Machine, access_key: dict[str, str]) -> Iterator[None]:
    """Configure the gateway of the page before each test, and remove units after it."""
    machine.run("systemctl", "stop", AGENT)
    machine.run("journalctl", "--rotate", "--vacuum-time=1us")
    files = 'certificate = "/etc/keyferry/tls/tls.pem"\nprivate_key = "/etc/keyferry/tls/tls.key"\n'
    configure(
        machine,
        f'[[gateway]]\nname = "kms"\nlisten = "{LISTEN}"\n{files}'
        f'[[grant]]\nname = "by its access key"\nto = {{ access_key = "{access_key["AccessKeyId"]}" }}\n'
        'actions = ["kms:GenerateDataKey"]\nkeys = ["alias/orders"]\n',
    )
    yield
    machine.run("systemctl", "disable", "--now", "keyferry-gateway.socket", check=False)
    machine.run("rm", "-rf", DROP_INS, "/etc/systemd/system/keyferry-gateway.socket")
    machine.write("/etc/keyferry/agent.toml", SETTINGS)
    machine.run("systemctl", "daemon-reload")


def called(machine: Machine, access_key: dict[str, str]) -> Any:
    """Return the answer to a signed request of the user `orders`."""
    secrets = access_key["AccessKeyId"], access_key["AccessKeySecret"]
    return json.loads(machine.run("/usr/bin/python3", "/srv/call.py", *secrets, CA, user="orders"))


def test_the_gateway_works_with_the_commands_of_the_page(machine: Machine, access_key: dict[str, str]) -> None:
    """The port is opened by systemd, and the service keeps its empty network and its single address family."""
    typed(machine, "A gateway")
    assert status(machine)["State"] == "Serving"
    assert called(machine, access_key)["Plaintext"]
    assert machine.show(AGENT, "RestrictAddressFamilies") == "AF_UNIX"
    assert machine.show(AGENT, "PrivateNetwork") == "yes"
    assert "agent.serving" in [line["event"] for line in journal(machine)]
    pid = machine.show(AGENT, "MainPID")
    namespaces = machine.run("readlink", f"/proc/{pid}/ns/net", "/proc/1/ns/net").split()
    assert len(set(namespaces)) == 2


def test_a_call_starts_an_agent_that_was_stopped(machine: Machine, access_key: dict[str, str]) -> None:
    """The port stays open over a restart: a client that connects while no agent runs is answered by the next one."""
    machine.run("install", "-m", "0644", "-t", "/etc/systemd/system", "/srv/systemd/examples/keyferry-gateway.socket")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "keyferry-gateway.socket")
    assert machine.show(AGENT, "ActiveState") == "inactive"
    assert called(machine, access_key)["Plaintext"]
    assert machine.show(AGENT, "ActiveState") == "active"


def test_the_drop_in_lets_the_agent_open_the_port(machine: Machine, access_key: dict[str, str]) -> None:
    """It serves without a socket unit."""
    machine.run("install", "-D", "-m", "0644", "-t", DROP_INS, "/srv/systemd/examples/gateway-tcp.conf")
    machine.run("systemctl", "daemon-reload")
    machine.run("runuser", "-u", "keyferry", "--", "keyferry-agent", "check", "--systemd", "/etc/keyferry/agent.toml")
    machine.run("systemctl", "start", AGENT)
    assert status(machine)["State"] == "Serving"
    assert called(machine, access_key)["Plaintext"]


def test_without_either_the_messages_name_the_socket_unit(machine: Machine) -> None:
    """`check` and the agent name what is missing."""
    configuration = "/etc/keyferry/agent.toml"
    said = machine.run(
        "bash", "-c", f"runuser -u keyferry -- keyferry-agent check --systemd {configuration} 2>&1", check=False
    )
    assert "keyferry-agent.service has no network and no enabled socket unit has 127.0.0.1:8461" in said
    machine.run("systemctl", "start", AGENT, check=False)
    said = machine.run("journalctl", "--no-pager", "-o", "cat", "-u", AGENT)
    assert "the gateway 'kms' cannot listen on 127.0.0.1:8461: Address family not supported" in said
    assert "systemd/examples/keyferry-gateway.socket" in said
