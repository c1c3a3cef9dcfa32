"""Files that other users can write, and secrets that other users can read, are refused: by the daemon and by all commands."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.agent import PATIENCE, RunningAgent
from support.keyring import configuration, run
from support.other_user import OTHER_USER
from support.secrets import secret_file
from support.skip_unless import root

from keyferry import private_files
from keyferry.module import ModuleError, SoftwareModule
from keyferry.module.pin import read_pin
from keyferry.private_files import ALLOW_OPEN_FILES, problems
from keyferry_agent.cli.main import main

GROUP = 4_300
"""A group that no user is in, unless the test says so."""


def chown(path: Path) -> None:
    """Give a file or a folder to another user."""
    os.chown(path, OTHER_USER, -1)


def mode(bits: int) -> Callable[[Path], None]:
    """Return a function that gives a file a mode."""
    return lambda path: path.chmod(bits)


def in_folder(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a function that changes the folder of a file."""
    return lambda path: change(path.parent)


WRITABLE = {
    "mode 0666": mode(0o666),
    "group-writable": mode(0o620),
    "world-writable": mode(0o602),
    "in a folder that all can write": in_folder(mode(0o777)),
    "in a folder that a group can write": in_folder(mode(0o770)),
    "below a folder that all can write": lambda path: path.parents[1].chmod(0o777),
}
OF_ANOTHER_USER = {
    "of another user": chown,
    "in a folder of another user": in_folder(chown),
    "below a folder of another user": lambda path: chown(path.parents[1]),
}
READABLE = {"mode 0644": mode(0o644), "group-readable": mode(0o640), "others can read": mode(0o604)}
FAULTS = [
    *[(kind, name, fault) for kind in ("config", "keyring", "identity") for name, fault in WRITABLE.items()],
    *[("identity", name, fault) for name, fault in READABLE.items()],
    *[("config", name, fault) for name, fault in OF_ANOTHER_USER.items() if os.geteuid() == 0],
    *[("identity", "of another user", chown) for _ in range(os.geteuid() == 0)],
]


@pytest.fixture
def place(tmp_path: Path) -> dict[str, Path]:
    """A configuration, a keyring and an identity, each in a folder of its own, two levels deep."""
    paths = {name: tmp_path / f"of-{name}" / name / name for name in ("config", "keyring", "identity")}
    for path in paths.values():
        path.parent.mkdir(parents=True, mode=0o755)
    run("init", paths["keyring"], "--new-identity", paths["identity"])
    run("create-key", paths["keyring"], "--unseal", paths["identity"], "--alias", "alias/a")
    text = configuration(paths["keyring"]).replace(str(paths["keyring"].parent / "identity"), str(paths["identity"]))
    paths["config"].write_text(text)
    assert main(["check", str(paths["config"])]) == 0
    return paths


@pytest.mark.parametrize(("kind", "fault"), [fault[::2] for fault in FAULTS], ids=[" ".join(f[:2]) for f in FAULTS])
def test_a_file_that_others_can_change_or_read_is_refused(
    place: dict[str, Path],
    socket_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    fault: Callable[[Path], None],
) -> None:
    """`check`, `run` and the verbs that read the file name the file."""
    fault(place[kind])
    capsys.readouterr()
    assert main(["check", str(place["config"])]) == 1
    assert f"{place[kind]}: " in capsys.readouterr().err
    agent = RunningAgent(["--config", str(place["config"])], socket_path)
    assert agent.wait() == 1
    agent.kill()
    assert f"{place[kind]}: " in "".join(agent.output)
    if kind == "config":
        verb = [
            "explain",
            "--config",
            str(place["config"]),
            "--uid",
            "1",
            "--action",
            "kms:Decrypt",
            "--key",
            "alias/a",
        ]
    else:
        verb = ["keyring", "rotate", str(place["keyring"]), "alias/a", "--unseal", str(place["identity"])]
    assert main(verb) == 1
    assert f"{place[kind]}: " in capsys.readouterr().err


def test_check_reports_every_fault_at_once(place: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The report covers files of all kinds and the configuration, with a remedy for each fault."""
    for path in place.values():
        path.chmod(0o666)
    place["config"].write_text(place["config"].read_text() + "bogus = 1\n")
    assert main(["check", str(place["config"])]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines[:3]) == sorted(
        [
            f"{place['config']}: mode 0666: other users can write it; chmod go-w {place['config']}",
            f"{place['keyring']}: mode 0666: other users can write it; chmod go-w {place['keyring']}",
            f"{place['identity']}: mode 0666: other users can read and write it; chmod 600 {place['identity']}",
        ]
    )
    assert "bogus" in lines[3]


def test_a_configuration_and_a_keyring_may_be_read(place: dict[str, Path], socket_path: Path) -> None:
    """A configuration holds no secret, and a keyring is sealed."""
    for kind in ("config", "keyring"):
        place[kind].chmod(0o444)
    with RunningAgent(["--config", str(place["config"])], socket_path) as agent:
        assert agent.stop() == 0


@pytest.mark.parametrize("kind", ["config", "keyring", "identity"])
def test_reload_refuses_an_open_file_and_keeps_the_old_state(
    place: dict[str, Path], socket_path: Path, kind: str
) -> None:
    """The agent notices a changed mode, and its repair too."""
    with RunningAgent(["--config", str(place["config"])], socket_path) as agent, agent.client() as kms:
        before = stat.S_IMODE(place[kind].stat().st_mode)
        place[kind].chmod(0o666)
        assert f"{place[kind]}: mode 0666" in agent.wait_for("reload.failed")["why"]
        assert kms.describe_key(key_id="alias/a").key_metadata.key_state == "Enabled"
        place[kind].chmod(before)
        agent.wait_for("reload.done")


@root()
def test_root_may_use_the_files_of_the_agents_user(place: dict[str, Path]) -> None:
    """systemd/README.md gives keyring and identity to that user. An identity of a third user is refused."""
    verb = ["keyring", "rotate", str(place["keyring"]), "alias/a", "--unseal", str(place["identity"])]
    for kind in ("keyring", "identity"):
        for path in (place[kind], place[kind].parent):
            chown(path)
    assert main(["check", str(place["config"])]) == 0
    assert main(verb) == 0
    assert place["keyring"].stat().st_uid == OTHER_USER
    os.chown(place["identity"], OTHER_USER + 1, -1)
    assert main(["check", str(place["config"])]) == 1
    assert main(verb) == 1


def found_as(user: int, groups: list[int], path: Path, *, secret: bool) -> list[str]:
    """The problems that a process of another user finds with an open file."""
    reading, writing = os.pipe()
    descriptor = os.open(path, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        os.setgroups(groups)
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        os.write(writing, json.dumps(problems(path, descriptor, secret=secret)).encode())
        os._exit(0)
    os.close(writing)
    os.close(descriptor)
    with open(reading) as file:
        found: list[str] = json.load(file)
    os.waitpid(child, 0)
    return found


@root()
def test_kubernetes_secret_may_be_readable_by_its_group(tmp_path: Path) -> None:
    """A kubelet mounts a Secret with defaultMode 0440 as root's, readable by the pod's fsGroup."""
    folder = tmp_path / "..2026"
    folder.mkdir(mode=0o755)
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "identity").symlink_to("..data/identity")
    secret_file(folder / "identity", "x")
    path = tmp_path / "identity"
    os.chown(path, 0, GROUP)
    for bits, groups, good in (
        (0o440, [GROUP], True),
        (0o640, [GROUP], True),
        (0o440, [], False),
        (0o460, [GROUP], False),
        (0o444, [GROUP], False),
        (0o644, [GROUP], False),
    ):
        path.chmod(bits)
        assert (found_as(OTHER_USER, groups, path, secret=True) == []) == good, oct(bits)
    os.chown(path, OTHER_USER, GROUP)  # its owner decides which group that is, not root
    path.chmod(0o440)
    assert found_as(OTHER_USER, [GROUP], path, secret=True)


@root()
def test_a_file_of_a_third_user_is_refused(tmp_path: Path) -> None:
    """The owner of a file can change it at any time."""
    path = secret_file(tmp_path / "config", "")
    path.chmod(0o644)
    assert found_as(OTHER_USER, [], path, secret=False) == []
    os.chown(path, 1_003, -1)
    (problem,) = found_as(OTHER_USER, [], path, secret=False)
    assert problem.startswith(f"{path}: belongs to user 1003, not to root or to the user running this; ")


def test_a_systemd_credential_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit's user is named in an access control list, whose mask appears as the group's bits."""
    path = secret_file(tmp_path / "identity", "x")
    tmp_path.chmod(0o500)
    path.chmod(0o400)
    assert not problems(path, secret=True)
    path.chmod(0o440)
    assert problems(path, secret=True)
    if os.geteuid() == 0:
        monkeypatch.setattr(private_files, "_CREDENTIALS", f"{tmp_path}/")
        assert not problems(path, secret=True)


def test_links_are_followed_and_their_folders_count(tmp_path: Path) -> None:
    """The folder of a link decides its target; a sticky folder protects the link from other users."""
    (tmp_path / "real").mkdir()
    (tmp_path / "open").mkdir()
    file, link = secret_file(tmp_path / "real" / "file", ""), tmp_path / "open" / "link"
    link.symlink_to(file)
    assert not problems(link, secret=True)
    (tmp_path / "open").chmod(0o1777)
    assert not problems(link, secret=True)
    (tmp_path / "open").chmod(0o777)
    assert f"its folder {tmp_path / 'open'} has mode 0777" in problems(link, secret=True)[0]
    (tmp_path / "open").chmod(0o755)
    (tmp_path / "real").chmod(0o777)
    assert f"its folder {tmp_path / 'real'} has mode 0777" in problems(link, secret=True)[0]
    (tmp_path / "real").chmod(0o755)
    file.chmod(0o644)
    assert f"{link}: mode 0644: other users can read it" in problems(link, secret=True)[0]


@root()
def test_the_folders_of_a_read_only_mount_are_not_judged(tmp_path: Path) -> None:
    """The folder of a mounted ConfigMap has mode 0777, but no user can write to it through the mount."""
    (tmp_path / "folder").mkdir(mode=0o755)
    secret_file(tmp_path / "folder" / "file", "")
    (tmp_path / "folder").chmod(0o777)
    code = (
        "import sys; from keyferry.private_files import problems\n"
        "print(len(problems(sys.argv[1] + '/file', secret=True)))"
    )
    mount = 'mount --bind "$1" "$1" && { [ "$2" = rw ] || mount -o remount,bind,ro "$1"; } && exec "$3" -c "$4" "$1"'
    for how, count in (("rw", "1"), ("ro", "0")):
        command = ["unshare", "--mount", "sh", "-c", mount, "sh", str(tmp_path / "folder"), how, sys.executable, code]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
        assert ended.stdout.strip() == count


def test_pipes_and_process_substitution_are_accepted(place: dict[str, Path]) -> None:
    """Only regular files are judged, one on standard input included."""
    list_keys = f"{sys.executable} -m keyferry_agent keyring list {place['keyring']} --unseal"
    identity = place["identity"]

    def shell(text: str) -> int:
        return subprocess.run(["bash", "-c", text], capture_output=True, check=False, timeout=PATIENCE).returncode

    assert shell(f"{list_keys} <(cat {identity})") == 0
    assert shell(f"cat {identity} | {list_keys} /dev/stdin") == 0
    assert shell(f"cat {identity} | {list_keys} /proc/self/fd/0") == 0
    assert shell(f"{list_keys} /dev/stdin < {identity}") == 0
    assert shell(f'{list_keys} /dev/stdin <<< "$(cat {identity})"') == 0
    identity.chmod(0o644)
    assert shell(f"cat {identity} | {list_keys} /dev/stdin") == 0
    assert shell(f"{list_keys} /dev/stdin < {identity}") == 1


def test_a_file_without_a_name_is_accepted(tmp_path: Path) -> None:
    """A parent process hands over memory as a descriptor. A named file that was removed meanwhile is still judged."""
    descriptor = os.memfd_create("identity")
    assert not problems(f"/proc/self/fd/{descriptor}", descriptor, secret=True)
    assert not problems(f"/dev/fd/{descriptor}", secret=True)
    os.close(descriptor)
    path = tmp_path / "file"
    path.touch(mode=0o644)
    with path.open() as file:
        path.unlink()
        assert problems(path, file.fileno(), secret=True)


def test_one_variable_switches_the_rule_off(
    place: dict[str, Path], socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is for platforms that cannot protect files better, and the agent warns."""
    for path in place.values():
        path.chmod(0o666)
        path.parent.chmod(0o777)
    for value, code in (("0", 1), ("", 1), ("1", 0)):
        monkeypatch.setenv(ALLOW_OPEN_FILES, value)
        assert main(["check", str(place["config"])]) == code
        assert main(["keyring", "list", str(place["keyring"]), "--unseal", str(place["identity"])]) == code
    with RunningAgent(["--config", str(place["config"])], socket_path) as agent:
        agent.signal(signal.SIGHUP)
        agent.wait_for("reload.done")
    assert [line for line in agent.log if ALLOW_OPEN_FILES in line.get("what", "")]


@pytest.mark.usefixtures("quick_scrypt")
@pytest.mark.parametrize("bits", [0o644, 0o640, 0o620, 0o666])
def test_passphrases_pins_and_modules_have_to_be_private(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int
) -> None:
    """The agent's commands, the client's commands and the library refuse files that others can read."""
    passphrase = secret_file(tmp_path / "passphrase", "correct horse battery staple")
    keyring, module = tmp_path / "keyring.age", tmp_path / "module"
    SoftwareModule.generate("EC_SM2").save(module, "x")
    passphrase.chmod(bits)
    run("init", keyring, "--passphrase-file", passphrase, code=1)
    assert f"{passphrase}: mode {bits:04o}: other users can" in capsys.readouterr().err
    command = [sys.executable, "-m", "keyferry", "module", "init", str(tmp_path / "m"), "--passphrase-file"]
    ended = subprocess.run([*command, str(passphrase)], capture_output=True, text=True, check=False)
    assert (ended.returncode, f"{passphrase}: mode {bits:04o}" in ended.stderr) == (1, True)
    with pytest.raises(ModuleError, match=f"mode {bits:04o}: other users can"):
        read_pin(passphrase, None)
    module.chmod(bits)
    with pytest.raises(ModuleError, match=f"mode {bits:04o}: other users can"):
        SoftwareModule.load(module, "x")
