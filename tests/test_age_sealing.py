"""The recipients of a keyring, and the remains of an interrupted change."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.agent import PATIENCE
from support.keyring import change, opened, run
from support.secrets import secret_file
from support.skip_unless import program

from keyferry_agent.cli.main import main
from keyferry_agent.keyring import file
from keyferry_agent.keyring.changes import log_of
from keyferry_agent.keyring.sealing import Unsealer, seal


@program("ssh-keygen", "openssh-client")
def test_three_hosts_open_one_file_and_reseal_removes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two age identities and an SSH key open one keyring, and a change by each is for all."""
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


@pytest.mark.usefixtures("quick_scrypt")
def test_reseal_goes_from_recipients_to_a_passphrase_and_back(keyring: Path, tmp_path: Path) -> None:
    """Changes after a reseal keep its recipients or its passphrase."""
    secret_file(tmp_path / "pass", "correct horse\n")
    recipient = (tmp_path / "identity").read_text().split()[3]
    run("reseal", keyring, "--passphrase-file", tmp_path / "pass", "--unseal", tmp_path / "identity", "--yes")
    run("list", keyring, "--unseal", tmp_path / "identity", code=1)
    run("create-key", keyring, "--alias", "alias/b", "--unseal", tmp_path / "pass")
    run("reseal", keyring, "--recipient", recipient, "--unseal", tmp_path / "pass", "--yes")
    assert set(opened(keyring).aliases) == {"alias/a", "alias/b"}


@program("age", "age")
def test_file_sealed_by_the_age_program_is_not_changed_silently(
    keyring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change would seal to the recipients in the content, so it is refused, and its message advises reseal."""
    run("init", tmp_path / "other.age", "--new-identity", tmp_path / "other")
    recipient = (tmp_path / "other").read_text().split()[3]
    plain = subprocess.run(["age", "-d", "-i", tmp_path / "identity", keyring], capture_output=True, check=True).stdout
    subprocess.run(["age", "-r", recipient, "-o", keyring, "-"], input=plain, check=True)
    run("list", keyring, "--unseal", tmp_path / "other")
    before = keyring.read_bytes()
    run("create-key", keyring, "--unseal", tmp_path / "other", code=1)
    assert "reseal" in capsys.readouterr().err
    assert keyring.read_bytes() == before
    run("reseal", keyring, "--recipient", recipient, "--unseal", tmp_path / "other", "--yes")
    run("create-key", keyring, "--unseal", tmp_path / "other")


@program("age", "age")
def test_host_added_by_hand_is_not_locked_out_by_a_change(
    keyring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A keyring with one recipient more than its content names is not changed; the message advises reseal."""
    run("init", tmp_path / "other.age", "--new-identity", tmp_path / "other")
    both = [(tmp_path / name).read_text().split()[3] for name in ("identity", "other")]
    plain = subprocess.run(["age", "-d", "-i", tmp_path / "identity", keyring], capture_output=True, check=True).stdout
    subprocess.run(["age", "-r", both[0], "-r", both[1], "-o", keyring, "-"], input=plain, check=True)
    run("create-key", keyring, "--unseal", tmp_path / "identity", code=1)
    assert "lock some of them out" in capsys.readouterr().err
    run("reseal", keyring, "--recipient", both[0], "--recipient", both[1], "--unseal", tmp_path / "identity")
    run("create-key", keyring, "--unseal", tmp_path / "identity")
    run("list", keyring, "--unseal", tmp_path / "other")


@pytest.mark.parametrize("secret", ["AGE-SECRET-KEY-1QQQQ", "-----BEGIN OPENSSH PRIVATE KEY-----\nabc"])
def test_identity_in_place_of_a_recipient_is_not_shown(
    keyring: Path, capsys: pytest.CaptureFixture[str], secret: str
) -> None:
    """An identity opens everything, and printed messages may be logged."""
    run("reseal", keyring, "--recipient", secret, "--unseal", keyring.parent / "identity", code=1)
    said = capsys.readouterr().err
    assert "identity" in said
    assert "QQQQ" not in said
    assert "abc" not in said


def test_a_recipient_that_is_not_text_is_refused(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipient in bytes that are not UTF-8 is refused like any invalid recipient."""
    run("reseal", keyring, "--recipient", "age1\udcff", "--unseal", keyring.parent / "identity", code=1)
    assert "is not a recipient" in capsys.readouterr().err


def test_paths_that_are_not_files_are_not_read(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading a pipe without a writer would block, and a device has no end."""
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


def test_change_is_kept_if_its_result_cannot_be_printed(keyring: Path) -> None:
    """The exit code differs from the one of a change that failed."""
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


def test_recipient_named_twice_counts_once(keyring: Path) -> None:
    """Duplicates are removed, so the number of recipients is that of the file."""
    recipient = (keyring.parent / "identity").read_text().split()[3]
    twice = ["--recipient", recipient, "--recipient", recipient]
    run("reseal", keyring, *twice, "--unseal", keyring.parent / "identity", "--yes")
    assert opened(keyring).recipients == [recipient]
    change(keyring, "create-key")


@pytest.mark.usefixtures("quick_scrypt")
def test_keyring_without_recipients_or_passphrase_says_reseal(
    keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that names recipients, opened by a passphrase, does too."""
    recipients = opened(keyring).recipients
    raw = json.loads(Unsealer.read(keyring.parent / "identity").unseal(keyring.read_bytes()))
    keyring.write_bytes(seal(json.dumps({**raw, "Recipients": []}).encode(), recipients, None))
    run("create-key", keyring, "--unseal", keyring.parent / "identity", code=1)
    assert "reseal" in capsys.readouterr().err
    secret_file(keyring.parent / "pass", "correct horse\n")
    keyring.write_bytes(seal(json.dumps(raw).encode(), [], "correct horse"))
    run("create-key", keyring, "--unseal", keyring.parent / "pass", code=1)
    assert "reseal" in capsys.readouterr().err


# Runs one verb, and is killed when the line counter of keyring/file.py reaches a number; without it, counts them.
KILLED_AT_A_LINE = """
import os, signal, sys
from keyferry_agent.cli.main import main
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


def test_kill_at_any_step_leaves_the_old_file_or_the_new_one(keyring: Path) -> None:
    """A command that is killed at any line of the change leaves a whole file, and the next change succeeds."""
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
    assert sorted(path.name for path in keyring.parent.iterdir()) == [
        "identity",
        "keyring.age",
        "keyring.age.changes.jsonl",
    ]
    assert main(["audit", "verify", str(log_of(keyring))]) == 0
    assert f"alias/n{at}" in opened(keyring).aliases
