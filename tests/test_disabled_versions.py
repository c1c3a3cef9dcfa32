"""A disabled version of a key: what it encrypted opens nowhere, until it is enabled again."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.agent import RawConnection
from support.calls import ok, refused
from support.keyring import Command, change, opened, rewritten, run, serving
from support.keys import recipient
from support.rotatable_agent import Rotating

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
def test_an_agent_opens_nothing_under_a_disabled_version(rotating: Rotating, dry_run: bool) -> None:
    """Rejected.Disabled, with the version in the message and in the audit entry; enabled again, it opens."""
    old = primary(rotating.said)
    with RawConnection(rotating.agent.socket) as connection:
        blob = ok(connection, "Encrypt", {"KeyId": "alias/a", "Plaintext": "AAAA"})["CiphertextBlob"]
        new = rotating.rotate()
        fresh = ok(connection, "Encrypt", {"KeyId": "alias/a", "Plaintext": "AAAA"})["CiphertextBlob"]
        calls: list[tuple[str, dict[str, Any]]] = [
            ("Decrypt", {}),
            ("ReEncrypt", {"DestinationKeyId": "alias/a"}),
            ("ExportDataKey", RSA.params),
        ]
        rotating.does("disable-version", "alias/a", old, "--yes")
        for method, params in calls:
            message = refused(
                connection, method, {**params, "CiphertextBlob": blob, "DryRun": dry_run}, "Rejected.Disabled"
            )
            assert old in message
            entry = [line for line in rotating.agent.log if line.get("event") == "audit"][-1]
            assert (entry["operation"], entry["outcome"]) == (method, "Rejected.Disabled")
            assert old in json.dumps(entry)
        ok(connection, "Decrypt", {"CiphertextBlob": fresh})
        listed = ok(connection, "ListKeyVersions", {"KeyId": "alias/a"})["KeyVersions"]["KeyVersion"]
        assert [version["KeyVersionId"] for version in listed] == [old, new]
        rotating.does("enable-version", "alias/a", old)
        ok(connection, "Decrypt", {"CiphertextBlob": blob})


def test_a_caller_without_a_grant_learns_no_states(keyring: Path, said: Command, socket_path: Path) -> None:
    """The grant is judged before the version."""
    old = primary(said)
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        blob = ok(connection, "Encrypt", {"KeyId": "alias/a", "Plaintext": "AAAA"})["CiphertextBlob"]
    said("rotate", "alias/a")
    said("disable-version", "alias/a", old, "--yes")
    with (
        serving(keyring, socket_path, actions="kms:Encrypt") as agent,
        RawConnection(agent.socket) as connection,
    ):
        refused(connection, "Decrypt", {"CiphertextBlob": blob}, "Forbidden.NoPermission")


def test_the_primary_version_cannot_be_disabled(
    said: Command, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with --yes: the message says to rotate first. A version that is not there is named."""
    version = primary(said)
    assert "is the primary version, which encrypts; run `rotate`" in refusal(
        keyring, capsys, "disable-version", version, "--yes"
    )
    for verb in ("disable-version", "enable-version"):
        assert "Forbidden.KeyVersionNotFound" in refusal(keyring, capsys, verb, "nonsense")


def test_a_version_is_disabled_with_yes_only(said: Command, keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The refusal says what breaks, and how to find and move it. Disabling twice changes nothing more."""
    version = primary(said)
    said("rotate", "alias/a")
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
    shown = said("disable-version", "alias/a", version, "--yes")
    assert said("disable-version", "alias/a", version) == shown
    assert shown["KeyMetadata"]["DisabledKeyVersions"] == [version]


def test_list_and_show_display_disabled_versions(
    said: Command, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For people and as JSON."""
    version = primary(said)
    said("rotate", "alias/a")
    said("disable-version", "alias/a", version, "--yes")
    assert said("list")["Keys"]["Key"][0]["DisabledKeyVersions"] == [version]
    assert [each["Disabled"] for each in said("show", "alias/a")["KeyVersions"]["KeyVersion"]] == [True, False]
    for verb in (["list", keyring], ["show", keyring, "alias/a"]):
        run(str(verb[0]), keyring, *verb[2:], "--unseal", keyring.parent / "identity")
    printed = capsys.readouterr().out
    assert "Enabled (1 disabled version)" in printed
    assert any(version in line and line.endswith("disabled") for line in printed.splitlines())


def test_a_staged_version_can_be_disabled_and_not_promoted(
    said: Command, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have leaked too; once it is enabled it can be promoted."""
    staged = said("rotate", "alias/a", "--stage")["KeyVersion"]["KeyVersionId"]
    said("disable-version", "alias/a", staged, "--yes")
    assert "Rejected.Disabled" in refusal(keyring, capsys, "promote", staged)
    said("enable-version", "alias/a", staged)
    said("promote", "alias/a", staged)


@pytest.mark.parametrize(("state", "code"), [("PendingDeletion", "Rejected.StateModifiedFailed"), ("Disabled", "")])
def test_versions_are_switched_in_the_states_of_the_key(
    said: Command, keyring: Path, capsys: pytest.CaptureFixture[str], state: str, code: str
) -> None:
    """As the key itself is."""
    version = primary(said)
    said("rotate", "alias/a")
    date = "9999-01-01T00:00:00Z" if state == "PendingDeletion" else ""
    rewritten(keyring, lambda raw: raw["Keys"][0].update(KeyState=state, DeleteDate=date))
    if code:
        for verb in ("disable-version", "enable-version"):
            assert code in refusal(keyring, capsys, verb, version)
    else:
        said("disable-version", "alias/a", version, "--yes")
        assert opened(keyring).find("alias/a").versions[0].disabled


def test_only_a_disabled_version_changes_the_document(said: Command, keyring: Path) -> None:
    """A program that does not know the field reads every other keyring, and refuses one that it would open too much of."""
    identity = Unsealer.read(keyring.parent / "identity")
    version = primary(said)
    said("rotate", "alias/a")
    assert b"Disabled" not in identity.unseal(keyring.read_bytes())
    said("disable-version", "alias/a", version, "--yes")
    raw = json.loads(identity.unseal(keyring.read_bytes()))
    assert [entry.get("Disabled") for entry in raw["Keys"][0]["KeyVersions"]] == [True, None]
    change(keyring, "create-key")
    assert opened(keyring).find("alias/a").versions[0].disabled
    said("enable-version", "alias/a", version)
    assert b"Disabled" not in identity.unseal(keyring.read_bytes())


@pytest.mark.parametrize("value", [None, 1, "true"])
def test_a_disabled_of_another_type_is_refused(said: Command, keyring: Path, value: object) -> None:
    """So is a primary version that is disabled."""
    raw = json.loads(Unsealer.read(keyring.parent / "identity").unseal(keyring.read_bytes()))
    entry = raw["Keys"][0]["KeyVersions"][0]
    entry["Disabled"] = value
    with pytest.raises(KeyringError, match="Disabled: missing, or of the wrong type"):
        Document.from_json(json.dumps(raw).encode())
    entry["Disabled"] = True
    with pytest.raises(KeyringError, match="is staged or disabled"):
        Document.from_json(json.dumps(raw).encode())


def test_a_kept_keyring_keeps_its_disabled_versions(said: Command, keyring: Path) -> None:
    """In a description of a format that an earlier agent does not take, so that it opens nothing with the version."""
    version = primary(said)
    said("rotate", "alias/a")
    said("disable-version", "alias/a", version, "--yes")
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
