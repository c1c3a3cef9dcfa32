"""Programs that the client library is a part of: patched standard libraries, pickles, several event loops, bare containers."""

import asyncio
import concurrent.futures
import copy
import functools
import multiprocessing
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.agent import PATIENCE, RunningAgent
from support.skip_unless import root

from keyferry import Client, KeyferryError, aio, operations
from keyferry.module import DataKey, SoftwareModule
from keyferry.secret import SecretMemory
from keyferry.store import Store

MANY = [operations.Encrypt(key_id="alias/dev", plaintext=b"x" * 6_000)] * 100
"""More than a socket's buffer takes: they are sent while answers are read."""

EVENTLET = """
import sys, time, warnings
warnings.simplefilter("ignore")
if sys.argv[2] == "before":
    import keyferry
import eventlet
eventlet.monkey_patch()
import select
from keyferry import AgentUnavailable, Client, KeyferryError, operations
assert not hasattr(select, "poll")
kms = Client(sys.argv[1], timeout=60)
turns = []
def turn():
    while True:
        turns.append(None)
        eventlet.sleep(0)
eventlet.spawn(turn)
ask = lambda size: kms.generate_data_key(key_id="alias/dev", number_of_bytes=size)
made = list(eventlet.GreenPool(10).imap(ask, range(1, 101)))
assert [len(each.plaintext) // 4 * 3 - each.plaintext.count("=") for each in made] == list(range(1, 101))
assert len(turns) > 10
big = operations.Encrypt(key_id="alias/dev", plaintext=b"x" * 6_000)
assert len(kms.pipeline([big] * 100)) == 100
try:
    Client("/nowhere").get_agent_status()
except AgentUnavailable:
    print("done")
"""


@pytest.mark.parametrize("imported", ["before", "after"])
def test_a_client_works_under_eventlet(imported: str, agent: RunningAgent) -> None:
    """Green threads share a client and run during its calls, whichever package is imported first."""
    asked = [sys.executable, "-c", EVENTLET, str(agent.socket), imported]
    ended = subprocess.run(asked, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


def test_a_client_needs_no_poll(agent: RunningAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client works without select.poll and its constants."""
    for name in ("poll", "epoll", "POLLIN", "POLLOUT"):
        monkeypatch.delattr(select, name)
    with Client(agent.socket) as kms:
        assert all(isinstance(each, operations.EncryptResult) for each in kms.pipeline(MANY))
        assert kms.get_agent_status().state == "Serving"


@pytest.mark.parametrize("kind", [AttributeError, RuntimeError, ValueError, TypeError, AssertionError])
def test_breakage_by_a_host_program_is_a_keyferry_error(
    kind: type[Exception], agent: RunningAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has its cause, and the client works again once the program does."""

    def broken(*_args: object) -> None:
        raise kind("no such thing here")

    with Client(agent.socket) as kms:
        kms.get_agent_status()
        with monkeypatch.context() as patched:
            patched.setattr(kms, "_wait", broken)
            with pytest.raises(KeyferryError, match="no such thing here") as caught:
                kms.get_agent_status()
        assert isinstance(caught.value.__cause__, kind)
        assert kms.get_agent_status().state == "Serving"


# --- pickles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Client, aio.Client])
def test_a_pickled_client_carries_its_path_and_its_timeout(kind: Callable[..., Any], agent: RunningAgent) -> None:
    """Every protocol of pickle and copies carry them, and never the connection."""
    client = kind(agent.socket, timeout=7)
    if isinstance(client, Client):
        client.get_agent_status()
    copies = [pickle.loads(pickle.dumps(client, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*copies, copy.copy(client), copy.deepcopy(client)):
        assert (repr(other), other._timeout, other._connection) == (repr(client), 7, None)
        if isinstance(other, Client):
            assert other.get_agent_status().state == "Serving"
            other.close()
    if isinstance(client, Client):
        assert client._connection is not None
        client.close()


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_client_works_in_other_processes(method: str, agent: RunningAgent) -> None:
    """Results and refusals come back from the processes."""
    context = multiprocessing.get_context(method)
    with Client(agent.socket) as kms, concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        before = kms.get_agent_status()
        made = [pool.submit(functools.partial(kms.generate_data_key, key_id="alias/dev")) for _ in range(8)]
        for each in made:
            assert kms.decrypt(ciphertext_blob=each.result().ciphertext_blob).plaintext == each.result().plaintext
        with pytest.raises(KeyferryError, match=r"Forbidden\.AliasNotFound"):
            pool.submit(functools.partial(kms.describe_key, key_id="alias/none")).result()
        assert before.counters is not None


def test_process_bound_objects_refuse_to_be_pickled(tmp_path: Path) -> None:
    """Secret memory, modules and their keys, and stores raise an error with the reason."""
    memory = SecretMemory(64, require=False)
    module = SoftwareModule.generate("RSA_2048")
    store = Store(f"sqlite:///{tmp_path / 'x'}")
    for thing in (memory, memory.allocate(16), module, DataKey(), store):
        for use in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot be pickled"):
                use(thing)


# --- one client is for one event loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["asyncio", "trio"])
@pytest.mark.parametrize("second", ["asyncio", "trio"])
def test_second_event_loop_is_refused(first: str, second: str, agent: RunningAgent) -> None:
    """The refusal is immediate even if the first loop is idle; once the first has ended, the second may use the client."""
    kms = aio.Client(agent.socket, timeout=PATIENCE)
    ready, leave = threading.Event(), threading.Event()

    async def ask() -> str:
        return (await kms.get_agent_status()).state

    async def stay() -> str:
        await ask()
        ready.set()
        await anyio.to_thread.run_sync(leave.wait)
        state = await ask()
        await kms._disconnect()
        return state

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        staying = thread.submit(functools.partial(anyio.run, stay, backend=first))
        ready.wait(PATIENCE)
        try:
            for call in (ask, kms.aclose):
                with pytest.raises(KeyferryError, match="is in use in another event loop"):
                    anyio.run(call, backend=second)
        finally:
            leave.set()
        assert staying.result() == "Serving"

    async def close() -> None:
        assert await ask() == "Serving"
        await kms.aclose()

    anyio.run(close, backend=second)


def test_threads_with_own_loops_do_not_deadlock(agent: RunningAgent) -> None:
    """Each call is answered, or raises an error that names the other loop."""
    kms = aio.Client(agent.socket, timeout=PATIENCE)
    start, end = threading.Barrier(4), threading.Barrier(4)
    outcomes: list[object] = []

    async def ask() -> None:
        start.wait()
        try:
            outcomes.append((await kms.get_agent_status()).state)
        except KeyferryError as error:
            outcomes.append(error)
        end.wait()  # no loop ends before all have asked
        with suppress(KeyferryError):
            await (
                kms.aclose()
            )  # in the loop that has the connection: no other loop may, and a loop must not leave a socket

    threads = [threading.Thread(target=anyio.run, args=(ask,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("Serving") == 1
    assert sum("another event loop" in str(each) for each in outcomes) == 3


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_client_serves_one_event_loop_after_the_other(backend: str, agent: RunningAgent) -> None:
    """Each run has ended before the next begins, or has closed the client."""
    kms = aio.Client(agent.socket)

    async def ask() -> None:
        assert (await kms.get_agent_status()).state == "Serving"

    for _ in range(3):
        anyio.run(ask, backend=backend)
    anyio.run(kms.aclose, backend=backend)
    loops = [asyncio.new_event_loop() for _ in range(2)]
    for loop in loops * 2:
        loop.run_until_complete(ask())
        loop.run_until_complete(kms.aclose())
    for loop in loops:
        loop.close()


def test_unsupported_event_loop_is_an_error_of_this_package(agent: RunningAgent) -> None:
    """Another kind of loop drives the coroutine here."""
    with pytest.raises(KeyferryError, match="needs a running event loop"):
        aio.Client(agent.socket).get_agent_status().send(None)


# --- bare containers ----------------------------------------------------------------------------------------------------

BARE = """
import os, sys
from keyferry import Client, aio, files
from keyferry.command import main
from keyferry.module import DataKey, SoftwareModule
from keyferry.store import Store, new_record, rewrap
import anyio, encodings.idna, sqlalchemy.dialects.sqlite, tqdm
socket, folder = sys.argv[1:]
url = f"sqlite:///{folder}/records.sqlite"
os.environ.clear()
assert not os.path.exists("/proc/self")
async def awaited():
    async with aio.Client(socket) as kms:
        assert (await kms.get_agent_status()).state == "Serving"
for backend in ("asyncio", "trio"):
    anyio.run(awaited, backend=backend)
SoftwareModule.generate("RSA_2048").save(f"{folder}/m", "correct horse battery")
module = SoftwareModule.load(f"{folder}/m", "correct horse battery")
with Client(socket) as kms, Store(url) as store:
    kms.get_agent_status()  # connects while this user has a grant
    os.setgroups([])
    os.chmod(folder, 0o777)
    os.setresgid(4207, 4207, 4207)
    os.setresuid(4207, 4207, 4207)
    store.add(new_record(kms, "a", key_id="alias/dev"))
    rewrap(store, kms)
    record = store.get("a").data_key_record()
    key = module.recover_data_key(kms, record)
    with open(f"{folder}/in", "wb") as file:
        file.write(b"x")
    with open(f"{folder}/in", "rb") as source, files.replacing(f"{folder}/out", source=source) as out:
        files.encrypt(source, out, module, key, record, name="a")
assert main(["records", "list", "--store", url]) == 0
assert main(["records", "list"]) == 1
"""


@root()
def test_a_client_needs_no_proc_no_home_and_no_passwd_entry(agent: RunningAgent, shared_folder: Path) -> None:
    """The library works in a small container, and the default store is an error with its remedy."""
    hide = 'mount -t tmpfs none /proc && exec "$@"'
    asked = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        hide,
        "sh",
        sys.executable,
        "-c",
        BARE,
        str(agent.socket),
        str(shared_folder),
    ]
    ended = subprocess.run(asked, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("a\t")
    assert "set $KEYFERRY_STORE" in ended.stderr
