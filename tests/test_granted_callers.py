"""Callers of a real agent: another user with a grant, without one, and with a grant to recipients."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.agent import RawConnection, RunningAgent
from support.calls import error, result
from support.keyring import change, two_callers
from support.keys import recipient
from support.skip_unless import root

from keyferry.parameters import decode_base64
from keyferry_agent.crypto.public_key import fingerprint

OTHER_USER = 12_345
RSA = recipient("RSAES_OAEP_SHA_256")
CONFIG = f"""
mode = "0666"
[[grant]]
name = "other"
to = {{ uid = {OTHER_USER} }}
actions = ["kms:GenerateAndExportDataKey", "kms:DescribeKey", "kms:ExportDataKey", "kms:Decrypt"]
keys = ["alias/dev"]
recipients = ["{fingerprint(RSA.der)}"]
encryption_context = {{ tenant = "acme" }}
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningAgent]:
    """An agent that any user can reach, with one grant to another user."""
    with tempfile.TemporaryDirectory(prefix="keyferry-test-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "agent.toml").write_text(CONFIG)
        with RunningAgent(["--dev", "--config", str(folder / "agent.toml")], folder / "agent.sock") as agent:
            yield agent


def asked_as(uid: int, path: Path, calls: list[tuple[str, dict[str, object]]]) -> list[str]:
    """Return the codes of another user's calls ("OK" for success), made by a child that becomes that user."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            with RawConnection(path) as connection:
                outcomes = [connection.call(method, params).error for method, params in calls]
            os.write(writing, "\n".join(error["Code"] if error else "OK" for error in outcomes).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as said:
        codes = said.read().split("\n")
    os.waitpid(child, 0)
    return codes


@root()
def test_another_user_has_exactly_its_grant(shared: RunningAgent) -> None:
    """Action, key, recipient and context decide independently."""
    good = {"KeyId": "alias/dev", "EncryptionContext": {"tenant": "acme"}, **RSA.params}
    with shared.client() as client:
        made = client.generate_and_export_data_key(
            key_id="alias/dev", encryption_context={"tenant": "acme"}, **RSA.arguments
        )
    blob = {"CiphertextBlob": made.ciphertext_blob, "EncryptionContext": {"tenant": "acme"}}
    calls = {
        "export": ("ExportDataKey", {**blob, **RSA.params}, "OK"),
        "plaintext, past the pins": ("Decrypt", blob, "Forbidden.NoPermission"),
        "as granted": ("GenerateAndExportDataKey", good, "OK"),
        "describe": ("DescribeKey", {"KeyId": "alias/dev"}, "OK"),
        "other context": (
            "GenerateAndExportDataKey",
            {**good, "EncryptionContext": {"tenant": "x"}},
            "Forbidden.NoPermission",
        ),
        "other recipient": (
            "GenerateAndExportDataKey",
            {**good, **recipient("SM2PKE").params},
            "Forbidden.NoPermission",
        ),
        "other key": ("DescribeKey", {"KeyId": "alias/dev-sm4"}, "Forbidden.NoPermission"),
        "no such key": ("DescribeKey", {"KeyId": "alias/dev-none"}, "Forbidden.NoPermission"),
        "bad parameter": ("DescribeKey", {"KeyId": 5}, "InvalidParameter"),
        "dry run": ("GenerateAndExportDataKey", {**good, "DryRun": True}, "DryRunOperationError"),
        "dry run refused": (
            "GenerateAndExportDataKey",
            {**good, "KeyId": "alias/x", "DryRun": True},
            "AccessDeniedError",
        ),
        "status": ("GetAgentStatus", {}, "OK"),
    }
    codes = asked_as(OTHER_USER, shared.socket, [(method, params) for method, params, _ in calls.values()])
    assert dict(zip(calls, codes, strict=True)) == {name: code for name, (_, _, code) in calls.items()}


@root()
def test_a_user_without_a_grant_learns_nothing_about_keys(shared: RunningAgent) -> None:
    """The answers for existing and missing keys, and for ciphertexts, are the same."""
    with shared.client() as client:
        made = client.generate_and_export_data_key(key_id="alias/dev", **RSA.arguments)
    unknown = str(uuid.uuid4()).encode() + decode_base64(made.ciphertext_blob)[36:]
    codes = asked_as(
        OTHER_USER + 1,
        shared.socket,
        [
            ("DescribeKey", {"KeyId": "alias/dev"}),
            ("DescribeKey", {"KeyId": "alias/none"}),
            ("DescribeKey", {"KeyId": made.key_id}),
            ("DescribeKey", {"KeyId": made.key_id[:-1] + "x"}),
            ("Decrypt", {"CiphertextBlob": made.ciphertext_blob}),
            ("Decrypt", {"CiphertextBlob": unknown}),
            ("Decrypt", {"CiphertextBlob": made.ciphertext_blob, "DryRun": True}),
        ],
    )
    assert codes == ["Forbidden.NoPermission"] * 6 + ["AccessDeniedError"]


@root()
def test_overflow_uid_matches_no_grant(socket_path: Path) -> None:
    """Users of other user namespaces all appear as 65534, so a grant to that number matches none of them."""
    config = socket_path.with_suffix(".toml")
    config.write_text('mode = "0666"\n[[grant]]\nname="n"\nto={uid=65534}\nactions=["kms:*"]\nkeys=["*"]\n')
    for parent in (socket_path.parent, *socket_path.parent.parents[:3]):
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    with RunningAgent(["--dev", "--config", str(config)], socket_path) as agent:
        assert asked_as(65_534, agent.socket, [("DescribeKey", {"KeyId": "alias/dev"})]) == ["Forbidden.NoPermission"]


def test_without_grants_every_caller_is_refused(socket_path: Path, tmp_path: Path) -> None:
    """The agent's own user is refused, too."""
    from keyferry_agent.cli.main import main  # noqa: PLC0415

    keyring, identity = tmp_path / "k.age", tmp_path / "id"
    assert main(["keyring", "init", str(keyring), "--new-identity", str(identity)]) == 0
    assert main(["keyring", "create-key", str(keyring), "--unseal", str(identity), "--alias", "alias/a"]) == 0
    with RunningAgent(["--keyring", str(keyring), "--unseal", str(identity)], socket_path) as agent:
        agent.wait_for("startup.no_grants")
        with RawConnection(agent.socket) as connection:
            for name in ("alias/a", "alias/b"):
                assert error(connection.call("DescribeKey", {"KeyId": name}))["Code"] == "Forbidden.NoPermission"
            status = result(connection.call("GetAgentStatus", {}))
            assert status["Keys"] == 0
            assert "Counters" not in status


PLANTED: dict[str, dict[str, Any]] = {
    "Encrypt": {"KeyId": "alias/a", "Plaintext": "A" * 43 + "="},
    "Encrypt, to see": {"KeyId": "alias/a", "Plaintext": "A" * 43 + "=", "DryRun": True},
    "GenerateDataKey": {"KeyId": "alias/a"},
}


def test_grant_with_recipients_neither_shows_nor_sets_a_data_key(keyring: Path) -> None:
    """Encrypt, and ReEncrypt from a key of its own, are refused to its holder, who may export generated data keys."""
    change(keyring, "create-key", "--alias", "alias/own")
    pinned = f'actions=["kms:*"]\nkeys=["alias/a"]\nrecipients=["{fingerprint(RSA.der)}"]'
    own = 'actions=["kms:*"]\nkeys=["alias/own"]'
    with two_callers(keyring, [pinned, own]) as (admin, app):
        for name, params in PLANTED.items():
            refusal = error(app.call(name.split(",")[0], params))
            assert refusal["Code"] in ("Forbidden.NoPermission", "AccessDeniedError"), name
        chosen = result(app.call("Encrypt", {"KeyId": "alias/own", "Plaintext": "A" * 43 + "="}))
        move = {"CiphertextBlob": chosen["CiphertextBlob"], "DestinationKeyId": "alias/a"}
        assert error(app.call("ReEncrypt", move))["Code"] == "Forbidden.NoPermission"
        assert admin.call("ReEncrypt", move).error is None
        drawn = result(app.call("GenerateDataKeyWithoutPlaintext", {"KeyId": "alias/a"}))
        assert app.call("ExportDataKey", {"CiphertextBlob": drawn["CiphertextBlob"], **RSA.params}).error is None
        stays = {"CiphertextBlob": drawn["CiphertextBlob"], "DestinationKeyId": "alias/a"}
        assert app.call("ReEncrypt", stays).error is None
