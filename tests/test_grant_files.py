"""Grants in files of their own: the files that are read or refused, and changes under a running agent."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.agent import PATIENCE, RawConnection, RunningAgent
from support.keyring import configuration, serving
from support.other_user import OTHER_USER
from support.skip_unless import root

from keyferry_agent.cli.main import main
from keyferry_agent.config.settings import SettingsError, read


def grant(name: str, *, actions: str = "kms:*", to: str = f"uid = {os.getuid()}", keys: str = "*") -> str:
    """The text of a grant to this user, or to another one."""
    return f'[[grant]]\nname = "{name}"\nto = {{ {to} }}\nactions = ["{actions}"]\nkeys = ["{keys}"]\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with a folder of grants beside it: first.toml and second.toml."""
    path = tmp_path / "agent.toml"
    path.write_text(grant("configured", actions="kms:ListKeys"))
    folder = tmp_path / "grants.d"
    folder.mkdir()
    (folder / "second.toml").write_text(grant("two", actions="kms:DescribeKey"))
    (folder / "first.toml").write_text(grant("one", actions="kms:Encrypt"))
    return path


def problems(config: Path) -> list[str]:
    """Return the faults of a configuration and its grants."""
    with pytest.raises(SettingsError) as caught:
        read(config)
    return caught.value.problems


def test_files_of_grants_are_read_in_the_order_of_their_names(config: Path) -> None:
    """The configuration's own grants come first, and each other grant has the path of its file."""
    grants = read(config).grants
    folder = config.parent / "grants.d"
    assert [(each.name, each.file) for each in grants] == [
        ("configured", None),
        ("one", folder / "first.toml"),
        ("two", folder / "second.toml"),
    ]


def test_a_setting_names_another_folder(config: Path) -> None:
    """The folder beside the configuration is not read if the setting names another."""
    other = config.parent / "elsewhere"
    other.mkdir()
    (other / "a.toml").write_text(grant("other"))
    config.write_text(f'grants_folder = "{other}"\n')
    assert [each.name for each in read(config).grants] == ["other"]


def test_a_folder_of_grants_need_not_exist(tmp_path: Path) -> None:
    """A missing folder beside the configuration and an empty folder have no grants."""
    config = tmp_path / "agent.toml"
    config.write_text("")
    assert read(config).grants == ()
    (tmp_path / "grants.d").mkdir()
    assert read(config).grants == ()


def test_a_named_folder_that_does_not_exist_stops_the_start(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` warns, as the folder may be on the host that the configuration is for."""
    config.write_text(f'grants_folder = "{config.parent / "none"}"\n')
    assert problems(config) == [f"grants_folder: {config.parent / 'none'} does not exist"]
    assert main(["check", str(config)]) == 0
    assert f"warning: grants_folder: {config.parent / 'none'} does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nonsense", "not TOML"),
        ('socket = "/run/a"\n', r"socket: a file of grants has \[\[grant\]\] tables only"),
        ("[limits]\nconnections = 5\n", r"limits: a file of grants has \[\[grant\]\] tables only"),
        ("[grant]\n", r"grant: expected tables: \[\[grant\]\]"),
        (grant("a").replace("actions", "action"), r"grant\[0\].action: unknown"),
        (grant("a", to='listener = "b"'), r"grant\[0\].to.listener: no listener is called 'b'"),
        (grant("a", to='exe = "/bin/a"'), r"grant\[0\].to: every user can run exe"),
        (grant("a", keys="acs:kms:other:0:key/*"), r"grant\[0\].keys: .* is not of this agent"),
        ("\ufeff", "begins with a byte order mark"),
    ],
)
def test_a_bad_file_of_grants_is_named(config: Path, text: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has the file's path and the grant's number in the file; `check` prints the same."""
    path = config.parent / "grants.d" / "second.toml"
    path.write_text(text, encoding="utf-8")
    (config.parent / "grants.d" / "third.toml").write_text("x = 1")
    found = problems(config)
    assert any(re.match(f"{re.escape(str(path))}: {why}", problem) for problem in found), found
    assert any("third.toml: x: a file of grants" in problem for problem in found)
    assert main(["check", str(config)]) == 1
    assert all(problem in capsys.readouterr().err for problem in found[:1])


def test_two_files_with_the_same_name_of_a_grant_are_named(config: Path) -> None:
    """The message has both files, because either may be the wrong one."""
    folder = config.parent / "grants.d"
    (folder / "second.toml").write_text(grant("one"))
    (problem,) = problems(config)
    assert problem.startswith(
        f"{folder / 'second.toml'}: grant[0].name: 'one' is also the name of {folder / 'first.toml'}:"
    )


def test_a_warning_names_the_file_and_the_grant(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning about two files names both, such as a grant that circumvents the other's recipients."""
    folder = config.parent / "grants.d"
    pin = f'recipients = ["sha256:{"0" * 64}"]\n'
    (folder / "second.toml").write_text(
        grant("two", actions="kms:ExportDataKey") + pin + grant("x", to='user = "none-x"')
    )
    (folder / "first.toml").write_text(grant("one", actions="kms:Decrypt"))
    (folder / "notes").write_text("")
    assert main(["check", str(config)]) == 0
    said = capsys.readouterr().err
    assert f"warning: {folder / 'second.toml'}: grant[0].recipients: {folder / 'first.toml'}: grant[0] has none" in said
    assert f"warning: {folder / 'second.toml'}: grant[1].to.user: this host has no user 'none-x'" in said
    assert f"warning: {folder}: 'notes' is not read" in said


def test_hidden_files_are_not_read(config: Path) -> None:
    """An editor makes them, and Kubernetes mounts a ConfigMap with them: links through `..data` lead to the files."""
    folder = config.parent / "grants.d"
    (folder / ".second.toml.swp").write_text("nonsense")
    (folder / ".#first.toml").symlink_to("nowhere")
    (folder / "..2026_1").mkdir()
    (folder / "first.toml").rename(folder / "..2026_1" / "first.toml")
    (folder / "..data").symlink_to("..2026_1")
    (folder / "first.toml").symlink_to("..data/first.toml")
    settings = read(config)
    assert [each.name for each in settings.grants] == ["configured", "one", "two"]
    assert settings.warnings == ()


def test_grant_files_have_to_be_regular_files(config: Path) -> None:
    """Reading a pipe would block, and a dangling link may have been a grant."""
    folder = config.parent / "grants.d"
    os.mkfifo(folder / "pipe.toml")
    (folder / "folder.toml").mkdir()
    (folder / "link.toml").symlink_to("nowhere")
    assert problems(config) == [
        f"{folder / 'folder.toml'}: Is a directory",
        f"{folder / 'link.toml'}: No such file or directory",
        f"{folder / 'pipe.toml'}: not a regular file",
    ]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_folder_that_others_can_write_is_refused(config: Path, mode: int) -> None:
    """A sticky folder is refused, too: other users could put files into it."""
    folder = config.parent / "grants.d"
    for each in folder.iterdir():
        each.unlink()
    folder.chmod(mode)
    (problem,) = problems(config)
    assert f"mode {mode:04o}: other users can" in problem
    assert problem.endswith(f"chmod go-w {folder}")


def test_a_file_that_others_can_write_is_refused(config: Path) -> None:
    """Grant files have the rule of the configuration."""
    path = config.parent / "grants.d" / "first.toml"
    path.chmod(0o666)
    assert problems(config) == [f"{path}: mode 0666: other users can write it; chmod go-w {path}"]


@root()
def test_a_file_of_another_user_is_refused(config: Path) -> None:
    """A folder of another user is refused, too."""
    folder = config.parent / "grants.d"
    os.chown(folder / "first.toml", OTHER_USER, -1)
    assert [each.partition(";")[0] for each in problems(config)] == [
        f"{folder / 'first.toml'}: belongs to user {OTHER_USER}, not to root or to the user running this"
    ]
    os.chown(folder, OTHER_USER, -1)
    assert f"{folder} belongs to user {OTHER_USER}" in problems(config)[0]


def explain(config: Path, *arguments: str) -> int:
    """Explain a request of this user."""
    return main(["explain", "--config", str(config), "--uid", str(os.getuid()), "--key", "alias/a", *arguments])


def test_explain_names_the_file_of_a_grant(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In text for a grant from the folder, and in JSON for each; a suggested grant may go into the folder."""
    folder = config.parent / "grants.d"
    assert explain(config, "--action", "kms:DescribeKey") == 0
    said = capsys.readouterr().out
    assert f"two ({folder / 'second.toml'}): allows it" in said
    assert "configured: actions:" in said
    assert explain(config, "--action", "kms:DescribeKey", "--json") == 0
    (decision,) = json.loads(capsys.readouterr().out)["decisions"]
    assert [(each["grant"], each["file"]) for each in decision["grants"]] == [
        ("configured", str(config)),
        ("one", str(folder / "first.toml")),
        ("two", str(folder / "second.toml")),
    ]
    assert explain(config, "--action", "kms:Decrypt") == 1
    assert f"This grant would allow it, in a file in {folder} or in the configuration:" in capsys.readouterr().out


def outcome(connection: RawConnection) -> str:
    """Describe the key, and return the error's code, or an empty text."""
    answer = connection.call("DescribeKey", {"KeyId": "alias/a"})
    return "" if answer.error is None else answer.error["Code"]


@contextmanager
def refusing(keyring: Path, socket_path: Path) -> Iterator[tuple[RunningAgent, RawConnection, Path]]:
    """An agent without a grant to this user, a connection, and a folder of grants that does not exist yet."""
    with (
        serving(keyring, socket_path, to=f"uid={OTHER_USER}") as agent,
        RawConnection(agent.socket) as connection,
    ):
        assert outcome(connection) == "Forbidden.NoPermission"
        yield agent, connection, keyring.parent / "grants.d"


def test_an_agent_sees_new_changed_and_removed_files(keyring: Path, socket_path: Path) -> None:
    """The agent needs no signal and open connections stay; the folder may appear later."""
    with refusing(keyring, socket_path) as (agent, connection, folder):
        folder.mkdir()
        (folder / "a.toml").write_text(grant("a"))
        agent.wait_for("reload.done")
        assert outcome(connection) == ""
        (folder / "a.toml").write_text(grant("a", actions="kms:Decrypt"))
        agent.wait_for("reload.done", count=2)
        assert outcome(connection) == "Forbidden.NoPermission"
        (folder / "b.toml").write_text(grant("b"))
        agent.wait_for("reload.done", count=3)
        assert outcome(connection) == ""
        (folder / "b.toml").unlink()
        agent.wait_for("reload.done", count=4)
        assert outcome(connection) == "Forbidden.NoPermission"


def test_a_bad_file_leaves_the_old_state_whole(keyring: Path, socket_path: Path) -> None:
    """Nothing of the new state is adopted, and a correction in place is seen."""
    with refusing(keyring, socket_path) as (agent, connection, folder):
        folder.mkdir()
        (folder / "a.toml").write_text(grant("a"))
        (folder / "b.toml").write_text("socket = 1")
        why = agent.wait_for("reload.failed")["why"]
        assert why == (
            f"{folder / 'b.toml'}: socket: a file of grants has [[grant]] tables only; "
            "move this into the configuration, or remove it"
        )
        assert outcome(connection) == "Forbidden.NoPermission"
        (folder / "b.toml").write_text(grant("b", actions="kms:Decrypt"))
        agent.wait_for("reload.done")
        assert outcome(connection) == ""


def test_an_agent_sees_a_mounted_folder_swapped(keyring: Path, socket_path: Path) -> None:
    """A kubelet swaps a ConfigMap by replacing the `..data` link that the names lead through."""
    with refusing(keyring, socket_path) as (agent, connection, folder):
        first, second = folder / "..2026_1", folder / "..2026_2"
        first.mkdir(parents=True)
        (first / "a.toml").write_text(grant("a", actions="kms:Decrypt"))
        (folder / "..data").symlink_to(first.name)
        (folder / "a.toml").symlink_to("..data/a.toml")
        agent.wait_for("reload.done")
        assert outcome(connection) == "Forbidden.NoPermission"
        second.mkdir()
        (second / "a.toml").write_text(grant("a"))
        (folder / "..data_tmp").symlink_to(second.name)
        (folder / "..data_tmp").replace(folder / "..data")
        agent.wait_for("reload.done", count=2)
        assert outcome(connection) == ""


def test_an_agent_does_not_start_with_a_bad_file(keyring: Path) -> None:
    """The message names the file."""
    config = keyring.parent / "agent.toml"
    config.write_text(configuration(keyring))
    (keyring.parent / "grants.d").mkdir()
    (keyring.parent / "grants.d" / "a.toml").write_text("x = 1")
    command = [sys.executable, "-m", "keyferry_agent", "run", "--config", str(config), "--socket", "s"]
    ended = subprocess.run(command, cwd=keyring.parent, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert ended.returncode == 1
    assert f"{keyring.parent / 'grants.d' / 'a.toml'}: x: a file of grants" in ended.stderr
