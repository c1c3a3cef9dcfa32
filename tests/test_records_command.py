"""`keyferry records` from a shell, and the command without its optional packages."""

import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from support.agent import PATIENCE, RunningAgent
from support.keys import recipient
from support.records import fill, opened
from support.rotatable_agent import RotatableAgent
from support.secrets import secret_file
from support.skip_unless import ROOT

from keyferry import command
from keyferry.module import SoftwareModule
from keyferry.store import Store
from keyferry.store.url import SECRET_OPTIONS

RSA = recipient("RSAES_OAEP_SHA_256")


class Shell:
    """Runs `keyferry records` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], store: str, socket: Path) -> None:
        self._capsys = capsys
        self._where = {"store": ["--store", store], "socket": ["--socket", str(socket)]}
        self.store = store

    def __call__(self, verb: str, *arguments: object, code: int = 0) -> tuple[str, str]:
        """Return the output on both streams."""
        self._capsys.readouterr()
        socket = [] if verb in ("list", "show") else self._where["socket"]
        assert command.main(["records", verb, *map(str, arguments), *self._where["store"], *socket]) == code
        out, err = self._capsys.readouterr()
        return out, err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], store_url: str, agent: RunningAgent) -> Shell:
    """On each kind of database."""
    return Shell(capsys, store_url, agent.socket)


def test_a_record_is_added_listed_shown_and_recovered(shell: Shell, agent: RunningAgent, tmp_path: Path) -> None:
    """The recovered data key is wrapped for a module, and equals the agent's."""
    added = json.loads(shell("add", "a", "--KeyId", "alias/dev", "--EncryptionContext", '{"tenant": "acme"}')[0])
    assert added["EncryptionContext"] == {"tenant": "acme"}
    assert "Plaintext" not in added
    shell("add", "b", "--KeyId", "alias/dev-sm4", "--NumberOfBytes", "16")
    lines = [line.split("\t") for line in shell("list")[0].splitlines()]
    assert [line[0] for line in lines] == ["a", "b"]
    assert lines[0][1:] == [added["KeyId"], added["KeyVersionId"], added["Created"], "-"]
    listed = json.loads(shell("list", "--json")[0])
    assert listed[0] == added == json.loads(shell("show", "a")[0])
    assert list(added) == [
        "Name", "KeyId", "KeyVersionId", "CiphertextBlob", "CiphertextHash", "EncryptionContext", "Created", "Rewrapped",
    ]  # fmt: skip
    (tmp_path / "der").write_bytes(RSA.der)
    wrapping = ["--WrappingKeySpec", "RSA_2048", "--WrappingAlgorithm", "RSAES_OAEP_SHA_256"]
    recovered = json.loads(shell("recover", "a", "--PublicKeyBlob", f"@{tmp_path / 'der'}", *wrapping)[0])
    assert list(recovered) == ["KeyId", "KeyVersionId", "ExportedDataKey", "RequestId"]
    with agent.client() as kms:
        made = kms.decrypt(ciphertext_blob=added["CiphertextBlob"], encryption_context={"tenant": "acme"})
        assert kms.decrypt(ciphertext_blob=listed[1]["CiphertextBlob"]).key_id == listed[1]["KeyId"]
    import base64  # noqa: PLC0415

    assert RSA.unwrap(recovered["ExportedDataKey"]) == base64.b64decode(made.plaintext)


def test_refused_add_creates_no_record(shell: Shell) -> None:
    """The agent's refusal is printed as JSON, and the store's as text."""
    shell("add", "a", "--KeyId", "alias/dev")
    for arguments, code in (
        (["b", "--KeyId", "alias/none"], "Forbidden.AliasNotFound"),
        (["b", "--KeyId", "alias/dev", "--EncryptionContext", '{"a": 1}'], "InvalidParameter"),
        (["b", "--KeyId", "alias/dev", "--NumberOfBytes", "2000"], "InvalidParameter"),
    ):
        assert json.loads(shell("add", *arguments, code=1)[1])["Code"] == code
    for arguments, why in (
        (["a", "--KeyId", "alias/dev"], "is taken"),
        (["", "--KeyId", "alias/dev"], "not a valid"),
    ):
        assert why in shell("add", *arguments, code=1)[1]
    assert "there is no record b" in shell("show", "b", code=1)[1]
    assert "there is no record b" in shell("recover", "b", code=1)[1]
    assert json.loads(shell("recover", "a", code=1)[1])["Code"] == "MissingParameter"
    assert len(shell("list")[0].splitlines()) == 1


def test_list_has_a_header_on_request(shell: Shell) -> None:
    """Scripts count lines, so the default has only records; --json has field names."""
    shell("add", "a", "--KeyId", "alias/dev")
    header = "Name\tKeyId\tKeyVersionId\tCreated\tRewrapped"
    (row,) = shell("list")[0].splitlines()
    assert shell("list", "--no-header")[0].splitlines() == [row]
    assert shell("list", "--header")[0].splitlines() == [header, row]
    assert json.loads(shell("list", "--json", "--header")[0])[0]["Name"] == "a"


def test_a_list_has_a_header_on_a_terminal(agent: RunningAgent, tmp_path: Path) -> None:
    """An option switches the header off."""
    url = f"sqlite:///{tmp_path / 'records.sqlite'}"
    with agent.client() as kms, Store(url) as store:
        fill(store, kms, 1, key_id="alias/dev")
    for option, lines in (([], 2), (["--no-header"], 1)):
        near, far = pty.openpty()
        arguments = [sys.executable, "-m", "keyferry", "records", "list", "--store", url, *option]
        subprocess.run(arguments, stdout=far, timeout=PATIENCE, check=True)
        os.close(far)
        shown = os.read(near, 65_536).decode()
        os.close(near)
        assert len(shown.splitlines()) == lines
        assert shown.startswith("Name\tKeyId") is (lines == 2)


def test_empty_list_is_valid_text_and_json(shell: Shell) -> None:
    """The store exists and has no record."""
    shell("add", "a", "--KeyId", "alias/dev")
    with Store(shell.store) as store, store._engine.begin() as connection:
        connection.execute(sqlalchemy.text("DELETE FROM keyferry_records"))
    assert shell("list") == ("", "")
    assert json.loads(shell("list", "--json")[0]) == []


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["list", "--json"], ["show", "a"], ["rewrap"], ["rewrap", "--dry-run"], ["recover", "a"]],
    ids=" ".join,
)
def test_missing_store_is_not_listed_as_empty(shell: Shell, arguments: list[str]) -> None:
    """The exit code is 1 with the store's name, and standard output is empty."""
    out, err = shell(*arguments, code=1)
    assert out == ""
    assert "there is no" in err
    assert ("records.sqlite" if shell.store.startswith("sqlite") else "PostgreSQL database test") in err


@pytest.mark.usefixtures("quick_scrypt")
def test_encrypt_file_refuses_a_store_that_does_not_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], store_url: str
) -> None:
    """OUT is not created."""
    secret_file(tmp_path / "p", "x")
    (tmp_path / "in").write_bytes(b"x")
    SoftwareModule.generate("RSA_2048").save(tmp_path / "m", "x")
    module = ["--module", str(tmp_path / "m"), "--passphrase-file", str(tmp_path / "p")]
    arguments = ["encrypt-file", str(tmp_path / "in"), str(tmp_path / "out"), "--record", "r", "--store", store_url]
    assert command.main([*arguments, *module]) == 1
    assert "there is no record r in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_list_shows_no_control_characters(shell: Shell) -> None:
    """A writer to the database must not control an operator's terminal."""
    shell("add", "a", "--KeyId", "alias/dev")
    with Store(shell.store) as store, store._engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE keyferry_records SET name = :name"), {"name": "a\x1b[2J\n\u202eb"})
    assert shell("list")[0].startswith("a\\x1b[2J\\n\\u202eb\t")
    assert "\x1b" not in shell("list", "--json")[0]


@pytest.mark.usefixtures("quick_scrypt")
def test_rewrap_says_what_it_did(
    capsys: pytest.CaptureFixture[str], store_url: str, rotatable_agent: RotatableAgent
) -> None:
    """A dry run first; a failure is exit code 1, with the record's name. Nothing of a bar where there is no terminal."""
    shell, folder = Shell(capsys, store_url, rotatable_agent.agent.socket), rotatable_agent.keyring.parent
    with rotatable_agent.agent.client() as kms, Store(store_url) as store:
        keys = fill(store, kms, 30)
        rotatable_agent.rotate()
        secret_file(folder / "passphrase", "x")
        SoftwareModule.generate("RSA_2048").save(folder / "module", "x")
        counts = {"Records": 30, "Found": 30, "Moved": 30, "Changed": 0, "Failed": 0}
        out, err = shell("rewrap", "--dry-run")
        assert (json.loads(out), err) == ({"DryRun": True, **counts}, "")
        proof = ["--module", folder / "module", "--passphrase-file", folder / "passphrase"]
        out, err = shell("rewrap", *proof)
        assert (json.loads(out), err) == ({"DryRun": False, **counts}, "")
        out, _ = shell("rewrap")
        assert json.loads(out) == {"DryRun": False, **dict.fromkeys(counts, 0), "Records": 30}
        assert opened(store, kms) == keys
        rotatable_agent.change("disable", "alias/a")
        out, _ = shell("rewrap")
        rotatable_agent.change("enable", "alias/a")
        rotatable_agent.rotate()
        rotatable_agent.change("disable", "alias/a")
        out, err = shell("rewrap", code=1)
        assert json.loads(out)["Failed"] == 30
        assert err.count("Rejected.Disabled") == 30
        assert "keyferry: r0: " in err


def test_a_module_without_its_passphrase_file_is_wrong_usage(shell: Shell) -> None:
    """The refusal comes before the first record is read."""
    with pytest.raises(SystemExit) as ended:
        shell("rewrap", "--module", "m")
    assert ended.value.code == 2


def test_progress_is_shown_on_a_terminal(rotatable_agent: RotatableAgent, tmp_path: Path) -> None:
    """And only there: on standard error, never between the lines of the result."""
    url = f"sqlite:///{tmp_path / 'records.sqlite'}"
    with rotatable_agent.agent.client() as kms, Store(url) as store:
        fill(store, kms, 5)
        rotatable_agent.rotate()
        near, far = pty.openpty()
        termios.tcsetwinsize(far, (24, 80))
        arguments = ["records", "rewrap", "--store", url, "--socket", str(rotatable_agent.agent.socket)]
        ended = subprocess.run(
            [sys.executable, "-m", "keyferry", *arguments],
            stdout=subprocess.PIPE,
            stderr=far,
            timeout=PATIENCE,
            check=True,
        )
        os.set_blocking(near, False)
        shown = os.read(near, 65_536).decode()
        os.close(near)
        os.close(far)
    assert json.loads(ended.stdout)["Moved"] == 5
    assert "rewrapping" in shown
    assert "0/5" in shown


def test_a_password_on_the_command_line_is_warned_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The warning does not repeat the password; a password from a file has no warning."""
    url = "postgresql://u:hunter2@127.0.0.1:1/db"
    (tmp_path / "url").write_text(url)
    assert command.main(["records", "list", "--store", url]) == 1
    err = capsys.readouterr().err
    assert "every user of this host can read a password on the command line" in err
    assert "hunter2" not in err
    assert command.main(["records", "list", "--store", f"@{tmp_path / 'url'}"]) == 1
    assert "command line" not in capsys.readouterr().err


WITH_PASSWORD = (
    "postgresql://u:hunter2@127.0.0.1:1/db",
    "postgresql://u:hunter2@half@127.0.0.1:1/db",
    "postgresql://u:hunter2",
    *(f"postgresql://u@127.0.0.1:1/db?{option}=hunter2" for option in sorted(SECRET_OPTIONS)),
    "mysql://u:hunter2@h/db",
    "postgresql://u@127.0.0.1:1/db?password=hunter2",
    "postgresql://127.0.0.1:1/db?x=1&pass%77ord=hunter2",
)
WITHOUT_PASSWORD = (
    "postgresql://u@127.0.0.1:1,[::1]:1/db",
    "postgresql://[::1]:1/db",
    "sqlite:////none/a:b@c",
)
LISTING = """
import contextlib, io, json, sys
for name in sys.argv[1].split(): sys.modules[name] = None
from keyferry.command import main
results = []
for url in sys.argv[2:]:
    with contextlib.redirect_stderr(io.StringIO()) as error:
        results.append((main(["records", "list", "--store", url]), error.getvalue()))
print(json.dumps(results))
"""
"""Lists the records of several stores where some packages are not installed; prints each exit code and standard error."""


@pytest.mark.parametrize("missing", ["", "psycopg", "sqlalchemy"])
def test_the_warning_of_a_password_needs_no_driver(missing: str) -> None:
    """The password is in the process list, whatever happens then."""
    urls = [*WITH_PASSWORD, *WITHOUT_PASSWORD]
    ended = subprocess.run(
        [sys.executable, "-c", LISTING, missing, *urls], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    for url, (code, error) in zip(urls, json.loads(ended.stdout), strict=True):
        assert code == 1, url
        assert ("a password on the command line" in error) is (url in WITH_PASSWORD), url
        assert "hunter2" not in error, url
        assert "Traceback" not in error, url
    assert ended.stderr == ""


def test_missing_agent_is_exit_code_3(shell: Shell, tmp_path: Path) -> None:
    """The exit code is that of every command without an agent."""
    arguments = ["records", "add", "a", "--KeyId", "alias/dev", "--store", shell.store]
    assert command.main([*arguments, "--socket", str(tmp_path / "none")]) == 3


def test_unwritable_list_has_no_traceback(agent: RunningAgent, tmp_path: Path) -> None:
    """A full disk is an error, and a closed pipe is not."""
    url = f"sqlite:///{tmp_path / 'records.sqlite'}"
    with agent.client() as kms, Store(url) as store:
        fill(store, kms, 2_000, key_id="alias/dev")
    asked = [sys.executable, "-m", "keyferry", "records", "list", "--store", url]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(asked, stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    assert (ended.returncode, ended.stderr) == (74, "keyferry: standard output: No space left on device\n")


# --- missing packages -------------------------------------------------------------------------------------------------


def without(packages: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command without some packages; it prints its imports at the end."""
    code = (
        "import sys\n"
        f"for name in {packages.split()!r}: sys.modules[name] = None\n"
        "from keyferry.command import main\n"
        "code = main(sys.argv[1:])\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} & {'sqlalchemy', 'tqdm', 'cryptography', 'psycopg'}))\n"
        "sys.exit(code)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("sqlalchemy", ["records", "list"]),
        ("sqlalchemy", ["records", "add", "a", "--KeyId", "k"]),
        ("sqlalchemy", ["encrypt-file", "in", "out", "--record", "r", "--module", "m", "--passphrase-file", "p"]),
    ],
)
def test_missing_package_is_named_with_its_install_command(missing: str, arguments: list[str], tmp_path: Path) -> None:
    """The message has no traceback."""
    (tmp_path / "in").write_bytes(b"x")
    ended = without(missing, *[str(tmp_path / "in") if each == "in" else each for each in arguments])
    assert ended.returncode == 1
    assert f'this needs {missing}, which is not installed; install the extra "store" of keyferry' in ended.stderr


def test_module_commands_need_only_their_own_extra(tmp_path: Path) -> None:
    """Decrypting a file needs only that extra, too."""
    secret_file(tmp_path / "p", "x")
    arguments = ["module", "init", str(tmp_path / "m"), "--passphrase-file", str(tmp_path / "p")]
    ended = without("cryptography", *arguments)
    assert 'install the extra "module" of keyferry' in ended.stderr
    nothing_else = "sqlalchemy tqdm psycopg pyrage"
    assert without(nothing_else, *arguments).returncode == 0
    decrypting = [
        "decrypt-file",
        str(tmp_path / "p"),
        str(tmp_path / "out"),
        "--module",
        str(tmp_path / "m"),
        *arguments[3:],
    ]
    assert "not a file that keyferry encrypted" in without(nothing_else, *decrypting).stderr
    assert 'install the extra "module" of keyferry' in without("cryptography", *decrypting).stderr


def test_broken_package_is_not_reported_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import error inside an installed package is reported as a bug."""
    from keyferry.command.common import extra  # noqa: PLC0415

    with pytest.raises(ModuleNotFoundError), extra("store"):
        raise ModuleNotFoundError("No module named 'x'", name="x")


def test_calls_to_an_agent_import_no_database(agent: RunningAgent) -> None:
    """Such commands import no package that only other commands need."""
    for arguments in (["status"], ["call", "DescribeKey", "--KeyId", "alias/dev"]):
        ended = without("", *arguments, "--socket", str(agent.socket))
        assert ended.returncode == 0
        assert ended.stdout.splitlines()[-1] == ""


def test_extra_installs_the_packages_of_the_message() -> None:
    import tomllib  # noqa: PLC0415

    from packaging.requirements import Requirement  # noqa: PLC0415

    from keyferry.command.common import _EXTRAS  # noqa: PLC0415

    extras: dict[str, Any] = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    module = {Requirement(each).name for each in extras["module"]}
    assert module == _EXTRAS["module"]
    store = {Requirement(each).name for each in extras["store"]} - {"keyferry"} | module
    assert store == _EXTRAS["store"]
