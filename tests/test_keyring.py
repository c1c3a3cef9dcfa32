"""The sealed keyring: its file, its verbs, and the daemon that loads it. The real `age` is the other end."""

import base64
import dataclasses
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.agent import PATIENCE, RunningAgent
from support.keyring import Command, run
from support.secrets import secret_file
from support.skip_unless import program

from keyferry_agent.keyring import file
from keyferry_agent.keyring.document import Document, KeyringError, check_alias
from keyferry_agent.keyring.keyring import development_keyring
from keyferry_agent.keyring.sealing import Unsealer


def test_a_new_keyring_is_empty_sealed_and_private(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The age file and its identity have mode 0600."""
    path, identity = tmp_path / "k.age", tmp_path / "id"
    run("init", path, "--new-identity", identity, "--json")
    (recipient,) = json.loads(capsys.readouterr().out)["Recipients"]
    assert path.read_bytes().startswith(b"age-encryption.org/v1\n")
    assert path.stat().st_mode & 0o777 == identity.stat().st_mode & 0o777 == 0o600
    assert recipient in identity.read_text()
    assert file.read(path, Unsealer.read(identity)) == Document([recipient])


def test_neither_a_keyring_nor_an_identity_is_ever_overwritten(keyring: Path, tmp_path: Path) -> None:
    """`init` on an existing file changes neither the keyring nor the identity."""
    before = keyring.read_bytes(), (tmp_path / "identity").read_bytes()
    run("init", keyring, "--new-identity", tmp_path / "other", code=1)
    assert not (tmp_path / "other").exists()
    run("init", tmp_path / "new.age", "--new-identity", tmp_path / "identity", code=1)
    assert not (tmp_path / "new.age").exists()
    run("init", tmp_path / "none" / "new.age", "--new-identity", tmp_path / "fresh", code=1)
    assert not (tmp_path / "fresh").exists()
    assert (keyring.read_bytes(), (tmp_path / "identity").read_bytes()) == before


def test_create_key_list_and_show_agree(keyring_json: Command) -> None:
    """The verbs use the API's names, and find a key by ID and by alias."""
    made = keyring_json("create-key", "--key-spec", "Aliyun_SM4", "--alias", "alias/b/c", "--description", "für Tests")[
        "KeyMetadata"
    ]
    listed = keyring_json("list")
    assert listed["TotalCount"] == 2
    assert made in listed["Keys"]["Key"]
    shown = keyring_json("show", "alias/b/c")
    assert shown == keyring_json("show", made["KeyId"])
    assert shown["KeyMetadata"] == made
    assert made["Aliases"] == ["alias/b/c"]
    assert (made["KeySpec"], made["KeyState"], made["Description"]) == ("Aliyun_SM4", "Enabled", "für Tests")
    (version,) = shown["KeyVersions"]["KeyVersion"]
    assert version["KeyVersionId"] == made["PrimaryKeyVersion"]
    assert version["Staged"] is False


def test_aliases_are_created_moved_and_deleted(keyring_json: Command) -> None:
    """An alias leads to one key, and a key outlives its aliases."""
    first = keyring_json("show", "alias/a")["KeyMetadata"]["KeyId"]
    second = keyring_json("create-key")["KeyMetadata"]["KeyId"]
    assert keyring_json("create-alias", "alias/x", second)["KeyMetadata"]["Aliases"] == ["alias/x"]
    assert keyring_json("update-alias", "alias/x", "alias/a")["KeyMetadata"]["KeyId"] == first
    assert keyring_json("delete-alias", "alias/a")["KeyMetadata"]["Aliases"] == ["alias/x"]
    assert keyring_json("show", "alias/x")["KeyMetadata"]["KeyId"] == first
    assert keyring_json("show", second)["KeyMetadata"]["Aliases"] == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("create-key", "--alias", "alias/a"), "exists already"),
        (("create-key", "--alias", "alias/"), "not an alias"),
        (("create-key", "--alias", "orders"), "not an alias"),
        (("create-key", "--alias", "alias/ü"), "not an alias"),
        (("create-key", "--alias", "alias/acs/x"), "cloud's own"),
        (("create-key", "--description", "a\x1b[2Jb"), "printable"),
        (("create-key", "--description", "x" * 8193), "8192"),
        (("create-alias", "alias/a", "alias/a"), "exists already"),
        (("create-alias", "alias/b", "alias/none"), "no key or alias"),
        (("update-alias", "alias/b", "alias/a"), "no alias"),
        (("delete-alias", "alias/b"), "no alias"),
        (("show", "alias/b"), "no key or alias"),
    ],
)
def test_refused_change_leaves_the_file_unchanged(
    keyring: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], why: str
) -> None:
    """The exit code is 1, and standard error has the reason."""
    before = keyring.read_bytes()
    run(arguments[0], keyring, *arguments[1:], "--unseal", keyring.parent / "identity", code=1)
    assert why in capsys.readouterr().err
    assert keyring.read_bytes() == before


def test_text_output_has_tables_and_no_key_material(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = keyring.parent / "identity"
    document = file.read(keyring, Unsealer.read(identity))
    (material,) = (version.material for key in document.keys for version in key.versions)
    for arguments in (("list",), ("show", "alias/a"), ("create-alias", "alias/b", "alias/a"), ("list", "--json")):
        run(arguments[0], keyring, *arguments[1:], "--unseal", identity)
    out = capsys.readouterr().out
    assert "KEY ID" in out
    assert "primary" in out
    for form in (material.hex(), base64.b64encode(material).decode(), repr(bytes(material))):
        assert form not in out
    assert "material" not in repr(document)


def test_ten_concurrent_commands_lose_no_change(keyring: Path) -> None:
    """Writers wait for each other's lock on the keyring."""
    identity = keyring.parent / "identity"
    create_key = [
        sys.executable,
        "-m",
        "keyferry_agent",
        "keyring",
        "create-key",
        str(keyring),
        "--unseal",
        str(identity),
    ]
    commands = [
        subprocess.Popen(
            [*create_key, "--alias", f"alias/n{i}"],
            stdout=subprocess.DEVNULL,
        )
        for i in range(10)
    ]
    assert [command.wait(PATIENCE) for command in commands] == [0] * 10
    document = file.read(keyring, Unsealer.read(identity))
    assert set(document.aliases) == {"alias/a", *(f"alias/n{i}" for i in range(10))}
    assert [path.name for path in keyring.parent.iterdir() if path.name.startswith(".")] == []


def test_a_change_through_a_symlink_changes_the_file_it_names(keyring: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.age"
    link.symlink_to(keyring)
    run("create-key", link, "--unseal", tmp_path / "identity", "--alias", "alias/z")
    assert link.is_symlink()
    assert "alias/z" in file.read(keyring, Unsealer.read(tmp_path / "identity")).aliases


def test_failed_write_leaves_only_the_old_file(keyring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk makes the write fail here."""
    before = keyring.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    run("create-key", keyring, "--unseal", keyring.parent / "identity", code=1)
    assert keyring.read_bytes() == before
    assert sorted(path.name for path in keyring.parent.iterdir()) == [
        "identity",
        "keyring.age",
        "keyring.age.changes.jsonl",
    ]


@pytest.mark.parametrize("content", [b"not age", b"", b"age-encryption.org/v1\n"])
def test_damaged_keyring_is_named_and_left_alone(
    keyring: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """The message says that the keyring is damaged, and the file is not changed."""
    keyring.write_bytes(content)
    run("create-key", keyring, "--unseal", keyring.parent / "identity", code=1)
    assert "does not open" in capsys.readouterr().err
    assert keyring.read_bytes() == content


def test_wrong_identity_or_passphrase_does_not_open_a_keyring(
    keyring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("init", tmp_path / "other.age", "--new-identity", tmp_path / "other")
    secret_file(tmp_path / "pass", "secret\n")
    for wrong, why in (("other", "does not open"), ("pass", "does not open"), ("nothing", "No such file")):
        run("list", keyring, "--unseal", tmp_path / wrong, code=1)
        assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda raw: raw.update(Format="x"), "not a keyring"),
        (lambda raw: raw.update(Version=3), "version 3; .* upgrade"),
        (lambda raw: raw.update(Version=True), "upgrade"),
        (lambda raw: raw.update(Version=1.0), "upgrade"),
        (lambda raw: raw.update(Version={"Material": "*secret*"}), "upgrade"),
        (lambda raw: raw.update({"x" * 9_000 + "secret": 1}), "unknown"),
        (lambda raw: raw.update(Surprise=1), "Surprise"),
        (lambda raw: raw.pop("Keys"), "Keys"),
        (lambda raw: raw.update(Keys=[5]), r"Keys\[0\]"),
        (lambda raw: raw.update(Recipients=[5]), "Recipients"),
        (lambda raw: raw.update(Aliases={"alias/a": 5}), "Aliases"),
        (lambda raw: raw.update(Aliases={"alias/a": "x"}), "not there"),
        (lambda raw: raw.update(Aliases={"a": raw["Keys"][0]["KeyId"]}), "not an alias"),
        (lambda raw: raw["Keys"].append(raw["Keys"][0]), "twice"),
        (lambda raw: raw["Keys"][0].update(KeyId="X"), "UUID"),
        (lambda raw: raw["Keys"][0].update(KeyState="Lost"), "KeyState"),
        (lambda raw: raw["Keys"][0].update(KeyState="PendingDeletion"), "DeleteDate"),
        (lambda raw: raw["Keys"][0].update(KeySpec="Aliyun_SM4"), "16 bytes"),
        (lambda raw: raw["Keys"][0].update(CreationDate="yesterday"), "date"),
        (lambda raw: raw["Keys"][0].update(CreationDate="2026-1-1T1:1:1Z"), "date"),
        (lambda raw: raw["Keys"][0].update(Description="x" * 9000), "8192"),
        (lambda raw: raw["Keys"][0].update(PrimaryKeyVersion="x"), "PrimaryKeyVersion"),
        (lambda raw: raw["Keys"][0]["KeyVersions"][0].update(Staged=True), "staged"),
        (lambda raw: raw["Keys"][0]["KeyVersions"][0].update(Material="AAAA"), "32 bytes"),
        (lambda raw: raw["Keys"][0]["KeyVersions"][0].update(Material="*secret*"), "32 bytes"),
        (lambda raw: raw["Keys"][0]["KeyVersions"][0].update(Extra=1), "Extra"),
    ],
)
def test_invalid_content_is_named_by_its_path_and_not_quoted(
    keyring: Path, change: Callable[[Any], None], why: str
) -> None:
    """The invalid value could be a key."""
    document = file.read(keyring, Unsealer.read(keyring.parent / "identity"))
    raw = json.loads(document.to_json())
    change(raw)
    with pytest.raises(KeyringError, match=why) as caught:
        Document.from_json(json.dumps(raw).encode())
    assert "secret" not in str(caught.value)
    assert "AAAA" not in str(caught.value)


def test_content_that_is_not_json_is_refused() -> None:
    """The seal is valid, and the content is not."""
    for content in (b"\xff", b"[" * 100_000, b'{"Version": 1, "Version": 1}'):
        with pytest.raises(KeyringError, match="JSON"):
            Document.from_json(content)


@pytest.mark.parametrize("alias", ["alias/a", "alias/A_b-c/d", "alias/" + "x" * 255])
def test_valid_aliases_are_accepted(alias: str) -> None:
    """An alias has letters, digits, _ - and /."""
    check_alias(alias)


@program("ssh-keygen", "openssh-client")
def test_keyring_opens_for_each_of_its_recipients(tmp_path: Path) -> None:
    """Two hosts, one with an SSH key, and an offline identity open one file, and a change by one is for all."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "ssh"], check=True)
    run("init", tmp_path / "x.age", "--new-identity", tmp_path / "offline")
    offline = (tmp_path / "offline").read_text().split()[3]
    path = tmp_path / "k.age"
    run("init", path, "--recipient", (tmp_path / "ssh.pub").read_text().strip(), "--recipient", offline)
    run("create-key", path, "--unseal", tmp_path / "ssh", "--alias", "alias/a")
    assert "alias/a" in file.read(path, Unsealer.read(tmp_path / "offline")).aliases
    run("create-key", path, "--unseal", tmp_path / "offline", "--alias", "alias/b")
    assert "alias/b" in file.read(path, Unsealer.read(tmp_path / "ssh")).aliases


@pytest.mark.parametrize(("option", "value"), [("--recipient", "age1x"), ("--recipient", "ssh-rsa AAAA")])
def test_invalid_recipient_is_refused_before_a_write(
    tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message has the recipient's text."""
    run("init", tmp_path / "k.age", option, value, code=1)
    assert "is not a recipient" in capsys.readouterr().err
    assert not (tmp_path / "k.age").exists()


@pytest.mark.parametrize("content", ["\n", "", "AGE-SECRET-KEY-1NOPE\n", "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n"])
def test_empty_passphrase_and_invalid_identity_are_named(keyring: Path, content: str, tmp_path: Path) -> None:
    """An unseal secret that cannot open any keyring is an error with its reason."""
    secret_file(tmp_path / "bad", content)
    run("list", keyring, "--unseal", tmp_path / "bad", code=1)
    secret_file(tmp_path / "bad", b"\xff\xfe")
    run("list", keyring, "--unseal", tmp_path / "bad", code=1)


def test_unsealer_hides_its_secret(keyring: Path, tmp_path: Path) -> None:
    """An unsealer's repr names only the kind of its secret."""
    secret_file(tmp_path / "pass", "secret\n")
    assert repr(Unsealer.read(tmp_path / "pass")) == "Unsealer(passphrase)"
    assert repr(Unsealer.read(keyring.parent / "identity")) == "Unsealer(identity)"


@program("age", "age")
def test_the_age_program_opens_a_keyring_with_its_identity(keyring: Path) -> None:
    """An operator can open a keyring in an emergency without Keyferry."""
    opened = subprocess.run(
        ["age", "-d", "-i", keyring.parent / "identity", keyring], capture_output=True, check=True, timeout=PATIENCE
    )
    assert json.loads(opened.stdout)["Format"] == "keyferry-keyring"
    assert Document.from_json(opened.stdout) == file.read(keyring, Unsealer.read(keyring.parent / "identity"))


@program("age", "age")
def test_the_age_program_opens_a_keyring_with_its_passphrase(tmp_path: Path) -> None:
    """The age program asks for the passphrase on a terminal."""
    secret_file(tmp_path / "pass", "correct horse\n")
    path = tmp_path / "k.age"
    run("init", path, "--passphrase-file", tmp_path / "pass")
    run("create-key", path, "--unseal", tmp_path / "pass", "--alias", "alias/p")
    child, terminal = pty.fork()
    if child == 0:
        os.execvp("age", ["age", "-d", "-o", str(tmp_path / "opened"), str(path)])
    said = b""
    while b"passphrase" not in said:
        said += os.read(terminal, 1024)
    os.write(terminal, b"correct horse\n")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)
    assert "alias/p" in Document.from_json((tmp_path / "opened").read_bytes()).aliases


@pytest.mark.parametrize(
    ("damage", "why"), [("keyring", "does not open"), ("identity", "No such file"), ("neither", "no unseal")]
)
def test_agent_does_not_start_without_opening_its_keyring(
    keyring: Path, socket_path: Path, damage: str, why: str
) -> None:
    """The exit code is 1, with a reason, and no socket is made."""
    identity = keyring.parent / "identity"
    arguments = ["--keyring", str(keyring)]
    if damage != "neither":
        arguments += ["--unseal", str(identity)]
    if damage == "keyring":
        keyring.write_bytes(b"broken")
    if damage == "identity":
        identity.unlink()
    agent = RunningAgent(arguments, socket_path)
    assert agent.wait() == 1
    agent.kill()
    assert why in "".join(agent.output)
    assert "Traceback" not in "".join(agent.output)
    assert not socket_path.exists()


def test_a_key_past_its_deletion_date_is_gone_at_once() -> None:
    """The date is compared at each use, not at the load."""
    keyring = development_keyring(backing="auto", require=False)
    key = keyring.by_alias["alias/dev"]
    past = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 1))
    for state, date in (("Deleted", past), ("PendingDeletion", "9999-01-01T00:00:00Z")):
        assert dataclasses.replace(key, stored_state="PendingDeletion", delete_date=date).state() == state
