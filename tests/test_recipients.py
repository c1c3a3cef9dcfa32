"""Recipients of a keyring: one for each argument and line, and every one that is printed opens the file."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pyrage
import pytest
from support.agent import PATIENCE
from support.keyring import opened, run
from support.secrets import secret_file
from support.skip_unless import ROOT, program

from keyferry_agent.keyring import file, recipients, sealing
from keyferry_agent.keyring.document import Document, KeyringError
from keyferry_agent.keyring.sealing import Unsealer, count_recipients

TAG = "age1tag1qt8lw0ual6avlwmwatk888yqnmdamm7xfd0wak53ut6elz5c4swx2yqdj4e"
"""From pyrage's own tests."""
SSH = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAYOawz/bc+trOdz0aQqrIESC3DAJ75YAaOmefGzbtPx"
SSH_2 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILL5AIZcFXxC1kbBSJq2BJGT8sGfzDfxJDTRxLB9sAzb"


class Host(NamedTuple):
    """An age identity."""

    identity: str
    recipient: str


def host() -> Host:
    identity = pyrage.x25519.Identity.generate()
    return Host(str(identity), str(identity.to_public()))


ONE, TWO = host(), host()
SEVERAL = {
    "two SSH keys on two lines": f"{SSH} one\n{SSH_2} two",
    "an SSH key and an age key": f"{SSH} one\n{ONE.recipient}",
    "two age keys": f"{ONE.recipient}\n{TWO.recipient}",
    "two age keys with CRLF": f"{ONE.recipient}\r\n{TWO.recipient}\r\n",
    "two age keys on one line": f"{ONE.recipient} {TWO.recipient}",
    "two age keys and a comma": f"{ONE.recipient},{TWO.recipient}",
    "a second key as a comment": f"{SSH} {SSH_2}",
    "an age key as a comment": f"{SSH} one {ONE.recipient}",
    "a line of another separator": f"{SSH} one\u2028{SSH_2}",
    "a vertical tab": f"{SSH}\x0b{SSH_2}",
    "a carriage return": f"{SSH} one\r{SSH_2}",
    "a comment line": f"{SSH} one\n# offline",
    "a plugin's key as a comment": f"{SSH} age1yubikey1{'q' * 60}",
}


@pytest.mark.parametrize("text", SEVERAL.values(), ids=SEVERAL)
def test_two_recipients_in_one_argument_are_refused(
    keyring: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """The keyring is not written."""
    before = keyring.read_bytes()
    run("init", keyring.parent / "new.age", "--recipient", text, code=1)
    run("reseal", keyring, "--recipient", text, "--unseal", keyring.parent / "identity", code=1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("--recipients-file" in line for line in lines)
    assert keyring.read_bytes() == before
    assert not (keyring.parent / "new.age").exists()


@pytest.mark.parametrize("text", [f"{SSH} root@host # not age1", f" {SSH}  root\n", f"{SSH}\r\n", SSH])
def test_comment_after_an_ssh_key_is_accepted(tmp_path: Path, text: str) -> None:
    """Line ends and spaces around one recipient are accepted, too."""
    run("init", tmp_path / "k.age", "--recipient", text)
    assert count_recipients((tmp_path / "k.age").read_bytes()) == 1


def test_one_key_in_several_texts_is_one_recipient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Comments and case do not make another recipient."""
    secret_file(tmp_path / "r", f"{SSH} three\n{ONE.recipient}\n")
    texts = [f"{SSH} one", f"{SSH}  two", ONE.recipient, ONE.recipient.upper()]
    arguments = [word for text in texts for word in ("--recipient", text)]
    run("init", tmp_path / "k.age", *arguments, "-R", tmp_path / "r", "--json")
    assert json.loads(capsys.readouterr().out)["Recipients"] == [f"{SSH} one", ONE.recipient]
    assert count_recipients((tmp_path / "k.age").read_bytes()) == 2


def test_a_recipients_file_is_read_as_age_reads_it(tmp_path: Path) -> None:
    """One recipient on each line; comments, empty lines, CRLF and a missing last line end are fine."""
    secret_file(tmp_path / "r", f"# hosts\r\n\r\n{ONE.recipient}\r\n  # offline\n\n{SSH} offline")
    identity = secret_file(tmp_path / "one", ONE.identity)
    run("init", tmp_path / "k.age", "--recipients-file", tmp_path / "r", "--recipient", TWO.recipient)
    assert file.read(tmp_path / "k.age", Unsealer.read(identity)).recipients == [
        TWO.recipient,
        ONE.recipient,
        f"{SSH} offline",
    ]
    secret_file(tmp_path / "r2", TWO.recipient)
    run("reseal", tmp_path / "k.age", "-R", tmp_path / "r2", "-R", tmp_path / "r", "--unseal", identity)
    assert len(file.read(tmp_path / "k.age", Unsealer.read(identity)).recipients) == 3
    run("create-key", tmp_path / "k.age", "--unseal", identity)


def test_a_recipients_file_can_be_standard_input(tmp_path: Path) -> None:
    """Standard input may be given once, beside --recipient."""
    command = [sys.executable, "-m", "keyferry_agent", "keyring", "init", str(tmp_path / "k.age"), "-R", "-"]
    given = f"{ONE.recipient}\n# x\n{TWO.recipient}\n"
    ended = subprocess.run(
        [*command, "--json", "--recipient", SSH],
        input=given,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert json.loads(ended.stdout)["Recipients"] == [SSH, ONE.recipient, TWO.recipient]
    (tmp_path / "k.age").unlink()
    ended = subprocess.run(
        [*command, "-R", "-"], input=given, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert ended.returncode == 2
    ended = subprocess.run(
        [*command[:-1], "-"], input="", capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert ended.stderr == "keyferry-agent: standard input: contains no recipient; one on each line is expected\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "contains no recipient"),
        (b"# only\n\n", "contains no recipient"),
        (f"# a\n{ONE.recipient}\nage1x\n".encode(), "line 3: 'age1x' is not a recipient"),
        (f"{ONE.recipient} {TWO.recipient}".encode(), "line 1: "),
        (ONE.identity.encode(), "line 1: an identity was given as a recipient"),
        (f"\ufeff{ONE.recipient}".encode(), "byte order mark"),
        (ONE.recipient.encode("utf-16"), r"byte order mark \(UTF-16\)"),
        (b"\xc3\x28", "not text"),
        (b"#" * (1 << 20) + b"#", "longer than"),
        (b"ecdsa-sha2-nistp256 AAAAE2VjZHNh host", "line 1: .*ecdsa-sha2-nistp256"),
    ],
    ids=range(10),
)
def test_a_wrong_recipients_file_is_refused_by_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, why: str
) -> None:
    """No recipient is left out, and no identity is shown."""
    run("init", tmp_path / "k.age", "-R", secret_file(tmp_path / "r", content), code=1)
    said = capsys.readouterr().err
    assert re.search(f": {tmp_path / 'r'}.*{why}", said), said
    assert ONE.identity not in said
    assert not (tmp_path / "k.age").exists()


def test_a_recipients_file_that_others_can_write_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another user could add a recipient. Others may read it."""
    path = secret_file(tmp_path / "r", ONE.recipient)
    path.chmod(0o666)
    run("init", tmp_path / "k.age", "-R", path, code=1)
    assert "other users can write it" in capsys.readouterr().err
    run("init", tmp_path / "k.age", "-R", tmp_path / "none", code=1)
    assert "none: No such file" in capsys.readouterr().err
    path.chmod(0o644)
    run("init", tmp_path / "k.age", "-R", path)


@pytest.mark.parametrize(
    "arguments",
    [["--passphrase-file", "p"], ["--generate-passphrase"]],
)
def test_recipients_file_is_combined_with_recipients_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("init", tmp_path / "k.age", "-R", "r", *arguments)
    assert ended.value.code == 2
    assert "--recipients-file" in capsys.readouterr().err or "--generate" in arguments[0]


UNSUPPORTED = {
    f"age1pq1{'q' * 80}": "hybrid post-quantum recipient (age1pq1...)",
    f"age1tagpq1{'q' * 80}": "hybrid post-quantum recipient (age1tagpq1...)",
    f"age1yubikey1{'q' * 60}": "recipient of the age plugin 'yubikey'",
    f"AGE1SE1{'Q' * 60}": "recipient of the age plugin 'se'",
    "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTI host": "type ecdsa-sha2-nistp256",
    "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC host": "type sk-ssh-ed25519@openssh.com",
    "ssh-dss AAAAB3NzaC1kc3MAAACBAP host": "type ssh-dss",
}


@pytest.mark.parametrize(("text", "kind"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_a_recipient_of_another_kind_is_refused_by_name(text: str, kind: str) -> None:
    """The message has the supported kinds."""
    with pytest.raises(KeyringError, match=re.escape(kind)) as caught:
        recipients.parse(text)
    for supported in ("X25519", "ssh-ed25519", "ssh-rsa"):
        assert supported in str(caught.value)


def test_bytes_are_not_mistaken_for_a_plugins_name() -> None:
    """The escapes of such bytes once made the error longer than the limit."""
    with pytest.raises(KeyringError) as caught:
        recipients.parse("age1" + "\udcff" * 40 + "1" + "q" * 60)
    assert "plugin" not in str(caught.value).partition("supported are")[0]
    assert len(str(caught.value)) <= 400


@program("ssh-keygen", "openssh-client")
def test_an_rsa_key_of_an_unusual_size_is_refused(tmp_path: Path) -> None:
    """The age library seals to RSA keys of 2,048 bits or more."""
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "1024", "-N", "", "-f", tmp_path / "k"], check=True)
    with pytest.raises(KeyringError, match="RSA key is too short"):
        recipients.parse((tmp_path / "k.pub").read_text())


@pytest.mark.skipif(not hasattr(pyrage, "tag"), reason="needs pyrage 1.4 (pip install pyrage)")
def test_a_keyring_is_sealed_to_a_hardware_key_too(tmp_path: Path) -> None:
    """A recipient with age1tag1 counts like any other in later changes."""
    identity = secret_file(tmp_path / "identity", ONE.identity)
    run("init", tmp_path / "k.age", "--recipient", TAG, "--recipient", ONE.recipient)
    assert count_recipients((tmp_path / "k.age").read_bytes()) == 2
    run("create-key", tmp_path / "k.age", "--alias", "alias/a", "--unseal", identity)
    assert opened(tmp_path / "k.age").recipients == [TAG, ONE.recipient]


def test_older_pyrage_cannot_seal_to_a_hardware_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the version of pyrage that is needed."""
    monkeypatch.delattr(pyrage, "tag", raising=False)
    with pytest.raises(KeyringError, match=r"takes pyrage 1\.4"):
        recipients.parse(TAG)


def test_a_keyring_for_fewer_recipients_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipients in the sealed file are counted, independently of the library."""
    encrypt = pyrage.encrypt
    monkeypatch.setattr(pyrage, "encrypt", lambda payload, to: encrypt(payload, to[:1]))
    with pytest.raises(KeyringError, match="sealed to 1 of 2 recipients"):
        file.create(tmp_path / "k.age", Document([ONE.recipient, TWO.recipient]), None)
    assert not (tmp_path / "k.age").exists()

    def refuse(_payload: bytes, _to: object) -> bytes:
        raise pyrage.EncryptError("no")

    monkeypatch.setattr(pyrage, "encrypt", refuse)
    with pytest.raises(KeyringError, match="cannot seal to these recipients together"):
        sealing.seal(b"x", [ONE.recipient], None)


def test_keyring_with_two_recipients_in_one_name_needs_reseal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An earlier version wrote such a keyring, and sealed it to the first recipient only."""
    identity = secret_file(tmp_path / "identity", ONE.identity)
    key = pyrage.x25519.Recipient.from_str(ONE.recipient)
    document = Document([f"{ONE.recipient}\n{TWO.recipient}"])
    secret_file(tmp_path / "k.age", pyrage.encrypt(document.to_json(), [key]))
    run("create-key", tmp_path / "k.age", "--unseal", identity, code=1)
    assert "reseal" in capsys.readouterr().err
    run(
        "reseal",
        tmp_path / "k.age",
        "-R",
        secret_file(tmp_path / "r", f"{ONE.recipient}\n{TWO.recipient}"),
        "--unseal",
        identity,
    )
    run("create-key", tmp_path / "k.age", "--unseal", secret_file(tmp_path / "two", TWO.identity))


def test_the_completion_offers_recipients_files() -> None:
    """The completion covers both verbs that seal."""
    text = (ROOT / "agent" / "completions" / "keyferry-agent.bash").read_text()
    assert text.count("--recipients-file") >= 2
