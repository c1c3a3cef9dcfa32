"""Passphrases of keyrings and module files: weak ones, generated ones, low work factors, and the loader's time limits."""

import argparse
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import structlog
from support.agent import PATIENCE
from support.keyring import opened, run, serving
from support.secrets import secret_file

from keyferry import age_passphrase, command, passphrase
from keyferry.command.modules import open_module
from keyferry.module import SoftwareModule
from keyferry_agent.keyring import file, loader
from keyferry_agent.keyring.document import KeyringError
from keyferry_agent.keyring.keyring import Keyring
from keyferry_agent.keyring.sealing import Unsealer

quick = pytest.mark.usefixtures("quick_scrypt")
STRONG = "correct horse battery"
GENERATED = re.compile(r"[a-km-np-z2-9]{4}(-[a-km-np-z2-9]{4}){6}")


def weaken(keyring: Path, phrase: str, factor: int) -> None:
    """Seal a passphrase keyring with another work factor, as an earlier version could have done."""
    payload = age_passphrase.unseal(keyring.read_bytes(), phrase)
    keyring.write_bytes(age_passphrase._seal(payload, phrase, factor))


def passphrase_keyring(folder: Path, phrase: str = STRONG) -> Path:
    """Make a keyring sealed to the passphrase in the file `identity` beside it, with the key alias/a."""
    secret_file(folder / "identity", f"{phrase}\n")
    run("init", folder / "keyring.age", "--passphrase-file", folder / "identity")
    run("create-key", folder / "keyring.age", "--alias", "alias/a", "--unseal", folder / "identity")
    return folder / "keyring.age"


def load(keyring: Path) -> Keyring:
    """Load a keyring as the daemon does."""
    return loader.load(keyring, keyring.parent / "identity", backing="auto", require=False)


def module_init(*arguments: object) -> int:
    """`keyferry module init` in this process."""
    return command.main(["module", "init", *map(str, arguments), "--key-spec", "EC_SM2"])


# --- work factors -----------------------------------------------------------------------------------------------------


@quick
def test_every_change_of_a_keyring_writes_work_factor_18(tmp_path: Path) -> None:
    """A change raises another work factor of the file to 18."""
    keyring = passphrase_keyring(tmp_path)
    assert age_passphrase.work_factor(keyring.read_bytes()) == 18
    for factor in (10, 19):
        weaken(keyring, STRONG, factor)
        run("rotate", keyring, "alias/a", "--unseal", tmp_path / "identity")
        assert age_passphrase.work_factor(keyring.read_bytes()) == 18
    assert len(opened(keyring).find("alias/a").versions) == 3


@quick
def test_a_low_work_factor_is_a_warning_of_the_keyring_verbs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file opens, stdout stays JSON, and `reseal` ends the warning."""
    keyring = passphrase_keyring(tmp_path)
    weaken(keyring, STRONG, 16)
    capsys.readouterr()
    run("list", keyring, "--json", "--unseal", tmp_path / "identity")
    said = capsys.readouterr()
    assert json.loads(said.out)["TotalCount"] == 1
    assert "warning: " in said.err
    assert "work factor 16" in said.err
    assert "reseal" in said.err
    run("reseal", keyring, "--passphrase-file", tmp_path / "identity", "--unseal", tmp_path / "identity")
    run("list", keyring, "--unseal", tmp_path / "identity")
    weaken(keyring, STRONG, 17)
    run("list", keyring, "--unseal", tmp_path / "identity")
    assert capsys.readouterr().err == ""


def test_an_agent_warns_about_a_low_work_factor_and_serves(tmp_path: Path, socket_path: Path) -> None:
    """The agent's log names the file, the work factor and the remedy."""
    keyring = passphrase_keyring(tmp_path)
    weaken(keyring, STRONG, 10)
    with serving(keyring, socket_path) as agent, agent.client() as kms:
        assert kms.describe_key(key_id="alias/a")
        event = agent.wait_for("keyring.weak_work_factor")
    assert (event["keyring"], event["work_factor"]) == (str(keyring), 10)
    assert "reseal" in event["what"]


def test_an_ordinary_keyring_is_loaded_without_a_warning(keyring: Path, tmp_path: Path) -> None:
    """Work factor 18 is ordinary, and an identity has none."""
    (tmp_path / "other").mkdir()
    other = passphrase_keyring(tmp_path / "other")
    with structlog.testing.capture_logs() as logged:
        load(keyring).memory.close()
        load(other).memory.close()
        assert logged == []
        weaken(other, STRONG, 10)
        load(other).memory.close()
    assert [entry["event"] for entry in logged] == ["keyring.weak_work_factor"]


@quick
def test_a_keyring_above_the_bound_is_refused_by_its_factor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The messages of the verbs and of the agent have the work factor."""
    keyring = passphrase_keyring(tmp_path)
    keyring.write_bytes(keyring.read_bytes().replace(b" 18\n", b" 24\n", 1))
    run("list", keyring, "--unseal", tmp_path / "identity", code=1)
    why = "does not open: work factor 24 is too high: at most 22"
    assert why in capsys.readouterr().err
    with pytest.raises(KeyringError, match=why):
        load(keyring)


@quick
def test_saving_a_module_again_raises_a_low_work_factor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line warns; the library has no place for a warning."""
    secret_file(tmp_path / "passphrase", STRONG)
    path = tmp_path / "module"
    SoftwareModule.generate("EC_SM2").save(path, STRONG)
    assert age_passphrase.work_factor(path.read_bytes()) == 18
    weaken(path, STRONG, 12)
    arguments = argparse.Namespace(module=str(path), passphrase_file=str(tmp_path / "passphrase"))
    assert isinstance(open_module(arguments), SoftwareModule)
    assert f"keyferry: warning: {path}: its passphrase is sealed with work factor 12" in capsys.readouterr().err
    module = SoftwareModule.load(path, STRONG)
    module.save(tmp_path / "again", STRONG)
    assert age_passphrase.work_factor((tmp_path / "again").read_bytes()) == 18


# --- weak passphrases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phrase", "warns"), [("x", True), ("elf letters", True), ("zwölf Zeichen", False)])
@quick
def test_a_short_passphrase_is_accepted_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], phrase: str, warns: bool
) -> None:
    """For keyrings and for modules; stdout is as without it, and the passphrase is not shown."""
    secret_file(tmp_path / "passphrase", f"{phrase}\n")
    given = ["--passphrase-file", tmp_path / "passphrase"]
    run("init", tmp_path / "k.age", *given, "--json")
    run("reseal", tmp_path / "k.age", *given, "--unseal", tmp_path / "passphrase")
    assert module_init(tmp_path / "m", *given) == 0
    said = capsys.readouterr()
    assert said.err.count(f"warning: {tmp_path / 'passphrase'}: the passphrase has fewer than 12") == 3 * warns
    assert said.out.startswith("{")
    assert len(said.err.splitlines()) == 3 * warns
    run("list", tmp_path / "k.age", "--unseal", tmp_path / "passphrase")
    assert capsys.readouterr().err == ""


# --- generated passphrases --------------------------------------------------------------------------------------------


def test_a_generated_passphrase_has_140_bits() -> None:
    """A passphrase has 28 characters of 32 each, and every character occurs in every place."""
    phrases = [passphrase.generate() for _ in range(2_000)]
    assert len(set(phrases)) == len(phrases)
    assert all(GENERATED.fullmatch(phrase) for phrase in phrases)
    letters = [phrase.replace("-", "") for phrase in phrases]
    assert {len(text) for text in letters} == {28}
    assert all(len({text[place] for text in letters}) == 32 for place in range(28))
    assert passphrase.weakness(phrases[0]) is None


@pytest.mark.parametrize("form", ["text", "json"])
@quick
def test_a_generated_passphrase_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    """`init` and `reseal` print the passphrase once on stdout."""
    path, json_option = tmp_path / "k.age", ["--json"] if form == "json" else []
    secret_file(tmp_path / "p", "")
    phrases = []
    for verb, more in (("init", []), ("reseal", ["--unseal", tmp_path / "p"])):
        run(verb, path, "--generate-passphrase", *json_option, *more)
        said = capsys.readouterr()
        if form == "json":
            shown = json.loads(said.out)
            assert shown["Keyring"] == str(path)
            phrases.append(shown["Passphrase"])
        else:
            phrases += re.findall(r"^Passphrase: +(\S+)$", said.out, re.MULTILINE)
        assert said.err == ""
        secret_file(tmp_path / "p", phrases[-1])
        assert file.read(path, Unsealer.read(tmp_path / "p")).keys == []
    assert len(set(phrases)) == 2
    assert all(GENERATED.fullmatch(phrase) for phrase in phrases)


@quick
def test_a_generated_passphrase_goes_to_a_new_file_instead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file has mode 0600, for keyrings and for modules."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    run("init", tmp_path / "k.age", "--generate-passphrase", "--passphrase-file", first)
    generated = ["--generate-passphrase", "--passphrase-file"]
    run("reseal", tmp_path / "k.age", *generated, second, "--unseal", first)
    assert module_init(tmp_path / "m", *generated, third) == 0
    said = capsys.readouterr()
    for path in (first, second, third):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        phrase = path.read_text().strip()
        assert GENERATED.fullmatch(phrase)
        assert phrase not in said.out + said.err
    run("list", tmp_path / "k.age", "--unseal", second)
    run("list", tmp_path / "k.age", "--unseal", first, code=1)
    SoftwareModule.load(tmp_path / "m", third.read_text().strip())


@quick
def test_module_init_prints_a_generated_passphrase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The passphrase is one more field of the JSON."""
    assert module_init(tmp_path / "m", "--generate-passphrase") == 0
    shown = json.loads(capsys.readouterr().out)
    assert GENERATED.fullmatch(shown["Passphrase"])
    assert SoftwareModule.load(tmp_path / "m", shown["Passphrase"]).public_key_blob == shown["PublicKeyBlob"]


@quick
def test_an_existing_passphrase_file_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A refused command seals and changes no file."""
    secret_file(tmp_path / "p", STRONG)
    generated = ["--generate-passphrase", "--passphrase-file", tmp_path / "p"]
    run("init", tmp_path / "k.age", *generated, code=1)
    assert module_init(tmp_path / "m", *generated) == 1
    run("init", tmp_path / "k.age", *generated[1:])
    before = (tmp_path / "k.age").read_bytes()
    run("reseal", tmp_path / "k.age", *generated, "--unseal", tmp_path / "p", code=1)
    assert capsys.readouterr().err.count("a generated passphrase needs a new file") == 3
    assert (tmp_path / "k.age").read_bytes() == before
    assert (tmp_path / "p").read_text() == STRONG
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        "p",
        "k.age",
        "k.age.changes.jsonl",
    }


@quick
def test_a_refused_command_leaves_no_passphrase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A refused command leaves no passphrase on stdout or in a file."""
    keyring = passphrase_keyring(tmp_path)
    secret_file(tmp_path / "wrong", "wrong passphrase")
    capsys.readouterr()
    before = keyring.read_bytes()
    generated = ["--generate-passphrase", "--passphrase-file", tmp_path / "new"]
    run("reseal", keyring, *generated, "--unseal", tmp_path / "wrong", code=1)
    run("reseal", keyring, "--generate-passphrase", "--unseal", tmp_path / "wrong", code=1)
    run("init", keyring, *generated, code=1)
    run("init", tmp_path / "none" / "k.age", *generated, code=1)
    assert module_init(tmp_path / "none" / "m", *generated) == 1
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "new").exists()
    assert keyring.read_bytes() == before


def test_a_failed_print_of_the_passphrase_changes_nothing(tmp_path: Path) -> None:
    """A keyring is useless without its passphrase."""
    keyring = passphrase_keyring(tmp_path)
    before = keyring.read_bytes()
    arguments = [sys.executable, "-m", "keyferry_agent", "keyring", "reseal", str(keyring), "--generate-passphrase"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*arguments, "--unseal", str(tmp_path / "identity")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert ended.returncode == 1
    assert "nothing was sealed, because the passphrase could not be printed" in ended.stderr
    assert keyring.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--generate-passphrase", "--recipient", "age1x"],
        ["--generate-passphrase", "--new-identity", "out"],
        ["--passphrase-file", "p", "--recipient", "age1x"],
    ],
)
def test_a_keyring_is_sealed_in_one_way_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str]
) -> None:
    """Another number of ways is wrong usage."""
    with pytest.raises(SystemExit) as ended:
        run("init", tmp_path / "k.age", *arguments)
    assert ended.value.code == 2
    assert "passphrase" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_module_without_a_passphrase_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has both options for a passphrase."""
    with pytest.raises(SystemExit) as ended:
        module_init(tmp_path / "m")
    assert ended.value.code == 2
    assert "--passphrase-file or --generate-passphrase" in capsys.readouterr().err


@quick
def test_a_full_disk_leaves_no_passphrase_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second attempt with free space succeeds."""

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    generated = ["--generate-passphrase", "--passphrase-file", tmp_path / "p"]
    run("init", tmp_path / "k.age", *generated, code=1)
    assert module_init(tmp_path / "m", *generated) == 1
    assert capsys.readouterr().err.count("No space left on device") == 2
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_short_memory_is_an_error_of_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is sealed, and no passphrase file is left."""

    class TooLarge:
        def __init__(self, *_: object) -> None:
            raise MemoryError

    monkeypatch.setattr(age_passphrase, "Scrypt", TooLarge)
    generated = ["--generate-passphrase", "--passphrase-file", tmp_path / "p"]
    run("init", tmp_path / "k.age", *generated, code=1)
    assert module_init(tmp_path / "m", *generated) == 1
    assert capsys.readouterr().err.count("not enough memory: work factor 18 takes 256 MiB") == 2
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


# --- the loader's time limits -----------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Have a shell script run in the loader's place."""
    path = folder / "loader"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(path))


def test_unsealing_may_take_longer_than_reading(keyring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of reading ends with the loader's first byte, so load does not decide whether a passphrase opens."""
    monkeypatch.setattr(loader, "READ_SECONDS", 1.0)
    pretend(monkeypatch, tmp_path, r"printf '\022'; sleep 2; echo 'the end' >&2; exit 1")
    with pytest.raises(KeyringError, match="the end"):
        load(keyring)


def test_unsealing_has_a_limit_too(keyring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which."""
    monkeypatch.setattr(loader, "UNSEAL_SECONDS", 0.5)
    pretend(monkeypatch, tmp_path, r"printf '\022'; exec sleep 60")
    with pytest.raises(KeyringError, match=r"its loader took longer than 0\.5 s"):
        load(keyring)


@pytest.mark.parametrize(("first", "why"), [(r"\026", "work factor 22 takes 4096 MiB"), (r"\000", "memory runs out$")])
def test_a_killed_loader_is_explained_by_memory(
    keyring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, why: str
) -> None:
    """A container with little memory kills its largest process silently."""
    pretend(monkeypatch, tmp_path, f"printf '{first}'; kill -9 $$")
    with pytest.raises(KeyringError, match=why):
        load(keyring)


def test_a_loader_without_a_message_is_reported(keyring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the keyring."""
    pretend(monkeypatch, tmp_path, "exit 3")
    with pytest.raises(KeyringError, match=r"keyring\.age: its loader ended without a message"):
        load(keyring)
