"""Standard streams that are closed, full, ended, or of another encoding: exit codes report the finished work."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.agent import PATIENCE, RunningAgent
from support.keyring import change, configuration
from support.keys import rsa_private_key
from support.quick_scrypt import QUICK_CLIENT
from support.secrets import secret_file

from keyferry import command, guard, stdout, streams
from keyferry_agent.keyring.sealing import Identity

AGENT, CLIENT = "keyferry_agent", "keyferry"
COMMANDS: dict[str, tuple[str, ...]] = {
    "version": (CLIENT, "--version"),
    "help": (CLIENT, "call", "Encrypt", "--help"),
    "version of the agent": (AGENT, "--version"),
    "help of the agent": (AGENT, "keyring", "--help"),
    "status": (CLIENT, "status"),
    "call": (CLIENT, "call", "DescribeKey", "--KeyId", "alias/dev"),
    "records add": (CLIENT, "records", "add", "new{}", "--KeyId", "alias/dev"),
    "records list": (CLIENT, "records", "list"),
    "records list --json": (CLIENT, "records", "list", "--json"),
    "records show": (CLIENT, "records", "show", "a"),
    "records rewrap": (CLIENT, "records", "rewrap"),
    "module init": (CLIENT, "module", "init", "module{}", "--passphrase-file", "passphrase", "--key-spec", "EC_SM2"),
    "check": (AGENT, "check", "agent.toml"),
    "fingerprint": (AGENT, "fingerprint", "public.pem"),
    "explain": (
        AGENT,
        "explain",
        "--config",
        "agent.toml",
        "--uid",
        "0",
        "--action",
        "kms:Encrypt",
        "--key",
        "alias/a",
    ),
    "keyring init": (AGENT, "keyring", "init", "new{}.age", "--new-identity", "new{}.identity", "-R", "recipients"),
    "keyring list": (AGENT, "keyring", "list", "keyring.age", "--unseal", "identity"),
    "keyring show --json": (AGENT, "keyring", "show", "keyring.age", "alias/a", "--json", "--unseal", "identity"),
}
WAYS = {
    ">&-": 74,
    "2>&-": 0,
    "<&-": 0,
    "<&- >&- 2>&-": 74,
    ">/dev/full": 74,
    "2>/dev/full": 0,
    ">/dev/full 2>&1": 74,
    "| true": 74,
    "2>&1 | true": 74,
}
"""What a shell does with the streams of a command that does its work, and the exit code that follows."""
THOROUGH = ("call", "records list", "module init", "keyring list")
"""Commands that meet every way: one of each kind. The others share their code, and meet all of them in .ci/run."""
FEWER_WAYS = ("<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "2>&1 | true")


@pytest.fixture
def place(agent: RunningAgent, keyring: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one file of each kind, whose contents have characters that are not ASCII."""
    folder = keyring.parent
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KEYFERRY_SOCKET", str(agent.socket))
    monkeypatch.setenv("KEYFERRY_STORE", f"sqlite:///{folder / 'records.sqlite'}")
    (folder / "agent.toml").write_text(configuration(keyring, to="uid = 0", more=f'socket = "{folder / "s"}"'))
    (folder / "recipients").write_text(Identity().recipient)
    secret_file(folder / "passphrase", "correct horse battery")
    public = rsa_private_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)
    change(keyring, "create-key", "--alias", "alias/b", "--description", "é名")
    assert command.main(["records", "add", "a", "--KeyId", "alias/dev", "--EncryptionContext", '{"é": "名"}']) == 0
    return folder


def shell(words: Sequence[str], redirection: str = "", **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a command in a shell that closes or redirects its streams; return the exit code of the command itself."""
    script = f'set -o pipefail; "$@" {redirection}'
    program = QUICK_CLIENT if words[0] == CLIENT else (sys.executable, "-m", words[0])
    arguments = [*program, *words[1:]]
    return subprocess.run(
        ["bash", "-c", script, "bash", *arguments],
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_survives_closed_full_and_ended_streams(place: Path, name: str) -> None:
    """Work that was done is never reported as refused, and an ended pipe gets no message."""
    words = COMMANDS[name]
    program = "keyferry-agent" if words[0] == AGENT else "keyferry"
    ways = WAYS if name in THOROUGH or "KEYFERRY_NO_SKIPS" in os.environ else FEWER_WAYS
    for number, way in enumerate(ways):
        code = WAYS[way]
        ended = shell([word.format(number) for word in words], way)
        error = ended.stderr.decode()
        assert (ended.returncode, "Traceback" in error) == (code, False), (way, error)
        if code and way in (">&-", ">/dev/full"):
            assert error.splitlines()[-1].startswith(f"{program}: standard output: "), way  # behind warnings
        elif way != ">&-" and words[1:3] != ("module", "init"):
            assert error == "", way


def test_records_that_could_not_be_printed_were_stored(place: Path) -> None:
    """The exit code reports the failed print, and a second attempt is refused because the record exists."""
    for name, way in (("b", ">&-"), ("c", ">/dev/full"), ("d", "| true")):
        words = (CLIENT, "records", "add", name, "--KeyId", "alias/dev")
        assert shell(words, way).returncode == 74
        assert b"taken" in shell(words).stderr
    assert len(shell((CLIENT, "records", "list")).stdout.splitlines()) == 4


@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}],
    ids=str,
)
def test_json_is_utf8_and_text_escaped_in_every_encoding(place: Path, environment: dict[str, str]) -> None:
    """A character that the encoding lacks does not lose a result."""
    shown = shell(COMMANDS["records show"], **environment)
    assert (shown.returncode, json.loads(shown.stdout.decode())["EncryptionContext"]) == (0, {"é": "名"})
    (listed,) = json.loads(shell(COMMANDS["records list --json"], **environment).stdout.decode())
    assert listed["EncryptionContext"] == {"é": "名"}
    key = (AGENT, "keyring", "show", "keyring.age", "alias/b", "--unseal", "identity")
    assert json.loads(shell((*key, "--json"), **environment).stdout.decode())["KeyMetadata"]["Description"] == "é名"
    text = shell(key, **environment)
    assert (text.returncode, b"\\u540d" in text.stdout) == (0, True)


def test_refusals_are_json_in_utf8_too(place: Path) -> None:
    """Standard error may have any encoding."""
    words = (CLIENT, "call", "DescribeKey", "--KeyId", "alias/\udcff")
    ended = shell(words, LC_ALL="C", PYTHONUTF8="0")
    assert (ended.returncode, json.loads(ended.stderr.decode())["Code"]) == (1, "InvalidParameter")


def test_names_that_are_not_text_are_printed_with_escapes(place: Path) -> None:
    """A file's name is bytes, and a lone surrogate stands for a byte that is not UTF-8."""
    words = (AGENT, "keyring", "init", "k\udcff", "--new-identity", "i\udcff")
    ended = shell(words)
    assert (ended.returncode, b"k\\udcff" in ended.stdout) == (0, True)
    made = shell((AGENT, "keyring", "init", "l\udcff", "--new-identity", "j\udcff", "--json"))
    assert json.loads(made.stdout)["Keyring"] == "l\udcff"


def test_unprintable_generated_passphrase_creates_no_file(place: Path) -> None:
    """A module or keyring without its passphrase is useless, and would block the next attempt."""
    for way in (">&-", ">/dev/full", "| true"):
        module = shell((CLIENT, "module", "init", "m", "--generate-passphrase"), way)
        assert (module.returncode, b"no module was made" in module.stderr) == (1, True)
        keyring = shell((AGENT, "keyring", "init", "k", "--generate-passphrase"), way)
        assert (keyring.returncode, b"nothing was sealed" in keyring.stderr) == (1, True)
    assert not {"m", "k"} & set(os.listdir(place))
    assert shell((CLIENT, "module", "init", "m", "--generate-passphrase")).returncode == 0


def test_closed_descriptors_are_opened_before_any_file(tmp_path: Path) -> None:
    """No file of a command becomes its standard output; a closed stream still refuses writes."""
    code = (
        "import os, sys\nfrom keyferry import streams\nstreams.prepare()\n"
        "links = [os.readlink(f'/proc/self/fd/{n}') for n in range(3)]\n"
        "try:\n    os.write(1, b'x')\nexcept OSError as error:\n    links.append(error.strerror)\n"
        "os.write(2, b'x')\nprint('dropped', file=sys.stderr)\nopen(sys.argv[1], 'w').write(repr(links))"
    )
    closing = '"$@" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", closing, "sh", sys.executable, "-c", code, str(tmp_path / "out")], check=True)
    assert (tmp_path / "out").read_text() == repr(["/dev/null"] * 3 + ["Bad file descriptor"])


def test_descriptors_are_reserved_without_dev(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reserved descriptors can be neither read nor written."""
    monkeypatch.setattr(os, "devnull", "/no/such/device")
    descriptor = streams._null(os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.read(descriptor, 1)
    os.close(descriptor)


def test_non_blocking_pipes_are_read_and_written_whole() -> None:
    """A parent process may have made the shared pipe non-blocking."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    child = os.fork()
    if child == 0:
        with streams.writer(writing) as file:
            file.write(bytes(1 << 20))
        os._exit(0)
    os.close(writing)
    with streams.reader(reading) as file:
        assert len(file.read(1 << 20)) == 1 << 20
    assert os.waitpid(child, 0)[1] == 0
    os.close(reading)


def test_output_without_a_stream_is_a_failure_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python's streams are None where the descriptors are closed."""
    monkeypatch.setattr(sys, "stdout", None)
    assert stdout.show("keyferry", "text") == stdout.FAILED
    assert capsys.readouterr().err == "keyferry: standard output: it is closed\n"
    monkeypatch.setattr(sys, "stderr", None)
    stdout.complain("keyferry", "text")
    assert guard.guarded("keyferry", lambda: 0) == 0
