"""The log of a keyring's changes: an entry for each verb that writes, in the audit log's chain, or the change is refused."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyrage.x25519 import Identity
from support.agent import PATIENCE
from support.keyring import Command, change, opened, rewritten, run
from support.other_user import OTHER_USER
from support.skip_unless import root

from keyferry_agent.cli.main import main
from keyferry_agent.keyring import file
from keyferry_agent.keyring.changes import MAX_CHANGES_BYTES, file_hash, log_of
from keyferry_agent.keyring.edits import create_key
from keyferry_agent.keyring.sealing import Unsealer


def entries(keyring: Path) -> list[dict[str, Any]]:
    """All entries of the log."""
    return [json.loads(line) for line in log_of(keyring).read_text().splitlines()]


def last(keyring: Path) -> dict[str, Any]:
    """The last entry; the one before it is the beginning of the same change."""
    begun, done = entries(keyring)[-2:]
    assert (begun["result"], begun["after"], begun["changes"]) == ("begun", done["after"], done["changes"])
    return done


def verify(keyring: Path) -> int:
    """Verify the chain of the log."""
    return main(["audit", "verify", str(log_of(keyring))])


def history(keyring: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> list[dict[str, Any]]:
    """Return the output of `history`."""
    capsys.readouterr()
    assert main(["keyring", "history", str(keyring), "--json"]) == code
    changes: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["Changes"]
    return changes


def test_every_verb_that_writes_has_entries(keyring: Path, keyring_json: Command, tmp_path: Path) -> None:
    """Entries have the change, the operator, and the hash of the file before and after."""
    (tmp_path / "material").write_bytes(bytes(range(32)))
    other = str(Identity.generate().to_public())
    own = (tmp_path / "identity").read_text().split()[3]
    key = keyring_json("show", "alias/a")["KeyMetadata"]["KeyId"]
    staged = keyring_json("rotate", "alias/a", "--stage")["KeyVersion"]["KeyVersionId"]
    assert last(keyring)["changes"] == [{"key_id": key, "key_version_id": staged, "change": "added"}]
    old = keyring_json("show", "alias/a")["KeyMetadata"]["PrimaryKeyVersion"]
    changed = {
        ("promote", "alias/a", staged): [
            {"key_id": key, "change": "primary", "before": old, "after": staged},
            {"key_id": key, "key_version_id": staged, "change": "staged", "before": True, "after": False},
        ],
        ("disable", key): [{"key_id": key, "change": "state", "before": "Enabled", "after": "Disabled"}],
        ("enable", key): [{"key_id": key, "change": "state", "before": "Disabled", "after": "Enabled"}],
        ("create-alias", "alias/b", key): [{"alias": "alias/b", "key_id": key, "change": "added"}],
        ("delete-alias", "alias/b"): [{"alias": "alias/b", "key_id": key, "change": "removed"}],
    }
    for (verb, *arguments), changes in changed.items():
        before = file_hash(keyring.read_bytes())
        keyring_json(verb, *arguments)
        entry = last(keyring)
        assert (entry["verb"], entry["result"], entry["changes"]) == (verb, "done", changes)
        assert (entry["before"], entry["after"]) == (before, file_hash(keyring.read_bytes()))
        assert (entry["uid"], entry["recipients"]) == (os.getuid(), 1)
    keyring_json("schedule-deletion", key, "--days", "7")
    assert [each["change"] for each in last(keyring)["changes"]] == ["delete_date", "state"]
    keyring_json("cancel-deletion", key)
    made = keyring_json("import-key", "--material", tmp_path / "material", "--alias", "alias/m")["KeyMetadata"]["KeyId"]
    assert {"key_id": made, "change": "added"} in last(keyring)["changes"]
    keyring_json("update-alias", "alias/m", key)
    assert last(keyring)["changes"] == [{"alias": "alias/m", "change": "key_id", "before": made, "after": key}]
    run("reseal", keyring, "--recipient", own, "--recipient", other, "--unseal", tmp_path / "identity")
    entry = last(keyring)
    assert (entry["verb"], entry["recipients"]) == ("reseal", 2)
    assert entry["changes"] == [{"recipient": other, "change": "added"}]
    assert [each["verb"] for each in entries(keyring) if each["result"] == "done"] == [
        "init", "create-key", "rotate", "promote", "disable", "enable", "create-alias", "delete-alias",
        "schedule-deletion", "cancel-deletion", "import-key", "update-alias", "reseal",
    ]  # fmt: skip
    assert verify(keyring) == 0


def test_no_entry_has_key_material(keyring: Path, keyring_json: Command) -> None:
    """No change leaves key material in an entry, in any encoding."""
    keyring_json("rotate", "alias/a")
    keyring_json("create-key", "--description", "for tests")
    text = log_of(keyring).read_text()
    for key in opened(keyring).keys:
        for version in key.versions:
            for form in (
                version.material.hex(),
                base64.b64encode(version.material).decode(),
                repr(bytes(version.material)),
            ):
                assert form not in text
    assert (keyring.parent / "identity").read_text().split()[-1] not in text


def test_a_verb_that_only_reads_has_no_entry(keyring: Path, keyring_json: Command) -> None:
    """A change that was refused for its arguments has no entry either."""
    before = log_of(keyring).read_bytes()
    keyring_json("list")
    keyring_json("show", "alias/a")
    run("create-alias", keyring, "alias/a", "alias/a", "--unseal", keyring.parent / "identity", code=1)
    assert log_of(keyring).read_bytes() == before


def test_the_operator_is_named_as_far_as_it_is_known(keyring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program can set SUDO_UID, so its field is called a claim; a text that is not a number is left out."""
    monkeypatch.setenv("SUDO_UID", "1000")
    change(keyring, "rotate", "alias/a")
    entry = last(keyring)
    login = Path("/proc/self/loginuid")
    known = int(login.read_text()) if login.exists() else 2**32 - 1
    assert (entry["uid"], entry["claimed_sudo_uid"]) == (os.getuid(), 1000)
    assert entry["login_uid"] == (None if known == 2**32 - 1 else known)
    monkeypatch.setenv("SUDO_UID", "-1; rm")
    change(keyring, "rotate", "alias/a")
    assert last(keyring)["claimed_sudo_uid"] is None


def test_a_key_that_is_past_its_date_is_recorded_when_it_leaves(keyring: Path, keyring_json: Command) -> None:
    """The next change of any kind removes the key from the file."""
    key = keyring_json("show", "alias/a")["KeyMetadata"]["KeyId"]
    keyring_json("schedule-deletion", key, "--days", "7")
    rewritten(keyring, lambda raw: raw["Keys"][0].update(DeleteDate="2020-01-01T00:00:00Z"))
    keyring_json("create-key")
    changes = last(keyring)["changes"]
    assert {"key_id": key, "change": "removed"} in changes
    assert {"alias": "alias/a", "key_id": key, "change": "removed"} in changes


def test_the_log_has_the_mode_and_a_chain_of_its_own(keyring: Path) -> None:
    """The history has mode 0600, and its chain shows a changed line."""
    assert log_of(keyring).stat().st_mode & 0o777 == 0o600
    assert verify(keyring) == 0
    text = log_of(keyring).read_text()
    log_of(keyring).write_text(text.replace('"verb": "init"', '"verb": "list"'))
    assert verify(keyring) == 1
    assert main(["keyring", "history", str(keyring)]) == 1


@root()
def test_the_log_belongs_to_the_owner_of_the_keyring(shared_folder: Path) -> None:
    """The owner is the keyring's even if root makes the first change after an upgrade."""
    path = shared_folder / "keyring.age"
    run("init", path, "--new-identity", shared_folder / "identity")
    log_of(path).unlink()
    os.chown(path, OTHER_USER, OTHER_USER)
    change(path, "create-key")
    status = log_of(path).stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (OTHER_USER, OTHER_USER, 0o600)


def fill(keyring: Path, said: str) -> None:
    """Have writing to the log fail."""
    log_of(keyring).unlink()
    if said == "full":
        log_of(keyring).symlink_to("/dev/full")
    elif said == "folder":
        log_of(keyring).mkdir()
    elif said == "other":
        log_of(keyring).write_text("something else\n")
    else:
        log_of(keyring).touch()
        log_of(keyring).chmod(0o666)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("full", "No space left on device; the keyring was not changed"),
        ("folder", "Is a directory; the keyring was not changed"),
        ("other", "its last line is not an audit entry; name another file; the keyring was not changed"),
        ("open", "mode 0666: other users can write it; chmod go-w"),
    ],
)
@pytest.mark.usefixtures("quick_scrypt")
def test_a_change_whose_entry_cannot_be_written_is_refused(
    keyring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, why: str
) -> None:
    """The keyring is unchanged, nothing is left beside it, and no new passphrase was made."""
    fill(keyring, kind)
    before = keyring.read_bytes()
    capsys.readouterr()
    run("rotate", keyring, "alias/a", "--unseal", tmp_path / "identity", code=1)
    captured = capsys.readouterr()
    assert f"{log_of(keyring)}: {why}" in captured.err
    generated = ("--generate-passphrase", "--passphrase-file", tmp_path / "new")
    run("reseal", keyring, *generated, "--unseal", tmp_path / "identity", code=1)
    assert keyring.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["identity", "keyring.age", log_of(keyring).name]


def test_a_replacement_that_fails_has_an_entry(keyring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keyring is unchanged after a failed replacement."""
    before = keyring.read_bytes()

    def fail(*_arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        run("create-key", keyring, "--unseal", keyring.parent / "identity", code=1)
    assert keyring.read_bytes() == before
    assert [entry["result"] for entry in entries(keyring)[-2:]] == ["begun", "failed"]
    assert verify(keyring) == 0


CRASH = """
import os, signal, sys
from pathlib import Path
from keyferry_agent.keyring import changes, file, sealing
path, when = Path(sys.argv[1]), sys.argv[2]
real = os.replace
def replace(*arguments):
    if when == "after":
        real(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
with changes.attributed("crash"), file.change(path, sealing.Unsealer.read(path.parent / "identity")) as document:
    document.aliases["alias/crash"] = document.keys[0].key_id
"""


@pytest.mark.parametrize(("when", "result"), [("before", "not done"), ("after", "done")])
def test_a_crash_leaves_an_entry_whose_hashes_have_the_result(
    keyring: Path, capsys: pytest.CaptureFixture[str], when: str, result: str
) -> None:
    """`history` reads it from the file, and from the next entry after the next change."""
    ended = subprocess.run([sys.executable, "-c", CRASH, str(keyring), when], check=False, timeout=PATIENCE)
    assert ended.returncode == -9
    assert entries(keyring)[-1]["result"] == "begun"
    assert [(each["verb"], each["result"]) for each in history(keyring, capsys)][-1] == ("crash", result)
    assert ("alias/crash" in opened(keyring).aliases) == (when == "after")
    change(keyring, "rotate", "alias/a")
    assert [each["result"] for each in history(keyring, capsys)][-2:] == [result, "done"]
    assert verify(keyring) == 0


def test_history_names_a_file_that_was_replaced_by_hand(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A restored backup and a change with the age program are reported."""
    shutil.copy(keyring, keyring.parent / "backup.age")
    change(keyring, "rotate", "alias/a")
    shutil.copy(keyring.parent / "backup.age", keyring)
    assert history(keyring, capsys)[-1]["result"] == "replaced by other means than these commands"
    change(keyring, "disable", "alias/a")
    assert [each.get("verb") for each in history(keyring, capsys)] == ["init", "create-key", "rotate", None, "disable"]


def test_history_is_readable(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`history` needs no identity, and finds the log through a link to the keyring."""
    change(keyring, "disable", "alias/a")
    (keyring.parent / "link").symlink_to(keyring)
    capsys.readouterr()
    assert main(["keyring", "history", str(keyring.parent / "link")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].partition("  ")[2].startswith("disable: done; user ")
    assert lines[-1].endswith(": state from Enabled to Disabled")
    assert lines[-1].startswith("    key ")


def test_history_without_a_log_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A keyring of an older version has none."""
    assert main(["keyring", "history", str(tmp_path / "k.age")]) == 1
    assert f"{tmp_path / 'k.age.changes.jsonl'}: No such file or directory" in capsys.readouterr().err


def test_an_entry_of_many_changes_stays_short(keyring: Path) -> None:
    """An entry has the first changes and the number of the others."""
    with file.change(keyring, Unsealer.read(keyring.parent / "identity")) as document:
        for _ in range(100):
            create_key(document, key_spec="Aliyun_AES_256")
    entry = last(keyring)
    assert len(json.dumps(entry["changes"])) <= MAX_CHANGES_BYTES
    assert len(entry["changes"]) + entry["omitted_changes"] == 200
    assert max(map(len, log_of(keyring).read_text().splitlines())) < 4_096
