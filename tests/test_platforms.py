"""Platforms without some features: the agent serves all other grants, and logs each missing feature once."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.agent import RawConnection, RunningAgent
from support.calls import error
from support.keyring import configuration, serving
from support.other_user import line_of, running_as
from support.seccomp import MEMFD_SECRET, PEERGROUPS, PEERPIDFD, PIDFD_OPEN, Call, failing, seccomp
from support.skip_unless import root

DESCRIBE = ("DescribeKey", {"KeyId": "alias/a"})
PROCESS_GRANTS = "".join(
    f'[[grant]]\nname="{name}"\nto={{{to}}}\nactions=["kms:*"]\nkeys=["*"]\n'
    for name, to in (
        ("unit", 'unit="orders.service"'),
        ("program", f'uid={os.getuid()}, exe="/bin/true"'),
        ("group", "gid=4999"),
    )
)


def limited(agent: RunningAgent) -> list[tuple[str, tuple[str, ...]]]:
    """Return the missing features that the agent logs, and the affected grants; without a capability of the test itself."""
    return [
        (line["what"], tuple(line["grants"]))
        for line in agent.log
        if line.get("event") == "startup.limited" and "grants" in line and "CAP_SYS_PTRACE" not in line["what"]
    ]


@seccomp()
@pytest.mark.parametrize(
    ("calls", "grants"),
    [
        ({PEERPIDFD: errno.ENOPROTOOPT, PIDFD_OPEN: errno.EPERM}, ("unit", "program")),
        ({PEERPIDFD: errno.ENOPROTOOPT, PIDFD_OPEN: errno.ENOSYS}, ("unit", "program")),
        ({PEERPIDFD: errno.EPERM, PIDFD_OPEN: errno.EPERM}, ("unit", "program")),
        ({PEERGROUPS: errno.ENOPROTOOPT}, ("group",)),
        ({PEERGROUPS: errno.EPERM}, ("group",)),
        ({PEERPIDFD: errno.ENOPROTOOPT}, None),
        ({MEMFD_SECRET: errno.ENOSYS}, None),
        ({MEMFD_SECRET: errno.EPERM}, None),
    ],
    ids=str,
)
def test_missing_platform_feature_costs_only_its_evidence(
    keyring: Path, socket_path: Path, calls: dict[Call, int], grants: tuple[str, ...] | None
) -> None:
    """Grants to users hold; grants that can never match are logged once for any number of callers."""
    with serving(keyring, socket_path, more=PROCESS_GRANTS, preexec=failing(calls)) as agent:
        for _ in range(5):
            with RawConnection(agent.socket) as connection:
                assert connection.call(*DESCRIBE).error is None
                assert connection.call("GetAgentStatus", {}).error is None
        assert [names for _, names in limited(agent)] == ([grants] if grants else [])
        assert not [line for line in agent.log if line.get("event") == "accept.failed"]


@seccomp()
def test_process_grant_matches_nothing_without_pidfds(keyring: Path, socket_path: Path) -> None:
    """Such a grant does not become a grant to every caller."""
    calls = {PEERPIDFD: errno.ENOPROTOOPT, PIDFD_OPEN: errno.EPERM}
    this = os.path.realpath("/proc/self/exe")
    with (
        serving(keyring, socket_path, to=f'uid={os.getuid()}, exe="{this}"', preexec=failing(calls)) as agent,
        RawConnection(agent.socket) as connection,
    ):
        assert error(connection.call(*DESCRIBE))["Code"] == "Forbidden.NoPermission"


IMPORT = f"sys.path[:] = {sys.path}\nimport keyferry_agent.peer\n"
HIDDEN = """
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000) == 0
assert libc.mount(b"none", b"/", None, 0x44000, None) == 0
assert libc.mount(b"proc", b"/proc", b"proc", 0, b"hidepid=2") == 0
"""


@root()
def test_proc_that_hides_processes_is_detected() -> None:
    """Grants to units and pods match no process of another user then."""
    show = "print(sorted(set().union(*keyferry_agent.peer.lacking().values())), flush=True)"
    with running_as(f"import keyferry_agent.peer\n{show}", before=IMPORT + HIDDEN) as hidden:
        assert line_of(hidden) == "['exe', 'pod', 'sha256', 'unit']"
    with running_as(f"import keyferry_agent.peer\n{show}", before=IMPORT) as seen:
        assert line_of(seen) == "['exe', 'sha256']"


# --- names of users and groups ----------------------------------------------------------------------------------------


@contextmanager
def with_own_users(
    keyring: Path, socket_path: Path, tmp_path: Path, to: str
) -> Iterator[tuple[RunningAgent, Path, Path]]:
    """An agent that sees databases of users and groups of its own, which a test may change."""
    users, groups = tmp_path / "passwd", tmp_path / "group"
    users.write_text(Path("/etc/passwd").read_text())
    groups.write_text(Path("/etc/group").read_text())
    (keyring.parent / "agent.toml").write_text(configuration(keyring, to=to))
    bind = f'mount --bind {users} /etc/passwd && mount --bind {groups} /etc/group && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", bind, "sh"]
    with RunningAgent(["--config", str(keyring.parent / "agent.toml")], socket_path, prefix=prefix) as agent:
        yield agent, users, groups


def outcome(path: Path) -> str:
    """Return the outcome of this process's DescribeKey: OK, or a code."""
    with RawConnection(path) as connection:
        error = connection.call(*DESCRIBE).error
        return error["Code"] if error else "OK"


@root()
@pytest.mark.parametrize("selector", ["user", "group"])
def test_grants_follow_added_and_removed_names(keyring: Path, socket_path: Path, tmp_path: Path, selector: str) -> None:
    """A user who gets the number of a removed user has none of that user's grants."""
    with with_own_users(keyring, socket_path, tmp_path, f'{selector}="late"') as (agent, users, groups):
        database = users if selector == "user" else groups
        before = database.read_text()
        assert outcome(socket_path) == "Forbidden.NoPermission"
        line = "late:x:0:0::/:/bin/false\n" if selector == "user" else "late:x:0:\n"
        database.write_text(before + line)
        agent.wait_for("reload.done")
        assert outcome(socket_path) == "OK"
        database.write_text(before)
        agent.wait_for("reload.done", count=2)
        assert outcome(socket_path) == "Forbidden.NoPermission"
        assert agent.has_logged(
            "reload.limited",
            what=f"grant[0].to.{selector}: this host has no {selector} 'late'; the grant matches no caller",
        )
