"""The recipients of a keyring: listed, added, removed; and changes that would lock an operator out."""

import json
import subprocess
from pathlib import Path

import pytest
from support.keyring import Command, change, opened, rewritten, run
from support.secrets import secret_file
from support.skip_unless import program
from test_recipients import ONE, SSH, TWO

from keyferry_agent.keyring.sealing import Unsealer, count_recipients, seal


def first_recipient(keyring: Path) -> str:
    """Return the recipient of the identity beside a keyring."""
    return opened(keyring).recipients[0]


def test_recipients_are_added_listed_and_removed(keyring_json: Command, keyring: Path) -> None:
    """Every change prints the added and removed recipients, and the file is sealed to the listed ones."""
    mine = first_recipient(keyring)
    added = keyring_json("add-recipient", "--recipient", ONE.recipient, "--recipient", f"{SSH} offline")
    assert added["Added"] == [ONE.recipient, f"{SSH} offline"]
    assert (added["Removed"], added["Recipients"]) == ([], [mine, ONE.recipient, f"{SSH} offline"])
    listed = keyring_json("recipients")
    assert (listed["Recipients"], listed["SealedTo"]) == (added["Recipients"], "Recipients")
    assert count_recipients(keyring.read_bytes()) == 3
    removed = keyring_json("remove-recipient", "--recipient", SSH)
    assert (removed["Removed"], removed["Recipients"]) == ([f"{SSH} offline"], [mine, ONE.recipient])
    assert count_recipients(keyring.read_bytes()) == 2
    run("list", keyring, "--unseal", secret_file(keyring.parent / "one", ONE.identity))


def test_the_list_of_recipients_is_a_recipients_file(
    keyring_json: Command, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option -R reads the output of `recipients`."""
    keyring_json("add-recipient", "--recipient", ONE.recipient, "--recipient", f"{SSH} offline")
    run("recipients", keyring, "--unseal", keyring.parent / "identity")
    lines = capsys.readouterr().out
    path = secret_file(keyring.parent / "r", lines)
    assert keyring_json("reseal", "-R", path)["Recipients"] == lines.splitlines()


@pytest.mark.parametrize("verb", ["reseal", "remove-recipient"])
def test_a_change_that_locks_out_its_operator_needs_yes(
    keyring: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """The refusal names the recipients that would be removed, and changes nothing."""
    mine = first_recipient(keyring)
    change(keyring, "add-recipient", "--recipient", ONE.recipient, "--recipient", TWO.recipient)
    others = [ONE.recipient, TWO.recipient]
    arguments = [word for text in (others if verb == "reseal" else [mine]) for word in ("--recipient", text)]
    before = keyring.read_bytes()
    run(verb, keyring, *arguments, "--unseal", keyring.parent / "identity", code=1)
    said = capsys.readouterr().err
    assert "--unseal could no longer open it" in said
    assert mine in said
    assert "--yes" in said
    assert keyring.read_bytes() == before
    run(verb, keyring, *arguments, "--unseal", keyring.parent / "identity", "--yes", "--json")
    assert json.loads(capsys.readouterr().out)["Removed"] == [mine]
    run("list", keyring, "--unseal", keyring.parent / "identity", code=1)
    run("list", keyring, "--unseal", secret_file(keyring.parent / "one", ONE.identity))


def test_a_change_that_leaves_one_recipient_needs_yes(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rule holds even if the last recipient is the operator's own."""
    mine = first_recipient(keyring)
    change(keyring, "add-recipient", "--recipient", ONE.recipient)
    for verb, recipient in (("reseal", mine), ("remove-recipient", ONE.recipient)):
        run(verb, keyring, "--recipient", recipient, "--unseal", keyring.parent / "identity", code=1)
        said = capsys.readouterr().err
        assert "one recipient would be left" in said
        assert "could not open" not in said
        assert ONE.recipient in said
    change(keyring, "remove-recipient", "--recipient", ONE.recipient, "--yes")
    assert opened(keyring).recipients == [mine]


@pytest.mark.usefixtures("quick_scrypt")
def test_a_passphrase_in_place_of_recipients_needs_yes(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No identity opens the keyring afterwards. A new passphrase in place of an old one needs none."""
    phrase = secret_file(keyring.parent / "pass", "a passphrase of many words")
    arguments = ["--passphrase-file", phrase, "--unseal", keyring.parent / "identity"]
    run("reseal", keyring, *arguments, code=1)
    assert "could no longer open it" in capsys.readouterr().err
    run("reseal", keyring, *arguments, "--yes")
    run("reseal", keyring, "--passphrase-file", phrase, "--unseal", phrase)
    run("recipients", keyring, "--unseal", phrase)
    assert capsys.readouterr().out.splitlines()[-1] == "# sealed to a passphrase"
    run("add-recipient", keyring, "--recipient", ONE.recipient, "--unseal", phrase, code=1)
    assert "sealed to a passphrase: `keyring reseal`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "recipient", "why"),
    [
        ("add-recipient", "mine", "a recipient of the keyring already"),
        ("remove-recipient", ONE.recipient, "not a recipient of the keyring; `keyring recipients` lists them"),
        ("remove-recipient", "mine", "removes every recipient"),
        ("remove-recipient", "age1x", "is not a recipient"),
    ],
    ids=["there already", "not there", "the last one", "no recipient"],
)
def test_a_wrong_recipient_changes_nothing(
    keyring: Path, capsys: pytest.CaptureFixture[str], verb: str, recipient: str, why: str
) -> None:
    """An invalid or unknown recipient is refused, also with --yes."""
    before = keyring.read_bytes()
    text = first_recipient(keyring) if recipient == "mine" else recipient
    run(verb, keyring, "--recipient", text, "--yes", "--unseal", keyring.parent / "identity", code=1)
    assert why in capsys.readouterr().err
    assert keyring.read_bytes() == before


def test_recipient_verbs_without_a_recipient_are_wrong_usage(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("add-recipient", "remove-recipient"):
        with pytest.raises(SystemExit) as ended:
            run(verb, keyring, "--unseal", keyring.parent / "identity")
        assert ended.value.code == 2
        assert "--recipients-file is required" in capsys.readouterr().err


def test_unnamed_recipients_are_counted_and_not_dropped(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that was sealed by hand: only a reseal, which warns, drops those that the content does not name."""
    mine = first_recipient(keyring)
    content = Unsealer.read(keyring.parent / "identity").unseal(keyring.read_bytes())
    keyring.write_bytes(seal(bytes(content), [mine, ONE.recipient], None))
    run("recipients", keyring, "--unseal", keyring.parent / "identity")
    said = capsys.readouterr()
    assert "is sealed to 2 recipients and names 1" in said.err
    assert "reseal" in said.err
    assert said.out.splitlines()[-1] == mine
    before = keyring.read_bytes()
    for verb, recipient in (("add-recipient", TWO.recipient), ("remove-recipient", mine)):
        run(verb, keyring, "--recipient", recipient, "--unseal", keyring.parent / "identity", "--yes", code=1)
        assert "sealed by hand" in capsys.readouterr().err
    assert keyring.read_bytes() == before
    run("reseal", keyring, "--recipient", mine, "--recipient", TWO.recipient, "--unseal", keyring.parent / "identity")
    assert "sealed by hand to 1 more recipients than it named" in capsys.readouterr().err


def test_keyring_without_named_recipients_is_reported(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A keyring without names is not mistaken for one that is sealed to a passphrase."""
    mine = first_recipient(keyring)
    raw = json.loads(Unsealer.read(keyring.parent / "identity").unseal(keyring.read_bytes()))
    keyring.write_bytes(seal(json.dumps({**raw, "Recipients": []}).encode(), [mine], None))
    capsys.readouterr()
    run("recipients", keyring, "--unseal", keyring.parent / "identity")
    said = capsys.readouterr()
    assert "passphrase" not in said.out
    assert "is sealed to 1 recipients and names 0" in said.err


def test_an_init_with_one_recipient_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The keyring is made, and standard error has the warning; an offline recipient prevents it."""
    run("init", tmp_path / "a.age", "--new-identity", tmp_path / "a", "--json")
    said = capsys.readouterr()
    assert "warning: " in said.err
    assert "every key is lost" in said.err
    assert json.loads(said.out)["Recipients"]
    run("init", tmp_path / "b.age", "--new-identity", tmp_path / "b", "--recipient", ONE.recipient, "--json")
    said = capsys.readouterr()
    assert said.err == ""
    recipients = json.loads(said.out)["Recipients"]
    assert recipients[1:] == [ONE.recipient]
    for identity in (tmp_path / "b", secret_file(tmp_path / "one", ONE.identity)):
        run("list", tmp_path / "b.age", "--unseal", identity)


def test_a_new_identity_has_the_recipient_that_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`new-identity` and `recipient-of` print the recipient; the file has mode 0600 and is never overwritten."""
    run("new-identity", tmp_path / "i")
    (printed,) = capsys.readouterr().out.split()
    run("recipient-of", tmp_path / "i")
    assert capsys.readouterr().out == f"{printed}\n"
    run("recipient-of", tmp_path / "i", "--json")
    assert json.loads(capsys.readouterr().out) == {"Identity": str(tmp_path / "i"), "Recipients": [printed]}
    assert (tmp_path / "i").stat().st_mode & 0o777 == 0o600
    run("new-identity", tmp_path / "i", code=1)
    assert "never overwritten" in capsys.readouterr().err


def test_every_identity_in_a_file_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Recipients are printed in the order of the file's identities."""
    run("recipient-of", secret_file(tmp_path / "two", f"# first\n{ONE.identity}\n\n{TWO.identity}\n"))
    assert capsys.readouterr().out.split() == [ONE.recipient, TWO.recipient]


@program("ssh-keygen", "openssh-client")
@pytest.mark.parametrize(
    "options", [["-t", "ed25519"], ["-t", "rsa", "-b", "2048"], ["-t", "rsa", "-b", "2048", "-m", "PEM"]], ids="-".join
)
def test_an_ssh_identity_has_the_recipient_of_ssh_keygen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """The recipient is the same for both forms of a private key, and a keyring sealed to it opens."""
    subprocess.run(["ssh-keygen", "-q", *options, "-N", "", "-C", "", "-f", tmp_path / "k"], check=True)
    run("recipient-of", tmp_path / "k")
    printed = capsys.readouterr().out.strip()
    assert printed == (tmp_path / "k.pub").read_text().strip()
    run("init", tmp_path / "k.age", "--recipient", printed)
    run("list", tmp_path / "k.age", "--unseal", tmp_path / "k")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("correct horse battery", "contains no identity"),
        (ONE.recipient, "it looks like"),
        (f"{ONE.identity}\nnonsense", "line 2: not an age identity"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA", "not an age identity or an unencrypted SSH private key"),
    ],
    ids=["text", "a recipient", "a second line", "a cut SSH key"],
)
def test_a_file_without_an_identity_has_no_recipient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, why: str
) -> None:
    """The error does not show the file's content."""
    run("recipient-of", secret_file(tmp_path / "f", content), code=1)
    said = capsys.readouterr()
    assert why in said.err
    assert (said.out, "correct horse" in said.err, ONE.identity in said.err) == ("", False, False)


def test_reseal_repairs_two_keys_that_were_named_as_one(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An earlier version wrote such a keyring; the reseal prints its line as removed."""
    mine = first_recipient(keyring)
    odd = f"{mine}\n{ONE.recipient}"
    raw = json.loads(Unsealer.read(keyring.parent / "identity").unseal(keyring.read_bytes()))
    keyring.write_bytes(seal(json.dumps({**raw, "Recipients": [odd]}).encode(), [mine], None))
    capsys.readouterr()
    both = ["--recipient", mine, "--recipient", ONE.recipient]
    run("reseal", keyring, *both, "--unseal", keyring.parent / "identity", "--json")
    assert json.loads(capsys.readouterr().out)["Removed"] == [odd]


def test_keyring_with_an_unknown_section_is_not_changed(keyring: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A verb that does not know a field would drop it."""
    before = keyring.read_bytes()
    rewritten(keyring, lambda raw: raw.update(Hosts=[]))
    written = keyring.read_bytes()
    assert written != before
    run("add-recipient", keyring, "--recipient", ONE.recipient, "--unseal", keyring.parent / "identity", code=1)
    assert "written by a newer program" in capsys.readouterr().err
    assert keyring.read_bytes() == written
