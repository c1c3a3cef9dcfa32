"""The verbs about access keys: created, imported, listed, enabled, disabled and deleted; their secrets are printed once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.agent import PATIENCE
from support.keyring import Command, opened, run
from support.secrets import secret_file

from keyferry_agent.keyring import access_keys
from keyferry_agent.keyring.access_key_edits import create_access_key
from keyferry_agent.keyring.changes import log_of
from keyferry_agent.keyring.document import Document

KEYRING = (sys.executable, "-m", "keyferry_agent", "keyring")
SECRET = "s3cret-of-24-characters!"


def test_a_created_access_key_is_printed_and_stored(keyring_json: Command, keyring: Path) -> None:
    """The output has the ID and the secret that the keyring holds; no SecurityToken."""
    created = keyring_json("create-access-key", "--description", "orders")
    assert re.fullmatch("LTAI[0-9A-Za-z]{20}", created["AccessKeyId"])
    assert re.fullmatch("[0-9A-Za-z]{30}", created["AccessKeySecret"])
    assert "SecurityToken" not in created
    (stored,) = opened(keyring).access_keys
    assert (stored.access_key_id, stored.secret.decode()) == (created["AccessKeyId"], created["AccessKeySecret"])
    assert (bytes(stored.token), stored.enabled, stored.description) == (b"", True, "orders")


def test_temporary_credentials_have_a_security_token(keyring_json: Command, keyring: Path) -> None:
    """Their ID begins with STS, as in the cloud."""
    created = keyring_json("create-access-key", "--token")
    assert re.fullmatch(r"STS\.[0-9A-Za-z]{20}", created["AccessKeyId"])
    assert re.fullmatch("[0-9A-Za-z]{64}", created["SecurityToken"])
    (stored,) = opened(keyring).access_keys
    assert stored.token.decode() == created["SecurityToken"]


def test_readable_output_has_the_secret_on_a_line(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An operator copies the values from the lines of the output."""
    run("create-access-key", keyring, "--token", "--unseal", keyring.parent / "identity")
    printed = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    (stored,) = opened(keyring).access_keys
    assert printed["AccessKeyId"].strip() == stored.access_key_id
    assert printed["AccessKeySecret"].strip() == stored.secret.decode()
    assert printed["SecurityToken"].strip() == stored.token.decode()


def test_ids_and_secrets_use_all_letters_and_digits() -> None:
    """Of 62 characters, 3,000 random ones contain each; no two access keys are equal."""
    document = Document([])
    for _ in range(100):
        create_access_key(document)
    assert len({key.access_key_id for key in document.access_keys}) == 100
    assert len({bytes(key.secret) for key in document.access_keys}) == 100
    assert {byte for key in document.access_keys for byte in key.secret} == set(access_keys.ALPHABET)


def test_access_keys_are_listed_without_secrets(
    keyring_json: Command, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the JSON nor the table has a secret or a token."""
    created = keyring_json("create-access-key", "--token", "--description", "orders")
    run("list-access-keys", keyring, "--unseal", keyring.parent / "identity")
    table = capsys.readouterr().out
    listed = keyring_json("list-access-keys")
    assert listed["TotalCount"] == 1
    assert listed["AccessKeys"]["AccessKey"] == [
        {
            "AccessKeyId": created["AccessKeyId"],
            "Status": "Active",
            "Description": "orders",
            "CreationDate": created["CreationDate"],
            "HasSecurityToken": True,
        }
    ]
    assert table.splitlines()[1].split() == [created["AccessKeyId"], "Active", created["CreationDate"], "orders"]
    for secret in (created["AccessKeySecret"], created["SecurityToken"]):
        assert secret not in table + str(listed) + log_of(keyring).read_text()


def test_access_keys_are_disabled_enabled_and_deleted(keyring_json: Command, keyring: Path) -> None:
    """Each verb changes the named access key alone, and its output has the new status without the secret."""
    ids = [keyring_json("create-access-key")["AccessKeyId"] for _ in range(2)]
    for verb, status in (("disable", "Inactive"), ("disable", "Inactive"), ("enable", "Active")):
        changed = keyring_json(f"{verb}-access-key", ids[1])
        assert (changed["AccessKeyId"], changed["Status"]) == (ids[1], status)
        assert "AccessKeySecret" not in changed
        assert [key.enabled for key in opened(keyring).access_keys] == [True, status == "Active"]
    keyring_json("delete-access-key", ids[0])
    assert [key.access_key_id for key in opened(keyring).access_keys] == [ids[1]]
    keyring_json("delete-access-key", ids[1])
    assert b'"Version": 1' in opened(keyring).to_json()


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_an_imported_secret_ends_at_its_line(keyring_json: Command, keyring: Path, end: str) -> None:
    """A file that an editor or a shell wrote ends with a line end, which is not a part of the secret."""
    path = secret_file(keyring.parent / "secret", SECRET + end)
    imported = keyring_json("import-access-key", "--id", "LTAI5tEXISTING", "--secret-file", path)
    assert (imported["AccessKeyId"], imported["Status"]) == ("LTAI5tEXISTING", "Active")
    assert SECRET not in str(imported)
    assert [key.secret.decode() for key in opened(keyring).access_keys] == [SECRET]


@pytest.mark.parametrize(
    ("access_key_id", "secret", "why"),
    [
        ("LTAIone", "s" * 15, "16 to 128 printable ASCII characters"),
        ("LTAIone", "s" * 129, "16 to 128 printable ASCII characters"),
        ("LTAIone", "s" * 5_000, "16 to 128 printable ASCII characters"),
        ("LTAIone", f"{SECRET} {SECRET}", "without white space"),
        ("LTAIone", f"{SECRET}\n{SECRET}", "without white space"),
        ("LTAIone", f"{SECRET}é", "16 to 128 printable ASCII characters"),
        ("LTAI one", SECRET, "--id: an access key ID has"),
        ("", SECRET, "--id: an access key ID has"),
        ("LTAItaken", SECRET, "the keyring has an access key 'LTAItaken' already"),
    ],
)
def test_an_invalid_import_changes_nothing(
    keyring_json: Command,
    keyring: Path,
    capsys: pytest.CaptureFixture[str],
    access_key_id: str,
    secret: str,
    why: str,
) -> None:
    """The message has the reason, and never quotes the secret."""
    folder = keyring.parent
    keyring_json("import-access-key", "--id", "LTAItaken", "--secret-file", secret_file(folder / "one", "t" * 16))
    before = keyring.read_bytes()
    path = secret_file(folder / "two", secret)
    arguments = ["--id", access_key_id, "--secret-file", path, "--unseal", folder / "identity"]
    run("import-access-key", keyring, *arguments, code=1)
    message = capsys.readouterr().err
    assert why in message
    assert secret[:10] not in message
    assert keyring.read_bytes() == before


@pytest.mark.parametrize("verb", ["enable", "disable", "delete"])
def test_an_unknown_access_key_is_named(keyring: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    """The message names the verb that prints the existing access keys."""
    run(f"{verb}-access-key", keyring, "LTAInone", "--unseal", keyring.parent / "identity", code=1)
    assert "no access key 'LTAInone'; `list-access-keys` prints those" in capsys.readouterr().err


def test_an_access_key_that_cannot_be_printed_is_not_added(keyring: Path) -> None:
    """The keyring has no access key whose secret was lost, for example in a full disk."""
    before = keyring.read_bytes()
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [*KEYRING, "create-access-key", str(keyring), "--unseal", str(keyring.parent / "identity")],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
            check=False,
        )
    assert ended.returncode == 1
    assert b"nothing was changed, because the secret could not be printed" in ended.stderr
    assert keyring.read_bytes() == before


def test_a_secret_is_imported_from_standard_input(keyring: Path) -> None:
    """An operator pipes the secret from another program, so that no file has it."""
    arguments = ("--id", "LTAIpiped", "--secret-file", "-")
    subprocess.run(
        [*KEYRING, "import-access-key", str(keyring), "--unseal", str(keyring.parent / "identity"), *arguments],
        input=f"{SECRET}{os.linesep}".encode(),
        stdout=subprocess.PIPE,
        timeout=PATIENCE,
        check=True,
    )
    assert [key.secret.decode() for key in opened(keyring).access_keys] == [SECRET]
