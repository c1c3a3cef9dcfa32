"""A record gets a new data key, and encrypted files are moved to it; old ones open until then."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.agent import PATIENCE, RunningAgent
from support.quick_scrypt import QUICK_SCRYPT
from support.records import damage, opened
from support.secrets import secret_file
from test_file_commands import PASSPHRASE, Place, run
from test_records_command import Shell

from keyferry import command, files
from keyferry.ciphertext import data_key_size
from keyferry.files import stream
from keyferry.module import SoftwareModule
from keyferry.parameters import encode_base64
from keyferry.store import Store, StoreError, renew
from keyferry.store.record import new_record
from keyferry_agent.crypto import ciphertext_blob

pytestmark = pytest.mark.usefixtures("quick_scrypt")


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], store_url: str, agent: RunningAgent) -> Shell:
    """`keyferry records` on each kind of database."""
    return Shell(capsys, store_url, agent.socket)


@pytest.fixture(scope="module")
def module() -> SoftwareModule:
    """One for all: opening its file is slow on purpose."""
    return SoftwareModule.generate("EC_SM2")


@pytest.fixture
def place(tmp_path: Path, agent: RunningAgent, module: SoftwareModule, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A folder with a module, a store with the record a, and a file `sealed` that was encrypted with it."""
    secret_file(tmp_path / "passphrase", PASSPHRASE)
    (tmp_path / "module").touch()
    monkeypatch.setattr(SoftwareModule, "load", lambda _path, _passphrase: module)
    made = Place(tmp_path, agent)
    store = ["--store", f"sqlite:///{tmp_path / 'records.sqlite'}"]
    assert command.main(["records", "add", "a", "--KeyId", "alias/dev", *store, *made.socket]) == 0
    (tmp_path / "plain").write_bytes(os.urandom(3 * stream.CHUNK + 7))
    assert command.main(made.encrypt(tmp_path / "plain", tmp_path / "sealed")) == 0
    return made


def renewed(place: Place, name: str = "a") -> None:
    """Renew a record of a place."""
    store = ["--store", f"sqlite:///{place.folder / 'records.sqlite'}"]
    old_name = ["--old-name", os.urandom(8).hex()]  # a second renewal in one second has the same default
    assert command.main(["records", "renew", name, *old_name, *store, *place.socket]) == 0


def moving(place: Place, *targets: object, record: str = "a") -> list[str]:
    """The arguments of reencrypt-file for the file `sealed`."""
    encrypt = place.encrypt(place.folder / "sealed", "", record=record)
    return ["reencrypt-file", encrypt[1], *map(str, targets), *encrypt[3:]]


def plaintext(place: Place, path: Path) -> bytes:
    """Decrypt a file by the command."""
    assert command.main(place.decrypt(path, place.folder / "opened")) == 0
    return (place.folder / "opened").read_bytes()


# --- records renew ----------------------------------------------------------------------------------------------------


def test_a_renewed_record_has_a_new_key_and_the_old_one_stays(shell: Shell, agent: RunningAgent) -> None:
    """The old record has a name with the date; master key, context and size are the same."""
    context = '{"tenant": "acme"}'
    old = json.loads(
        shell("add", "a", "--KeyId", "alias/dev", "--NumberOfBytes", "16", "--EncryptionContext", context)[0]
    )
    shell("add", "b", "--KeyId", "alias/dev-sm4")
    with Store(shell.store) as store, agent.client() as kms:
        before = opened(store, kms)
        printed = json.loads(shell("renew", "a")[0])
        name = f"a@{old['Created']}"
        assert printed["Old"] == {**old, "Name": name}
        assert printed["New"] == json.loads(shell("show", "a")[0])
        assert (printed["New"]["KeyId"], printed["New"]["EncryptionContext"]) == (old["KeyId"], {"tenant": "acme"})
        after = opened(store, kms)
        assert after[name] == before["a"]
        assert after["b"] == before["b"]
        assert after["a"] != before["a"]
        assert len(after["a"]) == len(before["a"])
        assert [record.name for record in store] == [name, "b", "a"]
        assert json.loads(shell("rewrap")[0])["Records"] == 3


def test_old_record_gets_the_given_name(shell: Shell) -> None:
    """A name that is taken, invalid or too long is refused before a key is generated."""
    shell("add", "a", "--KeyId", "alias/dev")
    shell("add", "b", "--KeyId", "alias/dev")
    before = shell("list", "--json")
    for name, why in (("b", "b is taken"), (" x", "not a valid record name"), ("a", "a is taken")):
        assert why in shell("renew", "a", "--old-name", name, code=1)[1]
    assert "there is no record c" in shell("renew", "c", code=1)[1]
    assert shell("list", "--json") == before
    shell("renew", "a", "--old-name", "a before the leak")
    assert {line.split("\t")[0] for line in shell("list")[0].splitlines()} == {"a", "b", "a before the leak"}


def test_a_record_that_was_renamed_meanwhile_is_not_renewed(store_url: str, agent: RunningAgent) -> None:
    """One of two simultaneous renewals changes nothing."""
    with Store(store_url) as store, agent.client() as kms:
        store.add(new_record(kms, "a", key_id="alias/dev"))
        record = store.get("a")
        renew(store, kms, "a", old_name="first")
        before = list(store)
        with pytest.raises(StoreError, match="another process renamed it meanwhile"):
            store.renew(record, new_record(kms, "a", key_id="alias/dev"), "second")
        with pytest.raises(StoreError, match="first is taken"):
            store.renew(store.get("a"), new_record(kms, "a", key_id="alias/dev"), "first")
        assert list(store) == before


def test_a_damaged_record_is_not_renewed(shell: Shell) -> None:
    """A damaged blob and a damaged context are refused."""
    for name in "ab":
        shell("add", name, "--KeyId", "alias/dev")
    with Store(shell.store) as store:
        damage(store, "a", "ciphertext_blob", lambda blob: blob[:40])
        damage(store, "b", "encryption_context", lambda _: "nonsense")
    assert "a: its CiphertextBlob in the store is damaged" in shell("renew", "a", code=1)[1]
    assert "EncryptionContext in the store is damaged" in shell("renew", "b", code=1)[1]
    assert len(shell("list")[0].splitlines()) == 2


def test_the_size_of_a_data_key_is_that_of_the_format() -> None:
    """The client's number equals the agent's; another format has no size."""
    blob = bytearray(ciphertext_blob.OVERHEAD + 24)
    blob[36] = ciphertext_blob.FORMAT
    assert data_key_size(encode_base64(blob)) == 24
    blob[36] = 2
    for wrong in (encode_base64(blob), encode_base64(blob[: ciphertext_blob.OVERHEAD]), "*"):
        with pytest.raises(ValueError, match=r"."):
            data_key_size(wrong)


# --- reencrypt-file ---------------------------------------------------------------------------------------------------


def test_a_file_is_moved_in_place_and_keeps_its_mode(place: Place) -> None:
    """The file's header has the new record, and no other file is left in the folder."""
    sealed = place.folder / "sealed"
    sealed.chmod(0o640)
    before = sealed.read_bytes()
    renewed(place)
    assert command.main(moving(place)) == 0
    assert plaintext(place, sealed) == (place.folder / "plain").read_bytes()
    assert sealed.stat().st_mode & 0o777 == 0o640
    with open(sealed, "rb") as file:
        header = files.read_header(file)
    with Store(f"sqlite:///{place.folder / 'records.sqlite'}") as store:
        assert header.record == store.get("a").data_key_record()
    assert sealed.read_bytes() != before
    assert place.files() == {"plain", "sealed", "opened"}


def test_times_are_kept_with_preserve(place: Place) -> None:
    """Without --preserve, a backup by times finds the new file."""
    sealed = place.folder / "sealed"
    os.utime(sealed, (1, 2))
    renewed(place)
    assert command.main(moving(place, "--preserve")) == 0
    assert sealed.stat().st_mtime == 2
    renewed(place)
    assert command.main(moving(place)) == 0
    assert sealed.stat().st_mtime > 2


@pytest.mark.parametrize("size", [0, 1, stream.CHUNK, stream.CHUNK + 1])
def test_a_file_of_any_size_goes_to_out(place: Place, size: int) -> None:
    """IN is not changed."""
    (place.folder / "plain").write_bytes(bytes(size))
    assert command.main(place.encrypt(place.folder / "plain", place.folder / "sealed")) == 0
    before = (place.folder / "sealed").read_bytes()
    renewed(place)
    assert command.main(moving(place, place.folder / "moved")) == 0
    assert plaintext(place, place.folder / "moved") == bytes(size)
    assert (place.folder / "sealed").read_bytes() == before


def test_file_with_the_new_data_key_is_skipped(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning is printed, so a loop over many files can be repeated, also after a rewrap."""
    before = (place.folder / "sealed").stat()
    assert command.main(moving(place)) == 0
    assert "already encrypted with this record's data key" in capsys.readouterr().err
    assert (place.folder / "sealed").stat() == before
    assert command.main(moving(place, place.folder / "copy")) == 0
    assert plaintext(place, place.folder / "copy") == (place.folder / "plain").read_bytes()


def test_a_damaged_file_is_not_replaced(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """After a changed bit or a missing end, the file is unchanged and nothing is left beside it."""
    sealed = place.folder / "sealed"
    whole = sealed.read_bytes()
    renewed(place)
    for wrong in (
        whole[:-1],
        whole[: -stream.CHUNK],
        whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:],
        whole + b"x",
    ):
        sealed.write_bytes(wrong)
        assert command.main(moving(place)) == 1
        assert f"{sealed}: damaged, cut off" in capsys.readouterr().err
        assert sealed.read_bytes() == wrong
        assert place.files() == {"plain", "sealed"}


def test_a_new_file_with_other_content_is_not_kept(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is read back before it replaces the old one."""
    before = (place.folder / "sealed").read_bytes()
    renewed(place)
    write = stream._write

    def wrong(pieces: object, *others: object) -> None:
        write(((piece[::-1], final) for piece, final in pieces), *others)  # type: ignore[attr-defined, arg-type]

    monkeypatch.setattr(stream, "_write", wrong)
    assert command.main(moving(place)) == 1
    assert "does not decrypt to the same content" in capsys.readouterr().err
    assert (place.folder / "sealed").read_bytes() == before
    assert place.files() == {"plain", "sealed"}


def test_file_changed_meanwhile_is_not_replaced(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process wrote to the file or replaced it."""
    sealed, other = place.folder / "sealed", place.folder / "other"
    renewed(place)
    check = stream.plaintext_hash

    def replace() -> None:
        other.write_bytes(b"newer")
        os.replace(other, sealed)

    def append() -> None:
        with open(sealed, "ab") as file:
            file.write(b"newer")

    for act in (append, replace):
        assert command.main(place.encrypt(place.folder / "plain", sealed)) == 0
        renewed(place)
        monkeypatch.setattr(files, "plaintext_hash", lambda *arguments, act=act: (act(), check(*arguments))[1])
        assert command.main(moving(place)) == 1
        assert "another process changed the file meanwhile" in capsys.readouterr().err
        assert sealed.read_bytes().endswith(b"newer")


def test_irreplaceable_input_needs_an_out(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard input cannot be replaced, and a second name of a file would keep the old data key."""
    sealed = place.folder / "sealed"
    renewed(place)
    os.link(sealed, place.folder / "second")
    assert command.main(moving(place)) == 1
    assert "has 2 names (hard links)" in capsys.readouterr().err
    with open(sealed, "rb") as file:
        arguments = moving(place)
        arguments[1] = f"/dev/fd/{file.fileno()}"
        assert command.main(arguments) == 1
    assert "name an OUT" in capsys.readouterr().err
    assert command.main(moving(place, sealed)) == 1
    assert "OUT is the same file as IN" in capsys.readouterr().err


def test_pipe_is_re_encrypted_to_a_pipe(tmp_path: Path, agent: RunningAgent) -> None:
    """A process of its own needs only the store and the module's file."""
    made = Place(tmp_path, agent)
    secret_file(tmp_path / "passphrase", PASSPHRASE)
    assert run(["module", "init", str(tmp_path / "module"), *made.module[2:]]).returncode == 0
    store = ["--store", f"sqlite:///{tmp_path / 'records.sqlite'}"]
    for name in "ab":
        assert run(["records", "add", name, "--KeyId", "alias/dev", *store, *made.socket]).returncode == 0
    sealed = run(made.encrypt("-", "-"), input=b"content" * 20_000).stdout
    ended = run(["reencrypt-file", "-", "-", *made.encrypt("-", "-", record="b")[3:]], input=sealed)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b'"Name":"b"' in ended.stdout
    assert run(made.decrypt("-", "-"), input=ended.stdout).stdout == b"content" * 20_000
    ended = run(["reencrypt-file", "-", *made.encrypt("-", "-", record="b")[3:]], input=sealed)
    assert (ended.returncode, b"name an OUT" in ended.stderr) == (1, True)


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path, place: Place) -> None:
    """No other file is left, and none had plaintext in it."""
    renewed(place)
    before = (place.folder / "sealed").read_bytes()
    script = QUICK_SCRYPT + (
        "import os, signal, sys; from keyferry.files import stream; from keyferry import command, module\n"
        "gcm = stream._opened\n"
        "def opened(*arguments):\n"
        "    for number, piece in enumerate(gcm(*arguments)):\n"
        "        if number == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield piece\n"
        "stream._opened = opened\n"
        "command.main(sys.argv[1:])\n"
    )
    real = tmp_path / "real"
    real.mkdir()
    made = Place(real, place.agent)
    secret_file(real / "passphrase", PASSPHRASE)
    assert run(["module", "init", str(real / "module"), *made.module[2:]]).returncode == 0
    arguments = moving(place)
    arguments[arguments.index("--module") + 1] = str(real / "module")
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, timeout=PATIENCE, check=False
    )
    assert ended.returncode == -9
    assert (place.folder / "sealed").read_bytes() == before
    assert place.files() == {"plain", "sealed", "real"}
