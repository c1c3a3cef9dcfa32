"""Secret memory: its kinds, its refusals, the end of loans, and that it is really locked."""

import ctypes
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from support.agent import PATIENCE

from keyferry import secret
from keyferry.secret import Backing, SecretMemory, SecretMemoryError, fill_random


def flags_of(address: int) -> set[str]:
    """The kernel's flags of the mapping around an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head:
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and head == "VmFlags:":
            return set(line.split()[1:])
    return set()


@pytest.mark.parametrize("backing", ["memfd_secret", "mlock"])
def test_memory_is_locked_and_left_out_of_core_dumps(backing: Backing) -> None:
    """The kernel's flags for both kinds of memory are lo and dd."""
    memory = SecretMemory(10_000, backing=backing)
    assert memory.protection == backing
    assert memory.size == 12_288
    assert {"lo", "dd"} <= flags_of(memory._address)
    assert not {"rd", "wr"} & flags_of(memory._address - 1)
    assert not {"rd", "wr"} & flags_of(memory._address + memory.size)


@pytest.mark.parametrize("offset", [-1, 4096])
def test_guard_pages_stop_an_overrun(offset: int) -> None:
    """A read before or behind the memory raises SIGSEGV and returns no other secret."""
    code = (
        "import ctypes; from keyferry.secret import SecretMemory; memory = SecretMemory(4096, require=False);"
        f"print(ctypes.c_ubyte.from_address(memory._address + {offset}).value)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGSEGV


def test_a_loan_ends_with_its_block() -> None:
    """After the block, or an exception in it, the view is released and scratch memory wiped."""
    memory = SecretMemory(4096, require=False)
    with memory.borrow(32) as view:
        fill_random(view)
        assert any(view)
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    with pytest.raises(ValueError, match="released"):
        view[0]
    assert ctypes.string_at(address, 32) == bytes(32)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012, SIM117 - the test is about the whole block
        with memory.borrow(32) as view:
            fill_random(view)
            raise ZeroDivisionError
    assert ctypes.string_at(address, 32) == bytes(32)


def test_secret_keeps_its_bytes_until_it_is_freed() -> None:
    """Freed memory is zero, and is used again."""
    memory = SecretMemory(4096, require=False)
    kept = memory.allocate(20)
    with kept.lend() as view:
        view[:] = b"x" * 20
    with kept.lend() as view:
        assert bytes(view) == b"x" * 20
    kept.free()
    again = memory.allocate(17)
    with again.lend() as view:
        assert bytes(view) == bytes(17)


def test_exhausted_secret_memory_is_an_error() -> None:
    """The secrets in it are not harmed, and freed memory counts."""
    memory = SecretMemory(4096, require=False)
    kept = [memory.allocate(16) for _ in range(256)]
    with pytest.raises(SecretMemoryError, match="used up"):
        memory.allocate(1)
    kept.pop().free()
    memory.allocate(1)


def test_scratch_memory_is_not_fragmented_by_any_sizes() -> None:
    """Memory of one size serves another: calls of 1 to 6,144 bytes in sequence need little memory."""
    memory = SecretMemory(sum(secret.SCRATCH_SIZES), require=False)
    for size in range(1, 6_145):
        with memory.borrow(size) as view:
            assert len(view) == size


def test_more_than_the_largest_size_cannot_be_borrowed() -> None:
    """A buffer of a special size could not be used for other loans afterwards."""
    with pytest.raises(SecretMemoryError, match="6144"):
        SecretMemory(65_536, require=False).borrow(6_145)


def test_secret_freed_during_a_loan_is_wiped_after_it() -> None:
    """The borrower finishes with the right bytes, and later loans are refused."""
    memory = SecretMemory(4096, require=False)
    kept = memory.allocate(32)
    with kept.lend() as first, kept.lend() as second:
        first[:] = b"k" * 32
        kept.free()
        kept.free()
        assert bytes(second) == b"k" * 32
        with pytest.raises(SecretMemoryError, match="wiped"), kept.lend():
            pass
        address = ctypes.addressof(ctypes.c_char.from_buffer(first))
    assert ctypes.string_at(address, 32) == bytes(32)
    assert memory.allocate(32)._offset == kept._offset


def test_unreferenced_memory_is_wiped_and_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a retired keyring is an example."""
    unmapped: list[int] = []
    monkeypatch.setattr(secret._libc, "munmap", lambda address, _size: unmapped.append(address))
    memory = SecretMemory(4096, require=False)
    kept = memory.allocate(32)
    with kept.lend() as view:
        view[:] = b"k" * 32
    address = memory._address
    del memory
    assert not unmapped
    del kept
    assert len(unmapped) == 1
    assert ctypes.string_at(address, 4096) == bytes(4096)


def test_secret_may_be_freed_during_an_allocation() -> None:
    """The garbage collector frees secrets in the middle of an allocation, in the same thread."""
    memory = SecretMemory(4096, require=False)
    kept = memory.allocate(32)
    with secret._lock:
        kept.free()
    assert memory.allocate(32)._offset == kept._offset


def test_forked_child_lends_while_other_threads_of_parent_lend() -> None:
    """A fork waits until no other thread holds the lock, so the child can take it."""
    code = """
import os, signal, threading
from keyferry.secret import SecretMemory
memory = SecretMemory(4096, require=False)
kept, stop = memory.allocate(32), threading.Event()
def lend():
    while not stop.is_set():
        with kept.lend():
            pass
threads = [threading.Thread(target=lend) for _ in range(2)]
[thread.start() for thread in threads]
for _ in range(100):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        with kept.lend():
            os._exit(0)
    if status := os.waitpid(child, 0)[1]:
        break
stop.set()
os._exit(status != 0)
"""
    # coverage has locks of its own, which a child that is forked beside other threads may never get
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True, timeout=PATIENCE)


def test_random_bytes_are_random_at_every_size() -> None:
    """Sizes above a single answer of the kernel are filled, too."""
    memory = SecretMemory(131_072, require=False)
    for size in (1, 32, 6144, 60_000):
        with memory.allocate(size).lend() as view:
            fill_random(view)
            assert size < 32 or len(set(view)) > 16
    with pytest.raises((OSError, TypeError, ValueError)):
        fill_random(memoryview(b"read-only"))


def test_secret_appears_in_no_repr_or_pickle() -> None:
    """A secret refuses to be pickled."""
    memory = SecretMemory(4096, require=False)
    kept = memory.allocate(32)
    assert repr(kept) == "Secret(32 bytes)"
    assert repr(memory).startswith("SecretMemory(4096 bytes")
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(kept)


def test_close_wipes_the_memory_and_may_be_repeated() -> None:
    """A closed memory refuses loans."""
    memory = SecretMemory(4096, require=False)
    kept = memory.allocate(32)
    memory.close()
    memory.close()
    with pytest.raises(ValueError, match="released"), kept.lend():
        pass


def limited(kibibytes: int, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python with so much lockable memory and without CAP_IPC_LOCK."""

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (kibibytes * 1024, kibibytes * 1024))
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(12_345, 12_345, 12_345)
            os.setresuid(12_345, 12_345, 12_345)

    source = Path(secret.__file__).read_text()
    # As another user, this checkout may be out of reach: the module is self-contained, and goes along as text.
    load = f"import sys, types; m = types.ModuleType('secret'); sys.modules['secret'] = m; exec({source!r}, m.__dict__)"
    interpreter = "/usr/bin/python3" if os.geteuid() == 0 else sys.executable
    return subprocess.run(
        [interpreter, "-c", f"{load}\n{code}"], capture_output=True, text=True, check=False, cwd="/", preexec_fn=prepare
    )


def test_too_small_memlock_limit_is_refused_with_a_remedy() -> None:
    """The error has size, limit and the setting to raise; require=False goes on without protection, and reports it."""
    ended = limited(8, "m.SecretMemory(16384)")
    for word in ("16 KiB", "8 KiB", "LimitMEMLOCK", "CAP_IPC_LOCK", "prefer"):
        assert word in ended.stderr
    ended = limited(8, "print(m.SecretMemory(16384, require=False).protection)")
    assert ended.stdout == "none\n", ended.stderr


def test_limit_of_64_kib_holds_scratch_and_a_small_keyring() -> None:
    """An agent with few keys needs no more."""
    ended = limited(64, "kept = [m.SecretMemory(36 * 1024), m.SecretMemory(4096), m.SecretMemory(4096)]; print(kept)")
    assert ended.stdout.count("memfd_secret") + ended.stdout.count("mlock") == 3, ended.stderr


def test_memory_is_locked_without_memfd_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without memfd_secret has locked memory; a requirement of memfd_secret is refused."""
    monkeypatch.setattr(secret, "_SYS_MEMFD_SECRET", 100_000)
    assert SecretMemory(4096).protection == "mlock"
    with pytest.raises(SecretMemoryError, match="memfd_secret: Function not implemented"):
        SecretMemory(4096, backing="memfd_secret")


def test_the_kinds_are_the_ones_the_status_names() -> None:
    """The kinds of memory and the status have the same names."""
    assert set(get_args(secret.Protection)) == {"memfd_secret", "mlock", "none"}
