"""The life of a key in its keyring: versions, states, deletion, and who can open the file."""

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
from support.keyring import Command, change, rewritten, run
from support.requires import program

from keyferry_agent.keyring import file
from keyferry_agent.keyring.document import Document
from keyferry_agent.keyring.sealing import Unsealer, seal

DONE = ""
FAILED = "Rejected.StateModifiedFailed"


def opened(keyring: Path) -> Document:
    """What the file says."""
    return file.read(keyring, Unsealer.read(keyring.parent / "identity"))


def versions(answer: Any) -> list[str]:
    """The IDs of a key's versions, the primary one marked by * and staged ones by +."""
    primary = answer["KeyMetadata"]["PrimaryKeyVersion"]
    return [
        version["KeyVersionId"] + ("*" if version["KeyVersionId"] == primary else "+" if version["Staged"] else "")
        for version in answer["KeyVersions"]["KeyVersion"]
    ]


def test_rotate_makes_a_new_primary_version_and_keeps_the_old(said: Command) -> None:
    """Its answer names the new one."""
    (first,) = versions(said("show", "alias/a"))
    rotated = said("rotate", "alias/a")
    second = rotated["KeyVersion"]["KeyVersionId"]
    assert versions(rotated) == versions(said("show", "alias/a")) == [first.removesuffix("*"), f"{second}*"]


def test_a_staged_version_is_primary_only_once_it_is_promoted(
    said: Command, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several may be staged; what was primary before, or is, cannot be promoted."""
    (first,) = versions(said("show", "alias/a"))
    staged = [said("rotate", "alias/a", "--stage")["KeyVersion"]["KeyVersionId"] for _ in range(2)]
    assert versions(said("show", "alias/a")) == [first, f"{staged[0]}+", f"{staged[1]}+"]
    promoted = said("promote", "alias/a", staged[1])
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


def test_each_version_has_material_of_its_own(said: Command, keyring: Path) -> None:
    """Fresh, and of the key's size."""
    said("create-key", "--key-spec", "Aliyun_SM4", "--alias", "alias/sm4")
    for alias in ("alias/a", "alias/sm4"):
        said("rotate", alias)
        said("rotate", alias, "--stage")
    document = opened(keyring)
    assert [[len(version.material) for version in key.versions] for key in document.keys] == [[32] * 3, [16] * 3]
    assert len({bytes(version.material) for key in document.keys for version in key.versions}) == 6


@pytest.mark.parametrize(("size", "spec"), [(32, "Aliyun_AES_256"), (16, "Aliyun_SM4")])
@pytest.mark.parametrize("by_name", [True, False])
def test_imported_material_is_the_keys_first_version(
    said: Command, keyring: Path, size: int, spec: str, by_name: bool
) -> None:
    """From a file; its length says which kind of key it is."""
    (keyring.parent / "material").write_bytes(bytes(range(size)))
    more = ("--key-spec", spec) if by_name else ()
    arguments = ("--material", keyring.parent / "material", "--alias", "alias/mine", "--description", "from afar")
    made = said("import-key", *arguments, *more)["KeyMetadata"]
    assert (made["KeySpec"], made["Origin"], made["KeyState"]) == (spec, "EXTERNAL", "Enabled")
    assert (made["Aliases"], made["Description"]) == (["alias/mine"], "from afar")
    (version,) = opened(keyring).find("alias/mine").versions
    assert bytes(version.material) == bytes(range(size))


def test_material_comes_from_standard_input_too(keyring: Path) -> None:
    """So that it need never be a file; and it is not printed."""
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
def test_material_that_is_no_key_is_refused(
    keyring: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, more: tuple[str, ...], why: str
) -> None:
    """Hex, a trailing newline, another length: by its size, never by its content."""
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
def test_a_keys_state_says_what_can_be_done_with_it(
    keyring: Path,
    capsys: pytest.CaptureFixture[str],
    state: str,
    verb: str,
    arguments: tuple[str, ...],
    code: str,
    after: str,
) -> None:
    """As the cloud's table."""
    date = "9999-01-01T00:00:00Z" if state == "PendingDeletion" else ""
    rewritten(keyring, lambda raw: raw["Keys"][0].update(KeyState=state, DeleteDate=date))
    run(verb, keyring, "alias/a", *arguments, "--unseal", keyring.parent / "identity", code=1 if code else 0)
    assert code in capsys.readouterr().err
    assert opened(keyring).find("alias/a").state == (after or state)
    assert bool(opened(keyring).find("alias/a").delete_date) == ((after or state) == "PendingDeletion")


@pytest.mark.parametrize(("verb", "code"), [("create-alias", FAILED), ("update-alias", "Rejected.PendingDeletion")])
def test_a_key_that_is_about_to_be_deleted_takes_no_alias(
    keyring: Path, capsys: pytest.CaptureFixture[str], verb: str, code: str
) -> None:
    """Its own it keeps, and may lose."""
    change(keyring, "create-key", "--alias", "alias/b")
    change(keyring, "schedule-deletion", "alias/a", "--days", "7")
    name = "alias/new" if verb == "create-alias" else "alias/b"
    run(verb, keyring, name, "alias/a", "--unseal", keyring.parent / "identity", code=1)
    assert code in capsys.readouterr().err
    change(keyring, "delete-alias", "alias/a")


def test_the_deletion_date_is_as_many_days_away_as_was_said(said: Command) -> None:
    """To the second."""
    before = time.time()
    date = said("schedule-deletion", "alias/a", "--days", "30")["KeyMetadata"]["DeleteDate"]
    then = time.mktime(time.strptime(date, "%Y-%m-%dT%H:%M:%SZ")) - time.timezone
    assert before - 1 <= then - 30 * 86_400 <= time.time()


def test_a_key_past_its_date_is_gone_from_the_file_at_the_next_write(said: Command, keyring: Path) -> None:
    """With its material, its versions and its aliases; nothing sees it even before."""
    kept = said("create-key", "--alias", "alias/kept")["KeyMetadata"]["KeyId"]
    past = {"KeyState": "PendingDeletion", "DeleteDate": "2020-01-01T00:00:00Z"}
    rewritten(keyring, lambda raw: raw["Keys"][0].update(past))
    assert [key["KeyId"] for key in said("list")["Keys"]["Key"]] == [kept]
    run("cancel-deletion", keyring, "alias/a", "--unseal", keyring.parent / "identity", code=1)
    unsealer = Unsealer.read(keyring.parent / "identity")
    assert len(json.loads(unsealer.unseal(keyring.read_bytes()))["Keys"]) == 2
    said("create-alias", "alias/other", "alias/kept")
    left = json.loads(unsealer.unseal(keyring.read_bytes()))
    assert [key["KeyId"] for key in left["Keys"]] == [kept]
    assert left["Aliases"] == {"alias/kept": kept, "alias/other": kept}


@program("ssh-keygen", "openssh-client")
def test_three_hosts_open_one_file_and_reseal_removes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two age identities and an SSH key; each can change it for all."""
    path = tmp_path / "k.age"
    recipients = []
    for name in ("one", "two"):
        run("init", tmp_path / f"{name}.age", "--new-identity", tmp_path / name)
        recipients += ["--recipient", (tmp_path / name).read_text().split()[3]]
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "three"], check=True)
    recipients += ["--recipient", (tmp_path / "three.pub").read_text().strip()]
    run("init", path, *recipients)
    hosts = [tmp_path / name for name in ("one", "two", "three")]
    for number, host in enumerate(hosts):
        run("create-key", path, "--alias", f"alias/{number}", "--unseal", host)
    for host in hosts:
        assert set(file.read(path, Unsealer.read(host)).aliases) == {"alias/0", "alias/1", "alias/2"}
    run("reseal", path, *recipients[:2], *recipients[4:], "--unseal", hosts[0])
    run("list", path, "--unseal", hosts[1], code=1)
    assert "does not open" in capsys.readouterr().err
    run("create-key", path, "--unseal", hosts[2])
    assert len(file.read(path, Unsealer.read(hosts[0])).keys) == 4


def test_reseal_goes_from_recipients_to_a_passphrase_and_back(keyring: Path, tmp_path: Path) -> None:
    """And later changes keep what it was sealed to."""
    (tmp_path / "pass").write_text("correct horse\n")
    recipient = (tmp_path / "identity").read_text().split()[3]
    run("reseal", keyring, "--passphrase-file", tmp_path / "pass", "--unseal", tmp_path / "identity")
    run("list", keyring, "--unseal", tmp_path / "identity", code=1)
    run("create-key", keyring, "--alias", "alias/b", "--unseal", tmp_path / "pass")
    run("reseal", keyring, "--recipient", recipient, "--unseal", tmp_path / "pass")
    assert set(opened(keyring).aliases) == {"alias/a", "alias/b"}


@program("age", "age")
def test_a_file_that_the_age_program_sealed_anew_opens_and_is_not_sealed_away_from_whoever_has_it(
    keyring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change would seal to the recipients that the content names: it says so, and reseal is the way on."""
    run("init", tmp_path / "other.age", "--new-identity", tmp_path / "other")
    recipient = (tmp_path / "other").read_text().split()[3]
    plain = subprocess.run(["age", "-d", "-i", tmp_path / "identity", keyring], capture_output=True, check=True).stdout
    subprocess.run(["age", "-r", recipient, "-o", keyring, "-"], input=plain, check=True)
    run("list", keyring, "--unseal", tmp_path / "other")
    before = keyring.read_bytes()
    run("create-key", keyring, "--unseal", tmp_path / "other", code=1)
    assert "reseal" in capsys.readouterr().err
    assert keyring.read_bytes() == before
    run("reseal", keyring, "--recipient", recipient, "--unseal", tmp_path / "other")
    run("create-key", keyring, "--unseal", tmp_path / "other")


@program("age", "age")
def test_a_host_that_was_added_by_hand_is_not_shut_out_by_the_next_change(
    keyring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is sealed to one more than its content names: the change is refused, and reseal is the way on."""
    run("init", tmp_path / "other.age", "--new-identity", tmp_path / "other")
    both = [(tmp_path / name).read_text().split()[3] for name in ("identity", "other")]
    plain = subprocess.run(["age", "-d", "-i", tmp_path / "identity", keyring], capture_output=True, check=True).stdout
    subprocess.run(["age", "-r", both[0], "-r", both[1], "-o", keyring, "-"], input=plain, check=True)
    run("create-key", keyring, "--unseal", tmp_path / "identity", code=1)
    assert "shut out" in capsys.readouterr().err
    run("reseal", keyring, "--recipient", both[0], "--recipient", both[1], "--unseal", tmp_path / "identity")
    run("create-key", keyring, "--unseal", tmp_path / "identity")
    run("list", keyring, "--unseal", tmp_path / "other")


@pytest.mark.parametrize("secret", ["AGE-SECRET-KEY-1QQQQ", "-----BEGIN OPENSSH PRIVATE KEY-----\nabc"])
def test_an_identity_that_is_given_as_a_recipient_is_not_shown(
    keyring: Path, capsys: pytest.CaptureFixture[str], secret: str
) -> None:
    """It opens everything; what is printed may be logged."""
    run("reseal", keyring, "--recipient", secret, "--unseal", keyring.parent / "identity", code=1)
    said = capsys.readouterr().err
    assert "identity" in said
    assert "QQQQ" not in said
    assert "abc" not in said


def test_what_is_no_file_is_not_read(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe that nobody writes would be waited for, and a device has no end."""
    fifo, identity = keyring.parent / "fifo", keyring.parent / "identity"
    os.mkfifo(fifo)
    for path, unseal, why in (
        (fifo, identity, "not a regular file"),
        (Path("/dev/zero"), identity, "not a regular file"),
        (keyring, Path("/dev/zero"), "longer than"),
    ):
        run("list", path, "--unseal", unseal, code=1)
        assert why in capsys.readouterr().err
    run("import-key", keyring, "--material", "/dev/zero", "--unseal", identity, code=1)
    assert "more than 64 bytes" in capsys.readouterr().err


def test_a_change_that_cannot_be_printed_is_made_all_the_same(keyring: Path) -> None:
    """Its exit code is another than that of a change that was not made."""
    command = [sys.executable, "-m", "keyferry_agent", "keyring", "rotate", str(keyring), "alias/a"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*command, "--unseal", str(keyring.parent / "identity")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert ended.returncode == 74
    assert ended.stderr == "keyferry-agent: standard output: No space left on device\n"
    assert len(opened(keyring).find("alias/a").versions) == 2


def test_a_recipient_that_is_named_twice_is_one(keyring: Path) -> None:
    """So that the number of them is that of the file."""
    recipient = (keyring.parent / "identity").read_text().split()[3]
    run("reseal", keyring, "--recipient", recipient, "--recipient", recipient, "--unseal", keyring.parent / "identity")
    assert opened(keyring).recipients == [recipient]
    change(keyring, "create-key")


def test_a_keyring_that_names_no_recipients_and_has_no_passphrase_says_reseal(
    keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that names recipients, opened by a passphrase, does too."""
    recipients = opened(keyring).recipients
    raw = json.loads(Unsealer.read(keyring.parent / "identity").unseal(keyring.read_bytes()))
    keyring.write_bytes(seal(json.dumps({**raw, "Recipients": []}).encode(), recipients, None))
    run("create-key", keyring, "--unseal", keyring.parent / "identity", code=1)
    assert "reseal" in capsys.readouterr().err
    (keyring.parent / "pass").write_text("correct horse\n")
    keyring.write_bytes(seal(json.dumps(raw).encode(), [], "correct horse"))
    run("create-key", keyring, "--unseal", keyring.parent / "pass", code=1)
    assert "reseal" in capsys.readouterr().err


# Runs one verb, and is killed when the line counter of keyring/file.py reaches a number; without it, counts them.
KILLED_AT_A_LINE = """
import os, signal, sys
from keyferry_agent.command import main
from keyferry_agent.keyring import file

def child(at, arguments):
    count = 0
    def line(frame, event, argument):
        nonlocal count
        count += event == "line"
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return line
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename == file.__file__ else None)
    code = main(arguments)
    sys.settrace(None)
    os._exit(code)

for request in sys.stdin:
    at, *arguments = request.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid == 0:
        child(int(at), arguments)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_killed_at_any_step_the_file_is_the_old_one_or_the_new_one(keyring: Path) -> None:
    """At every line of the code that changes it; and the next change finds nothing in its way."""
    identity = keyring.parent / "identity"
    arguments = ["keyring", "create-key", str(keyring), "--unseal", str(identity), "--alias"]
    killed = old = new = 0
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_AT_A_LINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as runner:
        assert runner.stdin is not None
        assert runner.stdout is not None
        for at in range(1, 1_000):
            before = set(opened(keyring).aliases)
            runner.stdin.write("\t".join([str(at), *arguments, f"alias/n{at}"]) + "\n")
            runner.stdin.flush()
            code = int(runner.stdout.readline())
            after = set(opened(keyring).aliases)
            assert after in (before, before | {f"alias/n{at}"})
            assert keyring.stat().st_mode & 0o777 == 0o600
            killed += code == -9
            old += after == before
            new += code == -9 and after != before
            if code == 0:
                break
        runner.stdin.close()
    assert code == 0
    assert killed > 30
    assert old > 20
    assert new > 1
    assert sorted(path.name for path in keyring.parent.iterdir()) == ["identity", "keyring.age"]
    assert f"alias/n{at}" in opened(keyring).aliases
