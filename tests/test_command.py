"""The commands, as a shell sees them: arguments, output, exit codes."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support import skip_unless
from support.agent import PATIENCE, RunningAgent, dev_agent
from support.keys import recipient, rsa_private_key, spki

from keyferry import __version__
from keyferry import command as keyferry_command
from keyferry.operations import OPERATIONS
from keyferry_agent.cli import main as agent_command

RSA = recipient("RSAES_OAEP_SHA_256")
ROOT = Path(__file__).parents[1]


def keyferry(*arguments: object, socket: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run the command in a process of its own."""
    where = ["--socket", str(socket)] if socket else []
    return subprocess.run(
        [sys.executable, "-m", "keyferry", *map(str, arguments), *where],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    """A public key file."""
    path = tmp_path / "module.pem"
    path.write_bytes(rsa_private_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def test_call_takes_the_apis_own_names_and_prints_the_answer(agent: RunningAgent, pem: Path) -> None:
    """`keyferry call` does the main job from a shell, with a public key from a PEM or a DER file."""
    der = pem.with_suffix(".der")
    der.write_bytes(spki(rsa_private_key()))
    wrapping = ["--WrappingKeySpec", "RSA_2048", "--WrappingAlgorithm", "RSAES_OAEP_SHA_256"]
    context = ["--EncryptionContext", '{"tenant":"acme"}']
    made = keyferry(
        "call", "GenerateAndExportDataKey", "--KeyId", "alias/dev", "--NumberOfBytes", "16", *context,
        "--PublicKeyBlob", f"@{pem}", *wrapping, "--DryRun", "false", socket=agent.socket,
    )  # fmt: skip
    assert (made.returncode, made.stderr) == (0, "")
    answer = json.loads(made.stdout)
    key = RSA.unwrap(answer["ExportedDataKey"])
    assert len(key) == 16
    exported = keyferry(
        "call", "ExportDataKey", "--CiphertextBlob", answer["CiphertextBlob"], *context,
        "--PublicKeyBlob", f"@{der}", *wrapping, socket=agent.socket,
    )  # fmt: skip
    assert RSA.unwrap(json.loads(exported.stdout)["ExportedDataKey"]) == key


def asked(*arguments: object, socket: Path, given: bytes | None = None) -> "subprocess.CompletedProcess[bytes]":
    """Run `call` with a standard input of its own."""
    command = [sys.executable, "-m", "keyferry", "call", *map(str, arguments), "--socket", str(socket)]
    return subprocess.run(command, input=given, capture_output=True, timeout=PATIENCE, check=False)


@pytest.mark.parametrize(
    ("plaintext", "form"),
    [
        *((plaintext, "text") for plaintext in (b"card 4111", b"line\n", bytes(range(256)), b"@x", b"Y2FyZA==")),
        *((bytes(range(256)), form) for form in ("text in lines", "raw")),
    ],
)
def test_a_plaintext_and_a_ciphertext_come_from_files(
    agent: RunningAgent, tmp_path: Path, plaintext: bytes, form: str
) -> None:
    """Values from files or standard input stay out of the process list, so no warning is printed."""
    where, (plain, context, sealed) = agent.socket, (tmp_path / name for name in ("plain", "context", "sealed"))
    plain.write_bytes(plaintext)
    context.write_text('{"tenant": "acme"}\n')
    key = ["Encrypt", "--KeyId", "alias/dev", "--EncryptionContext", f"@{context}", "--Plaintext"]
    for value, given in ((f"@{plain}", None), ("-", plaintext)):
        ended = asked(*key, value, socket=where, given=given)
        assert (ended.returncode, ended.stderr) == (0, b"")
        blob = json.loads(ended.stdout)["CiphertextBlob"]
        text = {"text": f"{blob}\n", "text in lines": "\n".join((blob[:76], blob[76:], ""))}.get(form)
        sealed.write_bytes(base64.b64decode(blob) if text is None else text.encode())
        for value, given in ((f"@{sealed}", None), ("-", sealed.read_bytes())):  # noqa: PLW2901 - the other half
            same = ["--EncryptionContext", '{"tenant":"acme"}']
            ended = asked("Decrypt", *same, "--CiphertextBlob", value, socket=where, given=given)
            assert (ended.returncode, ended.stderr) == (0, b"")
            assert base64.b64decode(json.loads(ended.stdout)["Plaintext"]) == plaintext


def test_every_context_comes_from_a_file_or_standard_input(agent: RunningAgent, tmp_path: Path) -> None:
    """ReEncrypt's contexts are included; a ciphertext on the command line is not secret, so no warning is printed."""
    (tmp_path / "old").write_text('{"a": "1"}')
    ended = asked("GenerateDataKeyWithoutPlaintext", "--KeyId", "alias/dev", "--EncryptionContext", "-",
                  socket=agent.socket, given=b'{"a": "1"}')  # fmt: skip
    blob = json.loads(ended.stdout)["CiphertextBlob"]
    ended = asked("ReEncrypt", "--CiphertextBlob", blob, "--SourceEncryptionContext", f"@{tmp_path / 'old'}",
                  "--DestinationKeyId", "alias/dev", "--DestinationEncryptionContext", "-",
                  socket=agent.socket, given=b'{"a": "2"}\n')  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, b"")
    blob = json.loads(ended.stdout)["CiphertextBlob"]
    ended = asked("Decrypt", "--CiphertextBlob", blob, "--EncryptionContext", '{"a":"2"}', socket=agent.socket)
    assert ended.returncode == 0


def test_a_plaintext_on_the_command_line_is_a_warning(agent: RunningAgent) -> None:
    """The call succeeds, and the warning names the processes that can see the plaintext."""
    ended = keyferry("call", "Encrypt", "--KeyId", "alias/dev", "--Plaintext", "Y2FyZA==", socket=agent.socket)
    assert ended.returncode == 0
    assert ended.stderr == (
        "keyferry: other users can see --Plaintext in the process list; use --Plaintext @FILE or -\n"
    )


@pytest.mark.parametrize(
    ("arguments", "given", "why"),
    [
        (["Encrypt", "--Plaintext", "-", "--EncryptionContext", "-"], b"x", "only one parameter"),
        (["Encrypt", "--Plaintext", "@/no/such/file"], b"", "No such file"),
        (["Encrypt", "--Plaintext", "@"], b"", "No such file"),
        (["Encrypt", "--Plaintext", "@/dev/zero"], b"", "longer than"),
        (["Encrypt", "--EncryptionContext", "-"], b"\xff", "--EncryptionContext -: 'utf-8' codec"),
        (["Decrypt", "--CiphertextBlob", "@/"], b"", "Is a directory"),
    ],
)
def test_a_value_that_cannot_be_read_is_wrong_usage(
    agent: RunningAgent, arguments: list[str], given: bytes, why: str
) -> None:
    """The message has the parameter's name."""
    ended = asked(*arguments, socket=agent.socket, given=given)
    assert (ended.returncode, why in ended.stderr.decode()) == (2, True), ended.stderr


def test_other_values_may_begin_with_an_at_sign(agent: RunningAgent) -> None:
    """Only parameters whose help names @FILE read files; other values may be @ or a hyphen."""
    for value in ("@x", "-"):
        ended = asked("DescribeKey", "--KeyId", value, socket=agent.socket)
        assert (ended.returncode, b'"Code"' in ended.stderr) == (1, True)


def test_a_public_key_comes_from_standard_input(agent: RunningAgent, pem: Path) -> None:
    """Standard input may hold PEM or DER."""
    wrapping = ["--WrappingKeySpec", "RSA_2048", "--WrappingAlgorithm", "RSAES_OAEP_SHA_256"]
    made = ["GenerateAndExportDataKey", "--KeyId", "alias/dev", *wrapping, "--PublicKeyBlob", "-"]
    assert asked(*made, socket=agent.socket, given=pem.read_bytes()).returncode == 0


def test_a_refusal_is_json_on_stderr_and_exit_code_1(agent: RunningAgent) -> None:
    """The JSON has Code, Message and RequestId."""
    ended = keyferry("call", "DescribeKey", "--KeyId", "alias/none", socket=agent.socket)
    assert (ended.returncode, ended.stdout) == (1, "")
    error = json.loads(ended.stderr)
    assert list(error) == ["Code", "Message", "RequestId"]
    assert error["Code"] == "Forbidden.AliasNotFound"
    ended = keyferry("call", "DescribeKey", socket=agent.socket)
    assert (ended.returncode, json.loads(ended.stderr)["Code"]) == (1, "MissingParameter")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "COMMAND"),
        (["call"], "OPERATION"),
        (["call", "Explode"], "Explode"),
        (["call", "DescribeKey", "--Key", "alias/dev"], "--Key"),
        (["call", "DescribeKey", "--keyid", "alias/dev"], "--keyid"),
        (["call", "GenerateAndExportDataKey", "--NumberOfBytes", "many"], "integer"),
        (["call", "GenerateAndExportDataKey", "--PublicKeyBlob", "@/no/such/file"], "No such file"),
        (["call", "GenerateAndExportDataKey", "--PublicKeyBlob", f"@{ROOT / 'LICENSE'}"], None),
        (["call", "GenerateDataKey", "--KeyId", "alias/dev", "--NumberOfBytes", "9" * 23], None),
        (["call", "DescribeKey", "--KeyId", "alias/\udcff"], None),
        (["call", "DescribeKey", "--KeyId", "a", "--KeyId", "b"], "twice"),
        (["status", "--wait", "soon"], "soon"),
        (["status", "--wait", "nan"], "nan"),
        (["status", "--wait", "-1"], "-1"),
    ],
)
def test_wrong_usage_is_exit_code_2(agent: RunningAgent, arguments: list[str], why: str | None) -> None:
    """The message has a reason; a file without a key is sent, and refused by the agent."""
    ended = keyferry(*arguments, socket=agent.socket if arguments else None)
    if why is None:
        assert ended.returncode == 1
        assert json.loads(ended.stderr)["Code"]
        return
    assert ended.returncode == 2
    assert why in ended.stderr


def test_unwritable_answer_has_its_own_exit_code(agent: RunningAgent) -> None:
    """A full disk and a closed pipe have an exit code of their own, and no traceback."""
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "keyferry", "status", "--socket", str(agent.socket)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 74
    assert ended.stderr == "keyferry: standard output: No space left on device\n"


def test_missing_agent_is_exit_code_3(tmp_path: Path) -> None:
    """The message asks whether the agent is running."""
    for arguments in (["status"], ["status", "--wait", "0.2"], ["call", "GetAgentStatus"]):
        ended = keyferry(*arguments, socket=tmp_path / "none.sock")
        assert (ended.returncode, ended.stdout) == (3, "")
        assert "start keyferry-agent" in ended.stderr


def test_status_waits_for_an_agent_that_is_starting(socket_path: Path) -> None:
    """`status --wait` waits for as many seconds as its argument."""
    waiting = subprocess.Popen(
        [sys.executable, "-m", "keyferry", "status", "--wait", "60", "--socket", str(socket_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with dev_agent(socket_path):
        out, _ = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode == 0
    assert json.loads(out)["State"] == "Serving"


def test_the_socket_may_come_from_the_environment(
    agent: RunningAgent, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both commands read $KEYFERRY_SOCKET."""
    monkeypatch.setenv("KEYFERRY_SOCKET", str(agent.socket))
    assert keyferry_command.main(["status"]) == 0
    assert json.loads(capsys.readouterr().out)["Keys"] == 2
    assert keyferry_command.main(["call", "DescribeKey", "--KeyId", "alias/dev"]) == 0
    assert keyferry_command.main(["call", "DescribeKey", "--KeyId", "alias/x"]) == 1
    assert keyferry_command.main(["status", "--socket", "/nowhere"]) == 3


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=lambda operation: operation.name)
def test_help_explains_every_operation(operation: object, capsys: pytest.CaptureFixture[str]) -> None:
    """The help marks each parameter as required or optional."""
    known = OPERATIONS[operation.name]  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as ended:
        keyferry_command.main(["call", known.name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for name in known.parameters:
        assert f"--{name}" in out
    assert out.count("(required)") == len(known.required)


def test_fingerprint_prints_the_value_for_recipients(
    pem: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEM and DER of RSA and SM2 keys are accepted; keys that no export can use are refused."""
    assert agent_command.main(["fingerprint", str(pem)]) == 0
    pin = capsys.readouterr().out
    assert pin.startswith("sha256:")
    der, sm2, other = tmp_path / "rsa.der", tmp_path / "sm2.der", tmp_path / "p256.der"
    der.write_bytes(spki(rsa_private_key()))
    sm2.write_bytes(recipient("SM2PKE").der)
    other.write_bytes(spki(ec.generate_private_key(ec.SECP256R1())))
    assert agent_command.main(["fingerprint", str(der)]) == 0
    assert capsys.readouterr().out == pin
    assert agent_command.main(["fingerprint", str(sm2)]) == 0
    assert agent_command.main(["fingerprint", str(other)]) == 1
    assert "data keys cannot be exported to this key" in capsys.readouterr().err
    assert agent_command.main(["fingerprint", str(tmp_path / "none")]) == 1


@pytest.mark.parametrize("module", ["keyferry", "keyferry_agent"])
def test_both_commands_print_their_version(module: str) -> None:
    """`keyferry` and `keyferry-agent` have the same version."""
    ended = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout.split()[1] == __version__


def test_agent_without_a_keyring_offers_three_remedies(socket_path: Path) -> None:
    """The message has three ways to get a keyring."""
    agent = RunningAgent([], socket_path)
    assert agent.wait() == 1
    agent.kill()
    assert "try --dev" in "".join(agent.output)


def test_missing_socket_directory_is_an_error(tmp_path: Path) -> None:
    """The agent does not create the directory, because its owner would be unclear."""
    agent = RunningAgent(["--dev"], tmp_path / "none" / "agent.sock")
    assert agent.wait() == 1
    agent.kill()
    assert "set another path (of the agent's own socket also with --socket)" in "".join(agent.output)


def test_the_demo_runs(tmp_path: Path) -> None:
    """`make demo` is the first command that a newcomer runs."""
    ended = subprocess.run(
        [sys.executable, ROOT / "docs" / "demo" / "main_job.py"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("the same file again") == 2
    assert ended.stdout.count("in hex or in Base64: 0 times") == 2


@skip_unless.program("softhsm2-util", "softhsm2")
def test_the_demo_with_a_token_runs() -> None:
    """The demo with a token leaves no files behind."""
    command = [sys.executable, str(ROOT / "docs" / "demo" / "hsm.py")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("the same file again") == 2


def test_token_demo_without_softhsm_names_the_package() -> None:
    command = [sys.executable, str(ROOT / "docs" / "demo" / "hsm.py")]
    environment = {**os.environ, "PATH": "/nowhere"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment)
    assert ended.returncode == 1
    assert "apt-get install softhsm2" in ended.stderr
