"""The life of a key in its keyring: versions, material, states, deletion."""

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.agent import PATIENCE
from support.keyring import Command, change, opened, rewritten, run

from keyferry_agent.keyring.sealing import Unsealer

DONE = ""
FAILED = "Rejected.StateModifiedFailed"


def versions(answer: Any) -> list[str]:
    """The IDs of a key's versions, the primary one marked by * and staged ones by +."""
    primary = answer["KeyMetadata"]["PrimaryKeyVersion"]
    return [
        version["KeyVersionId"] + ("*" if version["KeyVersionId"] == primary else "+" if version["Staged"] else "")
        for version in answer["KeyVersions"]["KeyVersion"]
    ]


def test_rotate_makes_a_new_primary_version_and_keeps_the_old(keyring_json: Command) -> None:
    """The output of `rotate` names the new version."""
    (first,) = versions(keyring_json("show", "alias/a"))
    rotated = keyring_json("rotate", "alias/a")
    second = rotated["KeyVersion"]["KeyVersionId"]
    assert versions(rotated) == versions(keyring_json("show", "alias/a")) == [first.removesuffix("*"), f"{second}*"]


def test_a_staged_version_is_primary_only_once_it_is_promoted(
    keyring_json: Command, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several versions may be staged; a present or former primary version cannot be promoted."""
    (first,) = versions(keyring_json("show", "alias/a"))
    staged = [keyring_json("rotate", "alias/a", "--stage")["KeyVersion"]["KeyVersionId"] for _ in range(2)]
    assert versions(keyring_json("show", "alias/a")) == [first, f"{staged[0]}+", f"{staged[1]}+"]
    promoted = keyring_json("promote", "alias/a", staged[1])
    assert versions(promoted) == [first.removesuffix("*"), f"{staged[0]}+", f"{staged[1]}*"]
    before = keyring.read_bytes()
    for version, why in (
        (staged[1], "primary version already"),
        (first.removesuffix("*"), "was primary before"),
        ("nonsense", "Forbidden.KeyVersionNotFound"),
    ):
        run("promote", keyring, "alias/a", version, "--unseal", keyring.parent / "identity", code=1)
        assert why in capsys.readouterr().err
    assert keyring.read_bytes() == before


def test_each_version_has_material_of_its_own(keyring_json: Command, keyring: Path) -> None:
    """The material is fresh, and of the key's size."""
    keyring_json("create-key", "--key-spec", "Aliyun_SM4", "--alias", "alias/sm4")
    for alias in ("alias/a", "alias/sm4"):
        keyring_json("rotate", alias)
        keyring_json("rotate", alias, "--stage")
    document = opened(keyring)
    assert [[len(version.material) for version in key.versions] for key in document.keys] == [[32] * 3, [16] * 3]
    assert len({bytes(version.material) for key in document.keys for version in key.versions}) == 6


@pytest.mark.parametrize(("size", "spec"), [(32, "Aliyun_AES_256"), (16, "Aliyun_SM4")])
@pytest.mark.parametrize("by_name", [True, False])
def test_imported_material_is_the_keys_first_version(
    keyring_json: Command, keyring: Path, size: int, spec: str, by_name: bool
) -> None:
    """The length of the material decides the key spec."""
    (keyring.parent / "material").write_bytes(bytes(range(size)))
    more = ("--key-spec", spec) if by_name else ()
    arguments = ("--material", keyring.parent / "material", "--alias", "alias/mine", "--description", "from afar")
    made = keyring_json("import-key", *arguments, *more)["KeyMetadata"]
    assert (made["KeySpec"], made["Origin"], made["KeyState"]) == (spec, "EXTERNAL", "Enabled")
    assert (made["Aliases"], made["Description"]) == (["alias/mine"], "from afar")
    (version,) = opened(keyring).find("alias/mine").versions
    assert bytes(version.material) == bytes(range(size))


def test_material_comes_from_standard_input_too(keyring: Path) -> None:
    """Material on standard input need never be in a file, and is not printed."""
    command = [
        sys.executable,
        "-m",
        "keyferry_agent",
        "keyring",
        "import-key",
        str(keyring),
        "--material",
        "-",
        "--json",
    ]
    material = os.urandom(32)
    ended = subprocess.run(
        [*command, "--unseal", str(keyring.parent / "identity")],
        input=material,
        capture_output=True,
        check=True,
        timeout=PATIENCE,
    )
    made = json.loads(ended.stdout)["KeyMetadata"]["KeyId"]
    assert bytes(opened(keyring).find(made).versions[0].material) == material
    assert base64.b64encode(material) not in ended.stdout


@pytest.mark.parametrize(
    ("content", "more", "why"),
    [
        (b"x" * 31, (), "31 bytes"),
        (b"x" * 33, (), "33 bytes"),
        (b"", (), "0 bytes"),
        (b"a" * 64, (), "raw bytes"),
        (b"x" * 16, ("--key-spec", "Aliyun_AES_256"), "32"),
        (b"x" * 32, ("--key-spec", "Aliyun_SM4"), "16"),
        (b"x" * 32, ("--alias", "alias/a"), "exists already"),
        (None, (), "No such file"),
    ],
)
def test_invalid_material_is_refused(
    keyring: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, more: tuple[str, ...], why: str
) -> None:
    """The message has the size of hex, a trailing newline or another wrong length, and no content."""
    path = keyring.parent / "material"
    if content is not None:
        path.write_bytes(content)
    before = keyring.read_bytes()
    identity = keyring.parent / "identity"
    run("import-key", keyring, "--material", path, *more, "--unseal", identity, code=1)
    assert why in capsys.readouterr().err
    assert keyring.read_bytes() == before


@pytest.mark.parametrize(
    ("state", "verb", "arguments", "code", "after"),
    [
        ("Enabled", "enable", (), DONE, "Enabled"),
        ("Disabled", "enable", (), DONE, "Enabled"),
        ("PendingDeletion", "enable", (), FAILED, ""),
        ("PendingImport", "enable", (), FAILED, ""),
        ("Enabled", "disable", (), DONE, "Disabled"),
        ("Disabled", "disable", (), DONE, "Disabled"),
        ("PendingDeletion", "disable", (), FAILED, ""),
        ("PendingImport", "disable", (), FAILED, ""),
        ("Enabled", "schedule-deletion", ("--days", "7"), DONE, "PendingDeletion"),
        ("Disabled", "schedule-deletion", ("--days", "366"), DONE, "PendingDeletion"),
        ("PendingImport", "schedule-deletion", ("--days", "30"), DONE, "PendingDeletion"),
        ("PendingDeletion", "schedule-deletion", ("--days", "7"), FAILED, ""),
        ("Enabled", "schedule-deletion", ("--days", "6"), "7 to 366", ""),
        ("Enabled", "schedule-deletion", ("--days", "367"), "7 to 366", ""),
        ("Enabled", "cancel-deletion", (), FAILED, ""),
        ("Disabled", "cancel-deletion", (), FAILED, ""),
        ("PendingImport", "cancel-deletion", (), FAILED, ""),
        ("PendingDeletion", "cancel-deletion", (), DONE, "Enabled"),
        ("Enabled", "rotate", (), DONE, "Enabled"),
        ("Disabled", "rotate", (), "Rejected.Disabled", ""),
        ("PendingDeletion", "rotate", ("--stage",), "Rejected.PendingDeletion", ""),
        ("PendingImport", "rotate", (), "Rejected.PendingImport", ""),
    ],
)
def test_key_state_decides_the_allowed_changes(
    keyring: Path,
    capsys: pytest.CaptureFixture[str],
    state: str,
    verb: str,
    arguments: tuple[str, ...],
    code: str,
    after: str,
) -> None:
    """The table of states is the cloud's."""
    date = "9999-01-01T00:00:00Z" if state == "PendingDeletion" else ""
    rewritten(keyring, lambda raw: raw["Keys"][0].update(KeyState=state, DeleteDate=date))
    run(verb, keyring, "alias/a", *arguments, "--unseal", keyring.parent / "identity", code=1 if code else 0)
    assert code in capsys.readouterr().err
    assert opened(keyring).find("alias/a").state == (after or state)
    assert bool(opened(keyring).find("alias/a").delete_date) == ((after or state) == "PendingDeletion")


@pytest.mark.parametrize(("verb", "code"), [("create-alias", FAILED), ("update-alias", "Rejected.PendingDeletion")])
def test_key_in_pending_deletion_gets_no_new_alias(
    keyring: Path, capsys: pytest.CaptureFixture[str], verb: str, code: str
) -> None:
    """The key keeps its aliases, and an alias can be deleted."""
    change(keyring, "create-key", "--alias", "alias/b")
    change(keyring, "schedule-deletion", "alias/a", "--days", "7")
    name = "alias/new" if verb == "create-alias" else "alias/b"
    run(verb, keyring, name, "alias/a", "--unseal", keyring.parent / "identity", code=1)
    assert code in capsys.readouterr().err
    change(keyring, "delete-alias", "alias/a")


def test_deletion_date_is_exactly_the_given_days_away(keyring_json: Command) -> None:
    """The date is exact to the second."""
    before = time.time()
    date = keyring_json("schedule-deletion", "alias/a", "--days", "30")["KeyMetadata"]["DeleteDate"]
    then = time.mktime(time.strptime(date, "%Y-%m-%dT%H:%M:%SZ")) - time.timezone
    assert before - 1 <= then - 30 * 86_400 <= time.time()


def test_next_write_removes_keys_past_their_date(keyring_json: Command, keyring: Path) -> None:
    """Material, versions and aliases are removed; before that write the key is already hidden."""
    kept = keyring_json("create-key", "--alias", "alias/kept")["KeyMetadata"]["KeyId"]
    past = {"KeyState": "PendingDeletion", "DeleteDate": "2020-01-01T00:00:00Z"}
    rewritten(keyring, lambda raw: raw["Keys"][0].update(past))
    assert [key["KeyId"] for key in keyring_json("list")["Keys"]["Key"]] == [kept]
    run("cancel-deletion", keyring, "alias/a", "--unseal", keyring.parent / "identity", code=1)
    unsealer = Unsealer.read(keyring.parent / "identity")
    assert len(json.loads(unsealer.unseal(keyring.read_bytes()))["Keys"]) == 2
    keyring_json("create-alias", "alias/other", "alias/kept")
    left = json.loads(unsealer.unseal(keyring.read_bytes()))
    assert [key["KeyId"] for key in left["Keys"]] == [kept]
    assert left["Aliases"] == {"alias/kept": kept, "alias/other": kept}
