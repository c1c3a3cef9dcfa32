"""`keyferry encrypt-file`, `decrypt-file` and `module init`, as a shell sees them: OUT appears whole, or not at all."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.agent import PATIENCE, RunningAgent
from support.interrupting import interrupted
from support.keyring import configuration
from support.quick_scrypt import QUICK_CLIENT
from support.secrets import secret_file
from support.skip_unless import ROOT

from keyferry import command, new_files
from keyferry.files import FileError, replacing, stream
from keyferry.module import SoftwareModule
from keyferry.parameters import decode_base64
from keyferry_agent.crypto.public_key import fingerprint

pytestmark = pytest.mark.usefixtures("quick_scrypt")
PASSPHRASE = "correct horse"


class Place(NamedTuple):
    """A folder with a store that has records a and b, a module, and an agent to ask."""

    folder: Path
    agent: RunningAgent

    @property
    def module(self) -> list[str]:
        return ["--module", str(self.folder / "module"), "--passphrase-file", str(self.folder / "passphrase")]

    @property
    def socket(self) -> list[str]:
        return ["--socket", str(self.agent.socket)]

    def encrypt(self, source: object, target: object, *, record: str = "a") -> list[str]:
        """The arguments of encrypt-file."""
        store = ["--store", f"sqlite:///{self.folder / 'records.sqlite'}"]
        return ["encrypt-file", str(source), str(target), "--record", record, *store, *self.module, *self.socket]

    def decrypt(self, source: object, target: object) -> list[str]:
        """The arguments of decrypt-file."""
        return ["decrypt-file", str(source), str(target), *self.module, *self.socket]

    def files(self) -> set[str]:
        """Return the new files in the folder."""
        return set(os.listdir(self.folder)) - {"records.sqlite", "module", "passphrase"}


@pytest.fixture(scope="module")
def module() -> SoftwareModule:
    """One for all: opening its file is slow on purpose."""
    return SoftwareModule.generate("EC_SM2")


@pytest.fixture
def place(tmp_path: Path, agent: RunningAgent, module: SoftwareModule, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A folder to work in."""
    secret_file(tmp_path / "passphrase", f"{PASSPHRASE}\nmore\n")
    (tmp_path / "module").touch()
    monkeypatch.setattr(SoftwareModule, "load", lambda _path, _passphrase: module)
    made = Place(tmp_path, agent)
    store = f"sqlite:///{tmp_path / 'records.sqlite'}"
    for name in "ab":
        arguments = ["records", "add", name, "--KeyId", "alias/dev", "--store", store, *made.socket]
        assert command.main([*arguments, "--EncryptionContext", '{"tenant": "acme"}']) == 0
    return made


def run(arguments: list[str], **options: Any) -> "subprocess.CompletedProcess[bytes]":
    """The command in a process of its own."""
    return subprocess.run([*QUICK_CLIENT, *arguments], capture_output=True, timeout=PATIENCE, check=False, **options)


def test_file_is_encrypted_and_decrypted_by_commands(
    tmp_path: Path, agent: RunningAgent, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands make a module, encrypt a file and decrypt it; decrypting needs no store."""
    place = Place(tmp_path, agent)
    secret_file(tmp_path / "passphrase", PASSPHRASE)
    file = str(tmp_path / "module")
    made = run(["module", "init", file, *place.module[2:]])
    shown = json.loads(made.stdout)
    assert (shown["WrappingKeySpec"], shown["WrappingAlgorithm"]) == ("RSA_2048", "RSAES_OAEP_SHA_256")
    assert (tmp_path / "module").stat().st_mode & 0o777 == 0o600
    assert SoftwareModule.load(file, PASSPHRASE).public_key_blob == shown["PublicKeyBlob"]
    store = f"sqlite:///{tmp_path / 'records.sqlite'}"
    assert run(["records", "add", "a", "--KeyId", "alias/dev", "--store", store, *place.socket]).returncode == 0
    plain, sealed, opened = (tmp_path / name for name in ("plain", "sealed", "opened"))
    plain.write_bytes(os.urandom(3 * stream.CHUNK + 7))
    ended = run(place.encrypt(plain, sealed))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
    ended = run(place.decrypt(sealed, opened))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
    assert opened.read_bytes() == plain.read_bytes()
    assert opened.stat().st_mode & 0o777 == 0o600
    secret_file(tmp_path / "passphrase", "wrong")
    opened.unlink()
    ended = run(place.decrypt(sealed, opened))
    assert (ended.returncode, b"wrong passphrase" in ended.stderr) == (1, True)
    assert not opened.exists()


@pytest.mark.parametrize("key_spec", ["RSA_2048", "EC_SM2"])
def test_module_init_prints_the_fingerprint_for_a_grant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key_spec: str
) -> None:
    """`keyferry-agent fingerprint` prints the same, and a module file is never overwritten."""
    secret_file(tmp_path / "passphrase", PASSPHRASE)
    arguments = ["module", "init", str(tmp_path / "m"), "--passphrase-file", str(tmp_path / "passphrase")]
    assert command.main([*arguments, "--key-spec", key_spec]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["Recipient"] == fingerprint(decode_base64(shown["PublicKeyBlob"]))
    before = (tmp_path / "m").read_bytes()
    assert command.main(arguments) == 1
    assert "never overwritten" in capsys.readouterr().err
    assert (tmp_path / "m").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "is empty"), (b"\nx", "is empty"), (b"\xff", "not text"), (None, "No such file")],
)
def test_empty_passphrase_file_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, why: str
) -> None:
    """No module file is made."""
    if content is not None:
        secret_file(tmp_path / "passphrase", content)
    arguments = ["module", "init", str(tmp_path / "m"), "--passphrase-file", str(tmp_path / "passphrase")]
    assert command.main(arguments) == 1
    assert why in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_unusable_module_path_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], agent: RunningAgent) -> None:
    """The message has the path that cannot be created or read."""
    secret_file(tmp_path / "passphrase", PASSPHRASE)
    (tmp_path / "in").write_bytes(b"keyferry-file/1\n" + bytes(4 + 92))
    passphrase = ["--passphrase-file", str(tmp_path / "passphrase")]
    assert command.main(["module", "init", str(tmp_path / "none" / "m"), *passphrase]) == 1
    assert "none/m: No such file" in capsys.readouterr().err
    store = ["--store", f"sqlite:///{tmp_path / 'records.sqlite'}"]
    assert command.main(["records", "add", "a", "--KeyId", "alias/dev", *store, "--socket", str(agent.socket)]) == 0
    arguments = ["encrypt-file", str(tmp_path / "in"), str(tmp_path / "out"), "--record", "a", *store, *passphrase]
    assert command.main([*arguments, "--module", str(tmp_path / "m")]) == 1
    assert "/m: No such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_commands_read_and_write_pipes(tmp_path: Path, agent: RunningAgent) -> None:
    """`-` is standard input or output."""
    place = Place(tmp_path, agent)
    secret_file(tmp_path / "passphrase", PASSPHRASE)
    SoftwareModule.generate("RSA_2048").save(tmp_path / "module", PASSPHRASE)
    store = f"sqlite:///{tmp_path / 'records.sqlite'}"
    assert command.main(["records", "add", "a", "--KeyId", "alias/dev", "--store", store, *place.socket]) == 0
    plaintext = os.urandom(2 * stream.CHUNK)
    sealed = run(place.encrypt("-", "-"), input=plaintext)
    assert (sealed.returncode, sealed.stderr) == (0, b"")
    opened = run(place.decrypt("-", "-"), input=sealed.stdout)
    assert (opened.returncode, opened.stderr, opened.stdout) == (0, b"", plaintext)
    cut = run(place.decrypt("-", "-"), input=sealed.stdout[:-1])
    assert (cut.returncode, cut.stdout) == (1, b"")
    assert cut.stderr.startswith(b"keyferry: -: damaged, cut off")
    with open("/dev/full", "wb") as full:
        for arguments, given in ((place.encrypt("-", "-"), plaintext), (place.decrypt("-", "-"), sealed.stdout)):
            ended = subprocess.run(
                [*QUICK_CLIENT, *arguments],
                input=given,
                stdout=full,
                stderr=subprocess.PIPE,
                timeout=PATIENCE,
                check=False,
            )
            assert (ended.returncode, ended.stderr) == (1, b"keyferry: - to -: No space left on device\n")


@pytest.mark.parametrize("damage", ["bit", "cut", "more", "nothing"])
def test_damaged_file_leaves_out_unchanged(place: Place, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    """An old OUT stays, and no other file is left beside it."""
    plain, sealed, opened = (place.folder / name for name in ("plain", "sealed", "opened"))
    plain.write_bytes(os.urandom(2 * stream.CHUNK))
    assert command.main(place.encrypt(plain, sealed)) == 0
    file = bytearray(sealed.read_bytes())
    if damage == "bit":
        file[-1] ^= 1
    sealed.write_bytes(bytes({"bit": file, "cut": file[:-1], "more": file + b"x", "nothing": bytearray()}[damage]))
    for there in (None, b"old"):
        if there:
            opened.write_bytes(there)
        capsys.readouterr()
        assert command.main(place.decrypt(sealed, opened)) == 1
        assert capsys.readouterr().err.startswith(
            (f"keyferry: {sealed}: damaged, ", f"keyferry: {sealed}: not a file ")
        )
        assert (opened.read_bytes() if opened.exists() else None) == there
    assert place.files() == {"plain", "sealed", "opened"}


def test_another_record_in_the_header_opens_nothing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The data key of another record does not fit, and the agent refuses a damaged record."""
    plain = place.folder / "plain"
    plain.write_bytes(b"plaintext")
    headers = []
    for record in "ab":
        assert command.main(place.encrypt(plain, place.folder / record, record=record)) == 0
        file = (place.folder / record).read_bytes()
        end = 20 + int.from_bytes(file[16:20], "big")
        headers.append((file[:end], file[end:]))
    (place.folder / "mixed").write_bytes(headers[0][0] + headers[1][1])
    assert command.main(place.decrypt(place.folder / "mixed", place.folder / "out")) == 1
    assert "damaged, cut off" in capsys.readouterr().err
    blob = headers[0][0].index(b'"CiphertextBlob":"') + 100
    changed = bytearray(headers[0][0])
    changed[blob] ^= 1
    (place.folder / "mixed").write_bytes(changed + headers[0][1])
    assert command.main(place.decrypt(place.folder / "mixed", place.folder / "out")) == 1
    assert json.loads(capsys.readouterr().err)["Code"] == "InvalidParameter"
    assert not (place.folder / "out").exists()


def test_modules_with_a_pinned_fingerprint_decrypt(
    place: Place, keyring: Path, socket_path: Path, module: SoftwareModule, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module without a fingerprint in the grant is refused, and OUT is not written."""
    (place.folder / "plain").write_bytes(b"plaintext")
    second, third = SoftwareModule.generate("RSA_2048"), SoftwareModule.generate("RSA_2048")
    pins = [f'"{fingerprint(decode_base64(each.public_key_blob))}"' for each in (module, second)]
    config = keyring.parent / "agent.toml"
    config.write_text(configuration(keyring) + f"recipients = [{', '.join(pins)}]\n")
    with RunningAgent(["--config", str(config)], socket_path) as agent, pytest.MonkeyPatch.context() as patch:
        there = Place(place.folder, agent)
        store = f"sqlite:///{place.folder / 'records.sqlite'}"
        assert command.main(["records", "add", "p", "--KeyId", "alias/a", "--store", store, *there.socket]) == 0
        assert command.main(there.encrypt(place.folder / "plain", place.folder / "sealed", record="p")) == 0
        patch.setattr(SoftwareModule, "load", lambda _path, _passphrase: second)
        assert command.main(there.decrypt(place.folder / "sealed", place.folder / "opened")) == 0
        patch.setattr(SoftwareModule, "load", lambda _path, _passphrase: third)
        capsys.readouterr()
        assert command.main(there.decrypt(place.folder / "sealed", place.folder / "none")) == 1
    assert json.loads(capsys.readouterr().err)["Code"] == "Forbidden.NoPermission"
    assert (place.folder / "opened").read_bytes() == b"plaintext"
    assert not (place.folder / "none").exists()


# --- where OUT is -----------------------------------------------------------------------------------------------------


def test_in_is_never_replaced_by_its_own_result(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """IN and OUT may not be one file under any of its names."""
    plain = place.folder / "plain"
    plain.write_bytes(b"plaintext")
    (place.folder / "symlink").symlink_to(plain)
    (place.folder / "hardlink").hardlink_to(plain)
    for source in ("plain", "symlink"):
        for target in ("plain", "symlink", "hardlink", "../" + place.folder.name + "/plain"):
            assert command.main(place.encrypt(place.folder / source, place.folder / target)) == 1
            assert "OUT is the same file as IN" in capsys.readouterr().err
    assert plain.read_bytes() == b"plaintext"


def test_unusable_out_paths_are_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A device or directory is not replaced, and a missing directory is not created."""
    (place.folder / "plain").write_bytes(b"plaintext")
    (place.folder / "null").symlink_to("/dev/null")
    for target, why in (
        (place.folder / "null", "/dev/null: not a regular file"),
        (place.folder, "not a regular file"),
        (place.folder / "none" / "out", "No such file"),
        (place.folder / "plain" / "out", "Not a directory"),
        (place.folder / ("x" * 300), "File name too long"),
    ):
        assert command.main(place.encrypt(place.folder / "plain", target)) == 1
        assert why in capsys.readouterr().err
    for source in (place.folder, place.folder / "none"):
        assert command.main(place.encrypt(source, place.folder / "out")) == 1
        assert str(source) in capsys.readouterr().err
    assert command.main(place.encrypt(place.folder / "plain", place.folder / "out", record="none")) == 1
    assert "there is no record none" in capsys.readouterr().err
    assert place.files() == {"plain", "null"}


@pytest.fixture(params=["unnamed", "named"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with files that have no name, and one without."""
    if request.param == "named":
        monkeypatch.setattr(new_files, "_UNNAMED", os.O_RDWR)  # of a directory: refused, as such a file system refuses
    name: str = request.param
    return name


def test_out_replaces_the_target_of_a_symlink(tmp_path: Path, kind: str) -> None:
    """The symlink stays, and the old file is there until the new one is complete."""
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    mask = os.umask(0o022)
    try:
        with replacing(str(tmp_path / "link"), mode=0o666) as file:
            file.write(b"new")
            file.flush()
            assert (tmp_path / "real").read_bytes() == b"old"
            assert len(os.listdir(tmp_path)) == (2 if kind == "unnamed" else 3)
    finally:
        os.umask(mask)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o644
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("error", [FileError("x"), OSError("x"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, kind: str, error: BaseException) -> None:
    """Any exception in the block removes the new file."""

    def fail() -> None:
        with replacing(str(tmp_path / "out")) as file:
            file.write(b"x")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert os.listdir(tmp_path) == []


def test_unwritable_directory_is_named(tmp_path: Path, kind: str) -> None:
    """No user can create a file in /proc."""
    with pytest.raises(OSError, match=r"."), replacing("/proc/out"):
        pass


@pytest.fixture
def stalled(tmp_path: Path, agent: RunningAgent) -> Iterator[tuple[Path, "subprocess.Popen[bytes]", int]]:
    """An encryption whose input pipe has delivered some chunks and stays open."""
    place = Place(tmp_path, agent)
    secret_file(tmp_path / "passphrase", PASSPHRASE)
    SoftwareModule.generate("RSA_2048").save(tmp_path / "module", PASSPHRASE)
    store = f"sqlite:///{tmp_path / 'records.sqlite'}"
    assert command.main(["records", "add", "a", "--KeyId", "alias/dev", "--store", store, *place.socket]) == 0
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "there").mkdir()
    running = subprocess.Popen([*QUICK_CLIENT, *place.encrypt(tmp_path / "pipe", tmp_path / "there" / "out")])
    pipe = os.open(tmp_path / "pipe", os.O_WRONLY)
    for _ in range(20):  # more than any pipe holds: when the last is taken, chunks have been written
        os.write(pipe, bytes(stream.CHUNK))
    yield tmp_path / "there", running, pipe
    os.close(pipe)
    running.kill()
    running.wait(PATIENCE)


def test_a_kill_in_the_middle_leaves_nothing_at_all(
    stalled: tuple[Path, "subprocess.Popen[bytes]", int],
) -> None:
    """A killed command leaves no temporary file either."""
    folder, running, _pipe = stalled
    running.kill()
    assert running.wait(PATIENCE) == -signal.SIGKILL
    assert os.listdir(folder) == []


def test_interrupt_leaves_no_file_and_no_traceback(
    stalled: tuple[Path, "subprocess.Popen[bytes]", int],
) -> None:
    """Control-C is not an error of the program."""
    folder, running, _pipe = stalled
    assert interrupted(running)[0] == 130
    assert os.listdir(folder) == []


def test_the_library_works_as_its_documentation_shows(
    place: Place, agent: RunningAgent, module: SoftwareModule
) -> None:
    """The example in the package's docstring runs."""
    from keyferry.files import decrypt, encrypt, read_header  # noqa: PLC0415

    with agent.client() as kms:
        key, record = module.new_data_key(kms, key_id="alias/dev")
        with (ROOT / "README.md").open("rb") as source, (place.folder / "sealed").open("wb") as target:
            encrypt(source, target, module, key, record)
        with (place.folder / "sealed").open("rb") as source, replacing(str(place.folder / "opened")) as out:
            header = read_header(source)
            decrypt(source, out, module, module.recover_data_key(kms, header.record), header)
    assert (place.folder / "opened").read_bytes() == (ROOT / "README.md").read_bytes()
