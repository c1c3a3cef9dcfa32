"""Commands with a cryptographic module in a token, and `keyferry module show` for modules of both kinds."""

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.agent import PATIENCE, RunningAgent
from support.quick_scrypt import QUICK_CLIENT
from support.secrets import secret_file
from support.tokens import RealToken

from keyferry import command
from keyferry.module import SoftwareModule
from keyferry.store import Store, new_record
from keyferry_agent.cli import main as agent_command
from keyferry_agent.crypto.public_key import fingerprint

pytestmark = pytest.mark.usefixtures("quick_scrypt")
KEY = "files"


def run(*arguments: object) -> "subprocess.CompletedProcess[bytes]":
    """The command in a process of its own, as it protects its memory."""
    words = [*QUICK_CLIENT, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, timeout=PATIENCE, check=False)


@pytest.fixture(scope="module")
def public_key(token: RealToken) -> str:
    """The public key of a key pair in each kind of token."""
    module = token.open(KEY)
    module.close()
    return module.public_key_blob


def options(token: RealToken) -> list[str]:
    """The options that name the key pair."""
    library = ["--pkcs11", str(token.library), "--token", token.label]
    parameters = ["--library-parameters", token.parameters] if token.parameters else []
    return [*library, "--key-label", KEY, "--pin-file", str(token.pin_file), *parameters]


@pytest.fixture
def store(tmp_path: Path, agent: RunningAgent) -> str:
    """The URL of a store with one record."""
    url = f"sqlite:///{tmp_path / 'records.sqlite'}"
    with Store(url) as made, agent.client() as kms:
        made.add(new_record(kms, "r", key_id="alias/dev", encryption_context={"tenant": "acme"}))
    return url


def test_a_file_is_encrypted_and_decrypted_with_a_token(
    token: RealToken, public_key: str, store: str, agent: RunningAgent, tmp_path: Path
) -> None:
    """A software module with the same record decrypts the token's ciphertext."""
    plain, sealed, again = (tmp_path / name for name in ("plain", "sealed", "again"))
    plain.write_bytes(b"report" * 50_000)
    socket = ["--socket", agent.socket]
    ended = run("encrypt-file", plain, sealed, "--record", "r", "--store", store, *options(token), *socket)
    assert (ended.returncode, ended.stderr) == (0, b"")
    ended = run("decrypt-file", sealed, again, *options(token), *socket)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert again.read_bytes() == plain.read_bytes()
    SoftwareModule.generate("EC_SM2").save(tmp_path / "module", "correct horse")
    software = ["--module", tmp_path / "module", "--passphrase-file", secret_file(tmp_path / "p", "correct horse")]
    assert run("decrypt-file", sealed, "-", *software, *socket).stdout == plain.read_bytes()


def test_a_file_is_moved_to_a_new_data_key_in_a_token(
    token: RealToken, public_key: str, store: str, agent: RunningAgent, tmp_path: Path
) -> None:
    """A file that already has the record's data key is left as it is."""
    plain, sealed = tmp_path / "plain", tmp_path / "sealed"
    plain.write_bytes(b"report" * 50_000)
    record = ["--record", "r", "--store", store, *options(token), "--socket", agent.socket]
    assert run("encrypt-file", plain, sealed, *record).returncode == 0
    before = sealed.read_bytes()
    ended = run("reencrypt-file", sealed, *record)
    assert (ended.returncode, b"left unchanged" in ended.stderr, sealed.read_bytes() == before) == (0, True, True)
    assert run("records", "renew", "r", "--store", store, "--socket", agent.socket).returncode == 0
    ended = run("reencrypt-file", sealed, *record)
    assert (ended.returncode, ended.stderr, sealed.read_bytes() == before) == (0, b"", False)
    ended = run("decrypt-file", sealed, "-", *options(token), "--socket", agent.socket)
    assert ended.stdout == plain.read_bytes()


def test_a_rewrap_is_proved_in_a_token(
    token: RealToken, public_key: str, store: str, agent: RunningAgent, capsys: pytest.CaptureFixture[str]
) -> None:
    """No record moves here, but the token is opened."""
    ended = run("records", "rewrap", "--store", store, "--socket", agent.socket, *options(token))
    assert (ended.returncode, json.loads(ended.stdout)["Failed"]) == (0, 0)
    wrong = [*options(token), "--key-label", "none"]
    ended = run("records", "rewrap", "--store", store, "--socket", agent.socket, *wrong)
    assert ended.returncode == 1
    assert b"none" in ended.stderr


def test_a_token_is_named_by_a_uri(softhsm_token: RealToken, capsys: pytest.CaptureFixture[str]) -> None:
    """`module show` prints its public key and its fingerprint."""
    module = softhsm_token.open(KEY)
    arguments = options(softhsm_token)
    arguments[arguments.index(softhsm_token.label)] = f"pkcs11:token={softhsm_token.label}"
    assert command.main(["module", "show", *arguments]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        "PublicKeyBlob": module.public_key_blob,
        "WrappingKeySpec": "RSA_2048",
        "WrappingAlgorithm": module.wrapping_algorithm,
        "Recipient": fingerprint(base64.b64decode(module.public_key_blob)),
    }
    module.close()
    with pytest.raises(SystemExit) as ended:
        command.main(["module", "show", *arguments, "--token", "pkcs11:pin-value=1234"])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "keyferry: --token: " in err
    assert "1234" not in err


def test_wrong_pin_is_named(softhsm_token: RealToken, tmp_path: Path) -> None:
    """The exit code is 1, and the message has no part of the PIN."""
    softhsm_token.open(KEY).close()
    wrong = [*options(softhsm_token), "--pin-file", str(secret_file(tmp_path / "pin", "wrong-pin-99"))]
    ended = run("module", "show", *wrong)
    assert ended.returncode == 1
    assert b"refused the PIN" in ended.stderr
    assert b"wrong-pin-99" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "one of the arguments --module --pkcs11 is required"),
        (["--module", "m"], "a software module needs --passphrase-file"),
        (["--module", "m", "--passphrase-file", "p", "--pin-file", "f"], "--pin-file: only with --pkcs11"),
        (["--module", "m", "--pkcs11", "l"], "not allowed with argument"),
        (["--pkcs11", "l", "--token", "t"], "--pkcs11 needs --key-label"),
        (["--pkcs11", "l", "--pin-file", "f"], "--pkcs11 needs --token and --key-label"),
        (["--pkcs11", "l", "--token", "t", "--key-label", "k", "--passphrase-file", "p"], "comes from --pin-file"),
    ],
)
@pytest.mark.parametrize("verb", [["encrypt-file", "--record", "r"], ["decrypt-file"]], ids=lambda verb: verb[0])
def test_incompatible_options_are_wrong_usage(
    verb: list[str], arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal comes before any file is read."""
    with pytest.raises(SystemExit) as ended:
        command.main([*verb, "in", "out", *arguments])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has the command that installs the extra."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "pkcs11"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("pkcs11", "cryptoki", "token", "probe"):
        monkeypatch.delitem(sys.modules, f"keyferry.module.{name}", raising=False)
    monkeypatch.delattr("keyferry.module.Pkcs11Module", raising=False)
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    assert command.main(["module", "show", "--pkcs11", "l", "--token", "t", "--key-label", "k"]) == 1
    assert 'this needs pkcs11, which is not installed; install the extra "pkcs11"' in capsys.readouterr().err


# --- every command accepts the output of `keyferry module` ----------------------------------------------------------------


@pytest.mark.parametrize("key_spec", ["RSA_2048", "EC_SM2"])
def test_every_command_reads_the_output_of_module_init(
    key_spec: str, agent: RunningAgent, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands read the whole JSON or its PublicKeyBlob; `module show` prints the same."""
    passphrase = ["--passphrase-file", str(secret_file(tmp_path / "p", "correct horse battery"))]
    assert command.main(["module", "init", str(tmp_path / "m"), "--key-spec", key_spec, *passphrase]) == 0
    printed = capsys.readouterr().out
    assert command.main(["module", "show", str(tmp_path / "m"), *passphrase]) == 0
    assert capsys.readouterr().out == printed
    shown: dict[str, Any] = json.loads(printed)
    wrapping = [f"--{name}={shown[name]}" for name in ("WrappingKeySpec", "WrappingAlgorithm")]
    socket = ["--socket", str(agent.socket)]
    for name, content in (("json", printed), ("base64", f"{shown['PublicKeyBlob']}\n")):
        path = tmp_path / name
        path.write_text(content)
        assert agent_command.main(["fingerprint", str(path)]) == 0
        assert capsys.readouterr().out.strip() == shown["Recipient"]
        public = ["--PublicKeyBlob", f"@{path}", *wrapping, *socket]
        assert command.main(["call", "GenerateAndExportDataKey", "--KeyId", "alias/dev", *public]) == 0
        made = json.loads(capsys.readouterr().out)
        assert command.main(["call", "ExportDataKey", "--CiphertextBlob", made["CiphertextBlob"], *public]) == 0
        assert command.main(["records", "recover", "r", "--store", store, *public]) == 0
        assert capsys.readouterr().out.count("ExportedDataKey") == 2
