"""Callers whom an agent cannot see whole, as real processes: of other namespaces, and with a reused number."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.agent import PATIENCE, RunningAgent
from support.keyring import configuration
from support.skip_unless import ROOT, root

pytestmark = root()

INTERPRETER = os.path.realpath(sys.executable)
ASKING = """
import os, sys
sys.path[:] = sys.argv[3].split(":")
import ctypes, keyferry, socket
uid = int(sys.argv[2])
if uid:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
if sys.argv[4:] == ["root in a user namespace"]:
    libc = ctypes.CDLL(None)
    assert libc.prctl(4, 1, 0, 0, 0) == 0 and libc.unshare(0x10000000) == 0
    open("/proc/self/uid_map", "w").write(f"0 {uid} 1")
    assert os.getuid() == 0
try:
    keyferry.Client(sys.argv[1], timeout=60).describe_key(key_id="alias/a")
    print("OK")
except keyferry.KmsError as error:
    print(error.code)
"""
OTHER = 4_711
"""A user that has no name, and no part in anything."""
REFUSED = "Forbidden.NoPermission"


@contextmanager
def agent_in(namespaces: Sequence[str], keyring: Path, to: str) -> Iterator[Path]:
    """Run an agent in namespaces of its own (`unshare`), with one grant of everything; yield its open socket."""
    config = keyring.parent / "agent.toml"
    text = configuration(keyring, more='mode = "0666"').replace(f"to={{uid={os.getuid()}}}", f"to={{{to}}}")
    assert to in text
    config.write_text(text)
    with tempfile.TemporaryDirectory(prefix="keyferry-test-") as folder:  # pytest's own are closed to other users
        os.chmod(folder, 0o755)
        path = Path(folder) / "s"
        with RunningAgent(["--config", str(config)], path, prefix=["unshare", *namespaces]):
            yield path


def outcome(path: Path, *more: str, prefix: Sequence[str] = (), uid: int = 0) -> str:
    """Return the outcome of DescribeKey for a process that starts behind `prefix` as a user: OK, or a code."""
    command = [*prefix, INTERPRETER, "-c", ASKING, str(path), str(uid), ":".join(sys.path), *more]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("uid=0", "OK"),
        ('listener="default"', "OK"),
        (f'listener="default", exe="{INTERPRETER}"', REFUSED),
    ],
)
def test_caller_of_another_pid_namespace_has_only_its_user(keyring: Path, to: str, expected: str) -> None:
    """The kernel reports process 0, so evidence about the process is missing and matches nothing."""
    with agent_in(["--pid", "--fork", "--mount-proc", "--kill-child"], keyring, to) as path:
        assert outcome(path) == expected


def test_caller_of_a_child_pid_namespace_has_evidence(keyring: Path) -> None:
    """An agent of the host sees every container's processes."""
    with agent_in([], keyring, f'listener="default", exe="{INTERPRETER}"') as path:
        assert outcome(path, prefix=["unshare", "--pid", "--fork"]) == "OK"


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("uid=65534", REFUSED),
        (f"uid={OTHER}", REFUSED),
        ("gid=65534", REFUSED),
        (f"gid={OTHER}", REFUSED),
        ('listener="default"', "OK"),
    ],
)
def test_user_without_a_mapping_matches_no_grant(keyring: Path, to: str, expected: str) -> None:
    """The kernel reports the overflow uid, which stands for any unmapped user."""
    with agent_in(["--user", "--map-root-user"], keyring, to) as path:
        assert outcome(path, uid=OTHER) == expected


@pytest.mark.parametrize(("uid", "expected"), [(OTHER, "OK"), (0, REFUSED)])
def test_caller_in_its_own_user_namespace_has_its_outer_user(keyring: Path, uid: int, expected: str) -> None:
    """A root of such a namespace is the user who created it."""
    with agent_in([], keyring, f"uid={uid}") as path:
        assert outcome(path, "root in a user namespace", uid=OTHER) == expected


def test_mount_namespace_does_not_fake_a_trusted_program(keyring: Path, tmp_path: Path) -> None:
    """Any user can have a mount namespace in which any file is at any path."""
    trusted = tmp_path / "trusted"
    trusted.touch()
    with agent_in([], keyring, f'uid=0, exe="{trusted}"') as path:
        script = f'mount --bind {INTERPRETER} {trusted} && PYTHONHOME={sys.base_prefix} exec {trusted} "$@"'
        command = ["unshare", "--mount", "sh", "-c", script, "sh"]
        arguments = ["-c", ASKING, str(path), "0", ":".join(sys.path)]
        ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (ended.returncode, ended.stdout.strip()) == (0, REFUSED), ended.stderr
        # The very same, where that program really is at that path.
        shutil.copy(INTERPRETER, trusted)
        trusted.chmod(0o755)
        home = {**os.environ, "PYTHONHOME": sys.base_prefix}
        ended = subprocess.run([trusted, *arguments], capture_output=True, text=True, env=home, check=True)
        assert ended.stdout.strip() == "OK"


def test_reused_process_number_inherits_no_grant(keyring: Path) -> None:
    """A stopped agent accepts a connection late, and finds a trusted program at the number of the exited peer."""
    config = keyring.parent / "agent.toml"
    trusted = os.path.realpath("/bin/sleep")
    config.write_text(configuration(keyring).replace(f"to={{uid={os.getuid()}}}", f'to={{uid=0, exe="{trusted}"}}'))
    attack = ROOT / "tests" / "support" / "pid_reuse_attack.py"
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, str(attack)]
    ended = subprocess.run(
        [*command, str(config), str(keyring.parent / "s"), trusted],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, "closed without an answer"), ended.stderr
