"""Commands that open a keyring or a module protect keys as the daemon does. All commands run as real processes."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.agent import PATIENCE, RunningAgent
from support.keyring import configuration, opened
from support.memory_scan import SearchPatterns, scan
from support.skip_unless import root
from support.waiting import wait_until
from test_memory import PR_CAPBSET_DROP, limited, needs_ptrace
from test_recipients import SSH

from keyferry import hardening
from keyferry.hardening import DUMPABLE
from keyferry_agent.keyring import loader_process

AGENT, CLIENT = "keyferry-agent", "keyferry"
SCRIPTS = Path(sys.executable).parent
READING = """
import sys
try:
    open(f"/proc/{sys.argv[1]}/mem", "rb").close()
    print("read")
except OSError as error:
    print(error.strerror)
"""
COMMANDS = {
    "init": [AGENT, "keyring", "init", "new.age", "--passphrase-file", "fifo"],
    **{
        verb: [AGENT, "keyring", verb, "keyring.age", *arguments, "--unseal", "fifo"]
        for verb, *arguments in (
            ("reseal", "--passphrase-file", "fifo"),
            ("recipients",),
            ("add-recipient", "--recipient", SSH),
            ("remove-recipient", "--recipient", SSH),
            ("create-key",),
            ("import-key", "--material", "fifo"),
            ("list",),
            ("show", "alias/a"),
            ("rotate", "alias/a"),
            ("promote", "alias/a", "version"),
            ("enable", "alias/a"),
            ("disable", "alias/a"),
            ("disable-version", "alias/a", "version"),
            ("enable-version", "alias/a", "version"),
            ("schedule-deletion", "alias/a", "--days", "7"),
            ("cancel-deletion", "alias/a"),
            ("create-alias", "alias/b", "alias/a"),
            ("update-alias", "alias/a", "alias/a"),
            ("delete-alias", "alias/a"),
        )
    },
    "recipient-of": [AGENT, "keyring", "recipient-of", "fifo"],
    "explain": [
        *(AGENT, "explain", "--config", "agent.toml"),
        *("--uid", "1", "--action", "kms:Decrypt", "--key", "alias/a"),
    ],
    "check": [AGENT, "check", "fifo"],
    "audit who": [AGENT, "audit", "who", "record", "--config", "agent.toml", "--key", "alias/a"],
    "module init": [CLIENT, "module", "init", "module", "--passphrase-file", "fifo"],
    "encrypt-file": [
        *(CLIENT, "encrypt-file", "in", "out", "--record", "a", "--store", "@fifo"),
        *("--module", "module", "--passphrase-file", "fifo"),
    ],
    "decrypt-file": [CLIENT, "decrypt-file", "fifo", "out", "--module", "module", "--passphrase-file", "fifo"],
    "records rewrap": [CLIENT, "records", "rewrap", "--store", "@fifo", "--module=module", "--passphrase-file", "fifo"],
}
"""Every command that opens a keyring or a module; each blocks at the named pipe `fifo`."""


@pytest.fixture
def place(keyring: Path) -> Path:
    """A folder with a keyring, a configuration and a named pipe."""
    folder = keyring.parent
    (folder / "agent.toml").write_text(configuration(keyring).replace(f"{folder}/identity", f"{folder}/fifo"))
    for name in ("record", "in"):
        (folder / name).touch()
    os.mkfifo(folder / "fifo")
    return folder


def without_capabilities() -> None:
    """Give a process of root no more power over other processes of root than a user has over its own."""
    for capability in range(64):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


@contextmanager
def blocked(
    folder: Path, command: Sequence[str], preexec: Callable[[], None] = without_capabilities, *, dumpable: bool = False
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command until it reads from the named pipe."""
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=preexec,  # noqa: PLW1509 - it only drops rights and sets limits
        env={**os.environ, **({DUMPABLE: "1"} if dumpable else {})},
    ) as process:
        writer = None
        try:
            deadline = time.monotonic() + PATIENCE
            while writer is None:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                try:
                    writer = os.open(folder / "fifo", os.O_WRONLY | os.O_NONBLOCK)
                except OSError:  # no process reads from it yet
                    time.sleep(0.01)
            yield process
        finally:
            process.kill()
            if writer is not None:
                os.close(writer)


def keyring_command(verb: str, keyring: Path, *arguments: str) -> list[str]:
    """The command of a verb on a keyring that the identity beside it opens."""
    return [str(SCRIPTS / AGENT), "keyring", verb, str(keyring), *arguments, "--unseal", f"{keyring.parent}/identity"]


def reads(pid: int) -> str:
    """Return the result of another process of the same user that opens the memory of a process."""
    return subprocess.run(
        [sys.executable, "-c", READING, str(pid)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=without_capabilities,
    ).stdout.strip()


def reads_siblings() -> bool:
    """Return whether a process may read the memory of others of its user that are not its descendants (Yama may forbid it)."""
    with subprocess.Popen(["sleep", "60"], preexec_fn=without_capabilities) as sibling:  # noqa: PLW1509 - it only drops rights
        try:
            return reads(sibling.pid) == "read"
        finally:
            sibling.kill()


def status_of(pid: int) -> dict[str, str]:
    """The fields of a process's status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def clears_freed_memory(pid: int) -> bool:
    """Return whether a process was started over with an environment that makes the C library clear freed memory."""
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return {b"PYTHONMALLOC=malloc", b"LD_BIND_NOW=1"} <= set(environment)


def core_limit(pid: int) -> list[str]:
    """The soft and the hard limit of a process's core dump."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (limit,) = [line.split()[4:6] for line in lines if line.startswith("Max core file size")]
    return limit


@pytest.mark.parametrize(
    ("name", "started"), [*((name, "script") for name in COMMANDS), ("list", "module"), ("module init", "module")]
)
def test_a_command_that_handles_keys_is_hardened(place: Path, name: str, started: str) -> None:
    """Another process of the user cannot read its memory; freed memory is cleared; it dumps no core."""
    program, *arguments = COMMANDS[name]
    module = [sys.executable, "-m", program.replace("-", "_")]
    command = [str(SCRIPTS / program), *arguments] if started == "script" else [*module, *arguments]
    with blocked(place, command) as process:
        assert status_of(process.pid)["NoNewPrivs"] == "1"
        assert core_limit(process.pid) == ["0", "0"]
        if os.geteuid() == 0:  # a hardened process hides its environment from other users, and from its own
            assert clears_freed_memory(process.pid)
        private_umask = name not in ("encrypt-file", "decrypt-file", "records rewrap")
        assert status_of(process.pid)["Umask"] == ("0077" if private_umask else "0022")
        assert reads(process.pid) == "Permission denied"


def test_the_memory_of_a_command_can_be_read_where_a_test_asks(place: Path) -> None:
    """The tests' environment variable keeps a command readable, with a warning, so the search can succeed."""
    if not reads_siblings():
        pytest.skip("needs to read the memory of its user's processes: sysctl kernel.yama.ptrace_scope=0")
    program, *arguments = COMMANDS["list"]
    with blocked(place, [str(SCRIPTS / program), *arguments], dumpable=True) as process:
        assert reads(process.pid) == "read"
        assert clears_freed_memory(process.pid)
        assert process.stderr is not None
        assert DUMPABLE in process.stderr.readline().decode()


@pytest.mark.parametrize("command", [[AGENT, "fingerprint", "fifo"], [CLIENT, "records", "list", "--store", "@fifo"]])
def test_a_command_that_handles_no_key_is_not_started_over(place: Path, command: list[str]) -> None:
    """Starting over takes time, which other commands need not spend."""
    with blocked(place, [str(SCRIPTS / command[0]), *command[1:]]) as process:
        assert b"PYTHONMALLOC" not in Path(f"/proc/{process.pid}/environ").read_bytes()
        assert status_of(process.pid)["NoNewPrivs"] == "0"


@pytest.mark.parametrize("dumpable", [False, True], ids=["hardened", "as tests ask"])
def test_a_keyring_command_leaves_no_core_file(place: Path, *, dumpable: bool) -> None:
    """A terminal's quit key sends SIGQUIT, here while the command waits for the keyring's identity."""
    if Path("/proc/sys/kernel/core_pattern").read_text().strip() != "core":
        pytest.skip("needs core dumps in the working directory: sysctl kernel.core_pattern=core")
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    program, *arguments = COMMANDS["rotate"]
    with blocked(
        place,
        [str(SCRIPTS / program), *arguments],
        lambda: resource.setrlimit(resource.RLIMIT_CORE, unlimited),
        dumpable=dumpable,
    ) as process:
        process.send_signal(signal.SIGQUIT)
        assert process.wait(PATIENCE) == -signal.SIGQUIT
    assert bool(list(place.glob("core*"))) == dumpable


@needs_ptrace
def test_a_keyring_command_keeps_no_key_in_freed_memory(keyring: Path) -> None:
    """When the command prints its result, no copy of a master key is left."""
    patterns = SearchPatterns()
    for version in opened(keyring).find("alias/a").versions:
        patterns.add_key("master key", bytes(version.material))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"full")
    except BlockingIOError:
        os.set_blocking(writer, True)
    command = keyring_command("show", keyring, "alias/a")
    with subprocess.Popen(
        command, stdout=writer, stderr=subprocess.DEVNULL, env={**os.environ, DUMPABLE: "1"}
    ) as process:
        os.close(writer)
        wchan = Path(f"/proc/{process.pid}/wchan")
        wait_until("the command blocks on its output", lambda: "pipe_w" in wchan.read_text())
        found = scan(process.pid, patterns)
        process.kill()
    os.close(reader)
    assert not found


USER_NAMESPACE = ["unshare", "--user", "--map-root-user"]


@root()
@pytest.mark.parametrize(
    ("prefix", "preexec", "locks"),
    [
        ([], None, True),
        ([], limited(64), False),
        (USER_NAMESPACE, None, False),
    ],
    ids=["CAP_IPC_LOCK", "64 KiB", "root of a user namespace"],
)
def test_memory_is_locked_where_no_limit_forbids_it(
    keyring: Path, prefix: list[str], preexec: Callable[[], None] | None, *, locks: bool
) -> None:
    """Under a limit the kernel could refuse memory later, so the command goes on without locking."""
    fifo = keyring.parent / "fifo"
    os.mkfifo(fifo)
    command = [*prefix, *keyring_command("list", keyring)[:-1], str(fifo)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=preexec)  # noqa: PLW1509 - limits
    with open(fifo, "wb") as writer:
        assert (status_of(process.pid)["VmLck"] != "0 kB") == locks
        writer.write((keyring.parent / "identity").read_bytes())
    out, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, b"alias/a" in out) == (0, True)


def test_memory_is_locked_under_an_unlimited_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unlimited RLIMIT_MEMLOCK needs no capability."""
    monkeypatch.setattr(Path, "read_text", lambda _path: "CapEff:\t0\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (8 << 20, 8 << 20))
    assert not hardening.lock_memory()
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert hardening._may_lock_everything()


def test_the_loader_is_hardened(place: Path) -> None:
    """The process in which the agent opens a keyring. exec(2) undoes what the agent has done for itself."""
    with blocked(place, [sys.executable, "-P", "-m", loader_process.__name__, "keyring.age", "fifo"]) as process:
        assert status_of(process.pid)["NoNewPrivs"] == "1"
        assert status_of(process.pid)["Umask"] == "0077"
        assert core_limit(process.pid) == ["0", "0"]
        assert reads(process.pid) == "Permission denied"


@root()
def test_the_loader_locks_its_memory_too(tmp_path: Path, keyring: Path, socket_path: Path) -> None:
    """The loader holds every master key as a Python object while it writes to the agent."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    agent = RunningAgent(["--keyring", str(keyring), "--unseal", str(fifo)], socket_path)
    with open(fifo, "wb") as writer:
        children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text().split()
        (child,) = [int(child) for child in children if "loader" in Path(f"/proc/{child}/cmdline").read_text()]
        status = status_of(child)
        writer.write((keyring.parent / "identity").read_bytes())
    with agent:
        assert status["VmLck"] != "0 kB"


@pytest.mark.parametrize("started", ["script", "module"])
def test_input_output_and_exit_codes_pass_through(keyring: Path, tmp_path: Path, started: str) -> None:
    """A command that is started over keeps standard input, arguments and exit codes."""

    def run(program: str, *arguments: object, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        module = [sys.executable, "-m", program.replace("-", "_")]
        command = [*([str(SCRIPTS / program)] if started == "script" else module), *map(str, arguments)]
        return subprocess.run(command, input=given, capture_output=True, check=False, timeout=PATIENCE)

    unseal = ["--unseal", keyring.parent / "identity"]
    imported = ["keyring", "import-key", keyring, *unseal, "--description", "ä €", "--material", "-"]
    ended = run(AGENT, *imported, given=os.urandom(32))
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert "ä €" in ended.stdout.decode()
    assert run(AGENT, *imported[:-1]).returncode == 2
    ended = run(AGENT, "keyring", "list", tmp_path / "none", *unseal)
    assert (ended.returncode, b"No such file" in ended.stderr) == (1, True)
    made = ["module", "init", tmp_path / "module", "--passphrase-file", "/dev/stdin"]
    ended = run(CLIENT, *made, given=b"correct horse")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert (tmp_path / "module").stat().st_mode & 0o777 == 0o600
    ended = run(CLIENT, *made, given=b"correct horse")
    assert (ended.returncode, b"never overwritten" in ended.stderr) == (1, True)


def test_an_application_that_uses_the_library_is_not_hardened(tmp_path: Path) -> None:
    """Only commands change their process."""
    code = (
        "import ctypes, os, resource, sys\nfrom keyferry.module import SoftwareModule\n"
        "SoftwareModule.generate().save(sys.argv[1], 'x')\nSoftwareModule.load(sys.argv[1], 'x')\n"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE)[1], 'keyferry.hardening' in sys.modules)"
    )
    limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    command = [sys.executable, "-c", code, str(tmp_path / "m")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["1", "0", str(limit), "False"]
