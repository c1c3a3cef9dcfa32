"""Secret memory: the only place where key bytes live, and the only module that maps memory for them.

A `SecretMemory` is one mapping between two guard pages: memory that the kernel itself cannot read (`memfd_secret(2)`,
Linux 5.14), else locked memory that is left out of core dumps (`mlock`, `MADV_DONTDUMP`). Its bytes are only ever
*lent*, as a memoryview, for the time of one synchronous call:

    with memory.borrow(32) as data_key:       # wiped when the block is left, however it is left
        fill_random(data_key)
        ...

The rule for every user of this module: never store, return, log or compare with `==` a lent view or a copy of its bytes, and
do not keep one across an `await`. The view is released at the end of its block; using it later raises ValueError.
"""

import ctypes
import errno
import mmap
import os
import resource
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Final, Literal, TypeAlias

__all__ = [
    "SCRATCH_SIZES",
    "Backing",
    "Protection",
    "Secret",
    "SecretMemory",
    "SecretMemoryError",
    "fill_random",
    "whole_pages",
]

Backing: TypeAlias = Literal["auto", "memfd_secret", "mlock"]
Protection: TypeAlias = Literal["memfd_secret", "mlock", "none"]

_SYS_MEMFD_SECRET: Final = 447  # the same number on every architecture that has this system call
_MEMFD_NAME: Final = "/secretmem"
"""Name in /proc of the file behind a descriptor of memfd_secret(2)."""
_MADV_DONTDUMP: Final = 16
_MAP_FIXED: Final = 0x10
_PROT_NONE: Final = 0
_FAILED: Final = ctypes.c_void_p(-1).value
_ALIGNMENT: Final = 16
SCRATCH_SIZES: Final = (64, 1_024, 6_144)
"""Sizes in bytes that borrowed blocks are rounded up to.

With few sizes, a block that one call returns fits a later call. Memory of n times the sum of these sizes never runs out for n
calls at the same time.
"""

_ZEROS: Final = {room: bytes(room) for room in SCRATCH_SIZES}

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.getrandom.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
_libc.getrandom.restype = ctypes.c_ssize_t
_getrandom: Final = _libc.getrandom


class SecretMemoryError(Exception):
    """Memory for keys could not be mapped as requested, or is used up. `size` is the number of bytes requested."""

    def __init__(self, message: str, size: int = 0) -> None:
        super().__init__(message)
        self.size = size


class Secret:
    """Bytes in a `SecretMemory`. Only `lend` gives access to them, for the time of a `with` block."""

    __slots__ = ("_freed", "_loans", "_memory", "is_wiped", "offset", "room", "size")

    def __init__(self, memory: "SecretMemory", offset: int, room: int, size: int) -> None:
        self._memory = memory
        self.offset = offset
        self.room = room
        self._loans: list[None] = []  # loan count as a list: append/pop are atomic under the GIL, `+= 1` is not
        self._freed = self.is_wiped = False
        self.size = size

    def __repr__(self) -> str:
        return f"Secret({self.size} bytes)"

    def __reduce__(self) -> str:
        raise TypeError("a Secret cannot be pickled or copied")

    def lend(self) -> "_Loan":
        """Lend the bytes as a writable memoryview, for a `with` block."""
        return _Loan(self)

    def free(self) -> None:
        """Wipe the bytes and release their space: immediately, or when their last loan ends. May be called repeatedly."""
        self._freed = True
        if not self._loans:
            self._memory.wipe(self)

    def begin_loan(self) -> memoryview:
        """Return a view of the bytes, which `end_loan` ends after its release. Only `_Loan` calls the two.

        They take no lock, since every request takes a loan. A loan is counted before the bytes are checked for being freed, and
        the bytes are marked as freed before the loans are counted. Whichever runs last sees the other's write and wipes.
        """
        view = self._memory.view(self.offset, self.size)
        self._loans.append(None)
        if self._freed:
            view.release()
            self.end_loan()
            raise SecretMemoryError("these bytes were wiped")
        return view

    def end_loan(self) -> None:
        """End a loan, whose view is released. The last loan of freed bytes wipes them."""
        self._loans.pop()
        if self._freed and not self._loans:
            self._memory.wipe(self)


class _Loan:
    """The context manager of `Secret.lend`: returns the view, and releases it at the end of the block."""

    __slots__ = ("_secret", "_view")

    def __init__(self, secret: Secret) -> None:
        self._secret = secret

    def __enter__(self) -> memoryview:
        self._view = self._secret.begin_loan()
        return self._view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._view.release()
        self._secret.end_loan()


class _Borrowed:
    """The context manager of `SecretMemory.borrow`: an exclusive block of scratch memory, wiped at the end."""

    __slots__ = ("_block", "_memory", "_room", "_size", "_view")

    def __init__(self, memory: "SecretMemory", block: memoryview, room: int, size: int) -> None:
        self._memory = memory
        self._block = block
        self._room = room
        self._size = size

    def __enter__(self) -> memoryview:
        self._view = self._block[: self._size]
        return self._view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._view.release()
        self._memory.take_back(self._block, self._room)


class SecretMemory:
    """One mapping of `size` bytes (rounded up to pages) for secrets. Safe to use from several threads.

    `backing` selects one kind of memory; "auto" uses the best kind that the system offers. With `require` (the default),
    memory that is not locked raises `SecretMemoryError`, whose message contains the reason. Without it, `protection` may be
    "none".

    `given` is a descriptor of secret memory that another process made. This class maps that memory instead, and closes the
    descriptor. `share` is called with the descriptor of memory made here, if it has one: only memory of memfd_secret(2) can be
    shared with another process.
    """

    def __init__(
        self,
        size: int,
        *,
        backing: Backing = "auto",
        require: bool = True,
        given: int | None = None,
        share: Callable[[int], object] | None = None,
    ) -> None:
        self.size = whole_pages(size)
        self._share = share
        self.protection: Protection = "none"
        # Reentrant: the garbage collector can free a secret at any point, also while its own thread holds the lock.
        self._lock = threading.RLock()
        self._used = 0
        self._bytes: memoryview | None = None
        self._freed: dict[int, list[int]] = {}
        self._blocks: dict[int, list[memoryview]] = {room: [] for room in SCRATCH_SIZES}
        # The reservation includes the guard pages: mapping memory into its middle leaves them inaccessible.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._reserved = _libc.mmap(None, self.size + 2 * mmap.PAGESIZE, _PROT_NONE, flags, -1, 0)
        if self._reserved == _FAILED:
            raise SecretMemoryError(f"no address space for {self.size} bytes: {_errno()}")
        self._address = self._reserved + mmap.PAGESIZE
        # Every Secret and every loan refers to its memory. After the last reference is gone, the memory is wiped and unmapped.
        self._release = weakref.finalize(self, _release, self._reserved, self.size)
        self._release.atexit = False  # the kernel clears memory at exit, when a thread may still be using it
        failures = self._map(backing) if given is None else self._map_given(given)
        if failures and (require or given is not None):
            self.close()
            raise SecretMemoryError(_advice(self.size, failures), self.size)
        self._bytes = memoryview((ctypes.c_ubyte * self.size).from_address(self._address)).cast("B")

    def __repr__(self) -> str:
        return f"SecretMemory({self.size} bytes, {self.protection})"

    def __reduce__(self) -> str:
        raise TypeError("SecretMemory cannot be pickled or copied: it belongs to one process")

    def allocate(self, size: int) -> Secret:
        """Allocate `size` bytes, all zero. Raises `SecretMemoryError` when the memory is used up."""
        return self._allocate(size, max(1, -(-size // _ALIGNMENT)) * _ALIGNMENT)

    def borrow(self, size: int) -> _Borrowed:
        """Lend `size` bytes for one `with` block, and wipe them at its end. Raises `SecretMemoryError`."""
        for room in SCRATCH_SIZES:
            if size <= room:
                break
        else:
            raise SecretMemoryError(f"at most {SCRATCH_SIZES[-1]} bytes can be borrowed; {size} were asked for")
        try:
            block = self._blocks[room].pop()
        except IndexError:
            block = self.view(self._allocate(room, room).offset, room)
        return _Borrowed(self, block, room, size)

    def _allocate(self, size: int, room: int) -> Secret:
        with self._lock:
            free = self._freed.get(room)
            if free:
                return Secret(self, free.pop(), room, size)
            if self._used + room > self.size:
                raise SecretMemoryError(f"{self.size} bytes of secret memory are used up")
            offset = self._used
            self._used += room
        return Secret(self, offset, room, size)

    def close(self) -> None:
        """Wipe all bytes and unmap the memory. All loans must have ended: a view would point to unmapped memory."""
        if self._bytes is not None:
            for blocks in self._blocks.values():
                while blocks:
                    blocks.pop().release()
            self._bytes.release()
        self._release()

    def outlive(self) -> None:
        """Do not wipe or unmap the memory when this object is collected: a process that shares it keeps using it."""
        self._release.detach()

    def take_back(self, block: memoryview, room: int) -> None:
        """Wipe a borrowed block of `room` bytes, and keep it for the next borrower. Only `_Borrowed` calls this."""
        block[:] = _ZEROS[room]
        self._blocks[room].append(block)

    def view(self, offset: int, size: int) -> memoryview:
        """Return a view of some bytes. Only `Secret` and this class call this."""
        assert self._bytes is not None
        return self._bytes[offset : offset + size]

    def wipe(self, secret: Secret) -> None:
        """Wipe the bytes of a freed secret without loans, and release their space, once. Only `Secret` calls this."""
        with self._lock:
            if secret.is_wiped:
                return
            secret.is_wiped = True
            ctypes.memset(self._address + secret.offset, 0, secret.room)
            self._freed.setdefault(secret.room, []).append(secret.offset)

    def _map(self, backing: Backing) -> list[str]:
        """Map the middle of the reservation as locked memory. Return no messages on success, else one for each failed kind."""
        failures = []
        if backing in ("auto", "memfd_secret"):
            failure = self._map_memfd_secret()
            if not failure:
                self.protection = "memfd_secret"
                return []
            failures.append(f"memfd_secret: {failure}")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        if _libc.mmap(self._address, self.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == _FAILED:
            raise SecretMemoryError(f"no memory for {self.size} bytes: {_errno()}")
        _libc.madvise(self._address, self.size, _MADV_DONTDUMP)
        if backing in ("auto", "mlock"):
            if _libc.mlock(self._address, self.size) == 0:
                self.protection = "mlock"
                return []
            failures.append(f"mlock: {_errno()}")
        return failures

    def _map_memfd_secret(self) -> str:
        descriptor = _libc.syscall(_SYS_MEMFD_SECRET, os.O_CLOEXEC)
        if descriptor < 0:
            return _errno()
        try:
            os.ftruncate(descriptor, self.size)
            failure = self._map_descriptor(descriptor)
            if not failure and self._share is not None:
                self._share(descriptor)
            return failure
        except OSError as error:
            return error.strerror or str(error)
        finally:
            os.close(descriptor)  # while it is open, another process could map the memory too (pidfd_getfd)

    def _map_given(self, descriptor: int) -> list[str]:
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(_MEMFD_NAME):
                return ["the descriptor does not refer to secret memory"]
            if os.fstat(descriptor).st_size != self.size:
                return ["the secret memory has another size"]
            failure = self._map_descriptor(descriptor)
            self.protection = "none" if failure else "memfd_secret"
            return [failure] if failure else []
        finally:
            os.close(descriptor)

    def _map_descriptor(self, descriptor: int) -> str:
        flags = mmap.MAP_SHARED | _MAP_FIXED
        mapped = _libc.mmap(self._address, self.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
        return _errno() if mapped == _FAILED else ""


def _release(reserved: int, size: int) -> None:
    if _libc.mprotect(reserved + mmap.PAGESIZE, size, mmap.PROT_READ | mmap.PROT_WRITE) == 0:  # memory was mapped
        ctypes.memset(reserved + mmap.PAGESIZE, 0, size)
    _libc.munmap(reserved, size + 2 * mmap.PAGESIZE)


def whole_pages(size: int) -> int:
    """Return `size` rounded up to whole pages, in bytes: at least one page."""
    return max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE


def fill_random(view: memoryview) -> None:
    """Fill a lent view with random bytes from the kernel's generator, without a copy. Raises OSError."""
    done, size = 0, len(view)
    while done < size:
        got = _getrandom(ctypes.byref(ctypes.c_char.from_buffer(view, done)), size - done, 0)
        if got > 0:
            done += got
        elif ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), "getrandom failed")


def _errno() -> str:
    return os.strerror(ctypes.get_errno())


def _advice(size: int, failures: list[str]) -> str:
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // 1024} KiB"
    return (
        f"{size // 1024} KiB of locked memory could not be had ({'; '.join(failures)}). RLIMIT_MEMLOCK is {limit} for all "
        f"of this process's locked memory together: raise it (systemd: LimitMEMLOCK=, shell: ulimit -l), grant "
        f'CAP_IPC_LOCK, or accept unprotected memory with memory = "prefer"'
    )
