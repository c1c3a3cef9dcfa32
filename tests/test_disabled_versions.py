"""A disabled version of a key: its ciphertexts do not open until it is enabled again."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.agent import RawConnection
from support.calls import call_ok, call_refused
from support.keyring import Command, change, opened, rewritten, run, serving
from support.keys import recipient
from support.rotatable_agent import RotatableAgent

from keyferry_agent.keyring.document import Document, KeyringError
from keyferry_agent.keyring.fdstore import KeyringPersister
from keyferry_agent.keyring.loader import load
from keyferry_agent.keyring.sealing import Unsealer

RSA = recipient("RSAES_OAEP_SHA_256")


def primary(said: Command) -> str:
    """Return the primary version of alias/a."""
    version: str = said("show", "alias/a")["KeyMetadata"]["PrimaryKeyVersion"]
    return version


def refusal(keyring: Path, capsys: pytest.CaptureFixture[str], verb: str, *arguments: str) -> str:
    """Return why a verb on alias/a was refused, which changed nothing."""
    before = keyring.read_bytes()
    capsys.readouterr()
    run(verb, keyring, "alias/a", *arguments, "--unseal", keyring.parent / "identity", code=1)
    assert keyring.read_bytes() == before
    return capsys.readouterr().err


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_agent_opens_nothing_under_a_disabled_version(rotatable_agent: RotatableAgent, dry_run: bool) -> None:
    """Decrypt raises Rejected.Disabled with the version in message and audit entry; an enabled version opens again."""
    old = primary(rotatable_agent.keyring_json)
    with RawConnection(rotatable_agent.agent.socket) as connection:
        blob = call_ok(connection, "Encrypt", {"KeyId": "alias/a", "Plaintext": "AAAA"})["CiphertextBlob"]
        new = rotatable_agent.rotate()
        fresh = call_ok(connection, "Encrypt", {"KeyId": "alias/a", "Plaintext": "AAAA"})["CiphertextBlob"]
        calls: list[tuple[str, dict[str, Any]]] = [
            ("Decrypt", {}),
            ("ReEncrypt", {"DestinationKeyId": "alias/a"}),
            ("ExportDataKey", RSA.params),
        ]
        rotatable_agent.change("disable-version", "alias/a", old, "--yes")
        for method, params in calls:
            message = call_refused(
                connection, method, {**params, "CiphertextBlob": blob, "DryRun": dry_run}, "Rejected.Disabled"
            )
            assert old in message
            assert rotatable_agent.agent.has_logged(
                "audit", operation=method, outcome="Rejected.Disabled", key_version_id=old
            )
        call_ok(connection, "Decrypt", {"CiphertextBlob": fresh})
        listed = call_ok(connection, "ListKeyVersions", {"KeyId": "alias/a"})["KeyVersions"]["KeyVersion"]
        assert [version["KeyVersionId"] for version in listed] == [old, new]
        rotatable_agent.change("enable-version", "alias/a", old)
        call_ok(connection, "Decrypt", {"CiphertextBlob": blob})


def test_a_caller_without_a_grant_learns_no_states(keyring: Path, keyring_json: Command, socket_path: Path) -> None:
    """The agent checks the grant before the version's state."""
    old = primary(keyring_json)
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        blob = call_ok(connection, "Encrypt", {"KeyId": "alias/a", "Plaintext": "AAAA"})["CiphertextBlob"]
    keyring_json("rotate", "alias/a")
    keyring_json("disable-version", "alias/a", old, "--yes")
    with (
        serving(keyring, socket_path, actions="kms:Encrypt") as agent,
        RawConnection(agent.socket) as connection,
    ):
        call_refused(connection, "Decrypt", {"CiphertextBlob": blob}, "Forbidden.NoPermission")


def test_the_primary_version_cannot_be_disabled(
    keyring_json: Command, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message advises a rotation first, also with --yes; an unknown version is named."""
    version = primary(keyring_json)
    assert "is the primary version, which encrypts; run `rotate`" in refusal(
        keyring, capsys, "disable-version", version, "--yes"
    )
    for verb in ("disable-version", "enable-version"):
        assert "Forbidden.KeyVersionNotFound" in refusal(keyring, capsys, verb, "nonsense")


def test_a_version_is_disabled_with_yes_only(
    keyring_json: Command, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal names the affected ciphertexts and the commands that move them; a repetition changes nothing."""
    version = primary(keyring_json)
    keyring_json("rotate", "alias/a")
    why = refusal(keyring, capsys, "disable-version", version)
    for part in (
        "Rejected.Disabled",
        "audit who --key alias/a",
        "records list",
        "records rewrap",
        "reencrypt-file",
        "--yes",
    ):
        assert part in why
    shown = keyring_json("disable-version", "alias/a", version, "--yes")
    assert keyring_json("disable-version", "alias/a", version) == shown
    assert shown["KeyMetadata"]["DisabledKeyVersions"] == [version]


def test_list_and_show_display_disabled_versions(
    keyring_json: Command, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Disabled versions are in the text and in the JSON."""
    version = primary(keyring_json)
    keyring_json("rotate", "alias/a")
    keyring_json("disable-version", "alias/a", version, "--yes")
    assert keyring_json("list")["Keys"]["Key"][0]["DisabledKeyVersions"] == [version]
    assert [each["Disabled"] for each in keyring_json("show", "alias/a")["KeyVersions"]["KeyVersion"]] == [True, False]
    for verb in (["list", keyring], ["show", keyring, "alias/a"]):
        run(str(verb[0]), keyring, *verb[2:], "--unseal", keyring.parent / "identity")
    printed = capsys.readouterr().out
    assert "Enabled (1 disabled version)" in printed
    assert any(version in line and line.endswith("disabled") for line in printed.splitlines())


def test_a_staged_version_can_be_disabled_and_not_promoted(
    keyring_json: Command, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A staged version may have leaked, and can be promoted once it is enabled again."""
    staged = keyring_json("rotate", "alias/a", "--stage")["KeyVersion"]["KeyVersionId"]
    keyring_json("disable-version", "alias/a", staged, "--yes")
    assert "Rejected.Disabled" in refusal(keyring, capsys, "promote", staged)
    keyring_json("enable-version", "alias/a", staged)
    keyring_json("promote", "alias/a", staged)


@pytest.mark.parametrize(("state", "code"), [("PendingDeletion", "Rejected.StateModifiedFailed"), ("Disabled", "")])
def test_versions_can_be_disabled_where_the_key_can_be(
    keyring_json: Command, keyring: Path, capsys: pytest.CaptureFixture[str], state: str, code: str
) -> None:
    """A version can be switched wherever its key can be."""
    version = primary(keyring_json)
    keyring_json("rotate", "alias/a")
    date = "9999-01-01T00:00:00Z" if state == "PendingDeletion" else ""
    rewritten(keyring, lambda raw: raw["Keys"][0].update(KeyState=state, DeleteDate=date))
    if code:
        for verb in ("disable-version", "enable-version"):
            assert code in refusal(keyring, capsys, verb, version)
    else:
        keyring_json("disable-version", "alias/a", version, "--yes")
        assert opened(keyring).find("alias/a").versions[0].disabled


def test_only_a_disabled_version_changes_the_document(keyring_json: Command, keyring: Path) -> None:
    """Other keyrings stay readable for programs without the field; those programs refuse a keyring with it."""
    identity = Unsealer.read(keyring.parent / "identity")
    version = primary(keyring_json)
    keyring_json("rotate", "alias/a")
    assert b"Disabled" not in identity.unseal(keyring.read_bytes())
    keyring_json("disable-version", "alias/a", version, "--yes")
    raw = json.loads(identity.unseal(keyring.read_bytes()))
    assert [entry.get("Disabled") for entry in raw["Keys"][0]["KeyVersions"]] == [True, None]
    change(keyring, "create-key")
    assert opened(keyring).find("alias/a").versions[0].disabled
    keyring_json("enable-version", "alias/a", version)
    assert b"Disabled" not in identity.unseal(keyring.read_bytes())


@pytest.mark.parametrize("value", [None, 1, "true"])
def test_disabled_field_of_another_type_is_refused(keyring_json: Command, keyring: Path, value: object) -> None:
    """A disabled primary version is refused, too."""
    raw = json.loads(Unsealer.read(keyring.parent / "identity").unseal(keyring.read_bytes()))
    entry = raw["Keys"][0]["KeyVersions"][0]
    entry["Disabled"] = value
    with pytest.raises(KeyringError, match="Disabled: missing, or of the wrong type"):
        Document.from_json(json.dumps(raw).encode())
    entry["Disabled"] = True
    with pytest.raises(KeyringError, match="is staged or disabled"):
        Document.from_json(json.dumps(raw).encode())


def test_a_kept_keyring_keeps_its_disabled_versions(keyring_json: Command, keyring: Path) -> None:
    """Earlier agents refuse the description's format, so they open nothing with the version."""
    version = primary(keyring_json)
    keyring_json("rotate", "alias/a")
    keyring_json("disable-version", "alias/a", version, "--yes")
    stored: dict[str, int] = {}

    def store(name: str, descriptor: int) -> bool:
        stored[name] = os.dup(descriptor)
        return True

    keeper = KeyringPersister(store, lambda _name: None)
    loaded = load(keyring, keyring.parent / "identity", backing="auto", require=False, persister=keeper)
    if not stored:
        pytest.skip("needs memfd_secret")
    assert keeper.commit(loaded, None)
    description = json.loads(os.pread(stored["keyring-1-description"], 1 << 20, 0))
    assert description["Format"] == 2
    restored = KeyringPersister(store, lambda _name: None).restore(stored.items())
    assert restored is not None
    assert restored[0].by_version[version][1].disabled
    restored[0].memory.close()
    loaded.memory.close()
