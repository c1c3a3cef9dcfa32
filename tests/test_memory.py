"""The promise: at rest, no copy of a master key, or of a key or plaintext that was handled, is in the agent's ordinary memory.

The tests learn every key (`support.secret_recorder`), let the agent stand still, and look through all of its memory
(`support.memory_scan`), and through a core dump. Two naive agents, in which keys have to be found, show that the search finds
something.
"""

import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.agent import PATIENCE, RunningAgent
from support.keyring import change, configuration, new_keyring
from support.keys import wrap
from support.memory_scan import SearchPatterns, aes_round_keys, scan, scan_file
from support.secret_recorder import KEYS, SecretRecorder
from support.skip_unless import program
from support.stress import scale

from keyferry.hardening import DUMPABLE
from keyferry.parameters import decode_base64, encode_base64
from keyferry.secret import Backing
from keyferry_agent.crypto import wrapping


def readable(path: str) -> bool:
    """Whether this user may read the memory of a process of its own."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        try:
            Path(path.format(other.pid)).open("rb").close()
        except OSError:
            return False
        finally:
            other.kill()
    return True


PR_CAPBSET_DROP, CAP_IPC_LOCK = 24, 14
ROUNDS = scale(5, 10)
"""A naive agent is found out after as many."""

needs_ptrace = pytest.mark.skipif(not readable("/proc/{}/mem"), reason="needs to read the memory of its own processes")


@contextmanager
def recorded_agent(
    folder: Path, backing: Backing, *, command: tuple[str, ...] = ("-m", "keyferry_agent"), times: int = ROUNDS
) -> Iterator[tuple[RunningAgent, SecretRecorder]]:
    """An agent that has done `times` rounds of everything, with a reload, and has open connections after each kind of call."""
    keyring = new_keyring(folder)
    change(keyring, "create-key", "--alias", KEYS[1], "--key-spec", "Aliyun_SM4")
    config = folder / "agent.toml"
    config.write_text(configuration(keyring, more=f'memory_backing = "{backing}"').replace("prefer", "require"))
    with ExitStack() as stack:
        agent = stack.enter_context(
            RunningAgent(["--config", str(config)], folder / "agent.sock", environment={DUMPABLE: "1"}, command=command)
        )
        recorder = SecretRecorder(keyring)
        clients = [stack.enter_context(agent.client()) for _ in range(8)]
        recorder.call_every_operation(clients[0], times)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda kms: recorder.call_every_operation(kms, times // 5), clients))
        change(keyring, "rotate", KEYS[0])
        recorder.read_keyring()
        agent.signal(signal.SIGHUP)
        agent.wait_for("reload.done")
        recorder.call_every_operation(clients[0], times // 5)
        recorder.run_pipeline(clients[1], 5 * times)
        for number, kms in enumerate(clients):  # the last thing that each connection did, and waits after
            (recorder.encrypt if number % 2 else recorder.generate_data_key)(kms, KEYS[number // 2 % 2])
        yield agent, recorder


@contextmanager
def standing_still(agent: RunningAgent) -> Iterator[int]:
    """The agent's process ID, while it does nothing at all."""
    agent.signal(signal.SIGSTOP)
    try:
        yield agent.process.pid
    finally:
        agent.signal(signal.SIGCONT)


@pytest.fixture(scope="module", params=["memfd_secret", "mlock"])
def at_rest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningAgent, SecretRecorder]]:
    """The real agent after hundreds of calls, with either kind of locked memory."""
    with recorded_agent(tmp_path_factory.mktemp("memory"), request.param) as made:
        yield made


@needs_ptrace
def test_ordinary_memory_at_rest_has_no_key(
    at_rest: tuple[RunningAgent, SecretRecorder],
) -> None:
    """The agent has run every operation and wrapping, singly, from many connections, pipelined, and across a reload."""
    agent, recorder = at_rest
    assert recorder.secrets > 30 * ROUNDS
    assert len(recorder.patterns) > 50_000 * ROUNDS
    with standing_still(agent) as pid:
        assert not scan(pid, recorder.patterns)


@needs_ptrace
@program("gcore", "gdb")
def test_core_dump_has_no_key(at_rest: tuple[RunningAgent, SecretRecorder], tmp_path: Path) -> None:
    """Neither the memory in the dump nor the registers hold a key."""
    agent, recorder = at_rest
    dump = ["gcore", "-o", str(tmp_path / "core"), str(agent.process.pid)]
    subprocess.run(dump, capture_output=True, check=True, timeout=PATIENCE)
    (core,) = tmp_path.glob("core.*")
    assert core.stat().st_size > 1 << 23
    found = scan_file(core, recorder.patterns)
    core.unlink()
    assert not found


WITHOUT_CLEARING = "import sys; from keyferry_agent.cli.main import main; sys.exit(main())"
KEEPING_KEYS = """
import sys
from keyferry_agent.keyring import keyring
from keyferry_agent.cli.main import main

build, kept = keyring.build_keyring, []

def keeping(description, fill, memory):
    def fill_and_keep(view):
        fill(view)
        kept.append(bytes(view))
    return build(description, fill_and_keep, memory)

from keyferry_agent.keyring import loader
loader.build_keyring = keeping
sys.exit(main())
"""


@needs_ptrace
@pytest.mark.parametrize(
    ("naive", "what"),
    [(WITHOUT_CLEARING, "plaintext"), (KEEPING_KEYS, "master key")],
    ids=["without clearing", "keeping keys"],
)
def test_search_finds_keys_of_an_unprotected_agent(tmp_path: Path, naive: str, what: str) -> None:
    """An unprotected agent does not overwrite freed memory, or keeps its master keys as bytes."""
    with recorded_agent(tmp_path, "auto", command=("-c", naive)) as (agent, recorder), standing_still(agent) as pid:
        found = scan(pid, recorder.patterns)
    assert any(name.startswith(what) for name in found), found
    assert not any(name.startswith("OAEP") for name in found), found  # padded in locked memory, whatever is freed


def test_search_finds_every_form_at_every_alignment(tmp_path: Path) -> None:
    """The forms are those of FIPS 197, A.1 and A.3."""
    patterns, key = SearchPatterns(), bytes(range(100, 132))
    patterns.add_key("key", key)
    digits = key.hex().encode()
    for copy in (key, key[::-1], digits, digits[::-1], digits.upper()[:23], aes_round_keys(key)[:32], key[8:24]):
        for offset in range(8):
            (tmp_path / "haystack").write_bytes(bytes(64 + offset) + copy + bytes(64))
            assert scan_file(tmp_path / "haystack", patterns), (copy, offset)
    for other in (bytes(4096), digits[:8] + bytes(64), digits[8:16] + digits[:8]):  # eight digits occur by chance
        (tmp_path / "haystack").write_bytes(other)
        assert not scan_file(tmp_path / "haystack", patterns)
    assert aes_round_keys(bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c"))[-4:].hex() == "b6630ca6"
    long = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    assert aes_round_keys(long)[-4:].hex() == "706c631e"


def limited(kib: int) -> Callable[[], None]:
    """Return a function that limits the locked memory of a process of any user."""

    def prepare() -> None:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (kib * 1024, kib * 1024))

    return prepare


def test_few_keys_and_a_reload_fit_64_kib_of_locked_memory(keyring: Path, socket_path: Path) -> None:
    """The keys are protected without CAP_IPC_LOCK."""
    config = keyring.parent / "agent.toml"
    config.write_text(configuration(keyring).replace("prefer", "require"))
    with RunningAgent(["--config", str(config)], socket_path, preexec=limited(64)) as agent, agent.client() as kms:
        for count in range(1, 4):
            agent.signal(signal.SIGHUP)
            agent.wait_for("reload.done", count=count)
        assert kms.get_agent_status().memory_protection in ("memfd_secret", "mlock")
        status = Path(f"/proc/{agent.process.pid}/status").read_text()
        assert "VmLck:\t      44 kB" in status


def test_agent_names_the_locked_memory_that_it_needs(keyring: Path, socket_path: Path) -> None:
    """The agent does not start, and its message has the total and the purpose."""
    arguments = ["--keyring", str(keyring), "--unseal", str(keyring.parent / "identity")]
    agent = RunningAgent(arguments, socket_path, preexec=limited(32))
    assert agent.wait() == 1
    agent.kill()
    keyring_json = "".join(agent.output)
    for words in ("needs 48 KiB", "40 for its work", "twice 4 for the keyring", "RLIMIT_MEMLOCK is 32 KiB"):
        assert words in keyring_json


def test_agent_memory_is_readable_only_where_a_test_asks(keyring: Path, socket_path: Path) -> None:
    """An agent with the tests' environment variable logs that it is not hardened."""
    arguments = ["--keyring", str(keyring), "--unseal", str(keyring.parent / "identity")]
    for environment, owner in (({}, 0), ({DUMPABLE: "1"}, os.getuid())):
        with RunningAgent(arguments, socket_path, environment=environment) as agent:
            assert Path(f"/proc/{agent.process.pid}/mem").stat().st_uid == owner
            keyring_json = [line["what"] for line in agent.log if line["event"] == "startup.not_hardened"]
            assert any(DUMPABLE in what for what in keyring_json) == bool(environment)


IMPORTING = """
import sys
from keyferry.module import SoftwareModule

module = SoftwareModule.generate(sys.argv[1])
print(module.public_key_blob, flush=True)
keys = []
for line in sys.stdin:
    keys.append(module.import_data_key(line.strip()))
    module.decrypt(keys[-1], module.encrypt(keys[-1], b"x" * 100))
    if len(keys) > 5:
        module.forget(keys.pop(0))
    print(flush=True)
"""


@needs_ptrace
@pytest.mark.parametrize("key_spec", ["RSA_2048", "EC_SM2"])
def test_a_software_module_has_no_data_key_in_ordinary_memory(key_spec: str) -> None:
    """Held and forgotten data keys and padded messages are absent; only the private key is there."""
    patterns = SearchPatterns()
    way = wrapping.find(key_spec, "SM2PKE" if key_spec == "EC_SM2" else "RSAES_OAEP_SHA_256")
    assert way is not None
    with subprocess.Popen(
        [sys.executable, "-c", IMPORTING, key_spec], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as module:
        assert module.stdin is not None
        assert module.stdout is not None
        to = wrapping.recipient(way, decode_base64(module.stdout.readline().strip()), sm2_fallback=False)
        for _ in range(20):
            data_key = os.urandom(32)
            patterns.add_key("data key", data_key)
            module.stdin.write(encode_base64(wrap(to, data_key)) + "\n")
            module.stdin.flush()
            module.stdout.readline()
        found = scan(module.pid, patterns)
        module.stdin.close()
    assert not found
