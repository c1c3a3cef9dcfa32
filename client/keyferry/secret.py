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
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_ALIGNMENT_BYTES: Final = 16
SCRATCH_SIZES: Final = (64, 1_024, 6_144)
"""Sizes in bytes that borrowed blocks are rounded up to.

With few sizes, a block that one call returns fits a later call. Memory of n times the sum of these sizes never runs out for n
calls at the same time.
"""

_ZEROS: Final = {capacity: bytes(capacity) for capacity in SCRATCH_SIZES}

# One lock for the loans and the allocations of all memory. Reentrant: the garbage collector can free a secret at any point,
# also while its own thread holds the lock. The hooks let no other thread hold it at a fork: the child could never take it.
_lock: Final = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)

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

    __slots__ = ("_capacity", "_is_freed", "_loans", "_memory", "_offset", "size")

    def __init__(self, memory: "SecretMemory", offset: int, capacity: int, size: int) -> None:
        self._memory = memory
        self._offset = offset
        self._capacity = capacity
        self._loans = 0
        self._is_freed = False
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
        with _lock:
            if not self._is_freed:
                self._is_freed = True
                if not self._loans:
                    self._memory._wipe(self)


class _Loan:
    """The context manager of `Secret.lend`: returns the view, and releases it at the end of the block."""

    __slots__ = ("_secret", "_view")

    def __init__(self, secret: Secret) -> None:
        self._secret = secret

    def __enter__(self) -> memoryview:
        secret = self._secret
        with _lock:
            if secret._is_freed:
                raise SecretMemoryError("the secret was wiped")
            self._view = secret._memory._view(secret._offset, secret.size)
            secret._loans += 1
        return self._view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._view.release()
        secret = self._secret
        with _lock:
            secret._loans -= 1
            if secret._is_freed and not secret._loans:
                secret._memory._wipe(secret)


class _Borrowed:
    """The context manager of `SecretMemory.borrow`: an exclusive block of scratch memory, wiped at the end."""

    __slots__ = ("_block", "_memory", "_size", "_view")

    def __init__(self, memory: "SecretMemory", block: memoryview, size: int) -> None:
        self._memory = memory
        self._block = block
        self._size = size

    def __enter__(self) -> memoryview:
        self._view = self._block[: self._size]
        return self._view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._view.release()
        capacity = len(self._block)
        self._block[:] = _ZEROS[capacity]
        self._memory._blocks[capacity].append(self._block)


class SecretMemory:
    """One mapping of `size` bytes (rounded up to pages) for secrets. Safe to use from several threads.

    `backing` selects one kind of memory; "auto" uses the best kind that the system offers. With `require` (the default),
    memory that is not locked raises `SecretMemoryError`, whose message contains the reason. Without it, `protection` may be
    "none".

    `descriptor` is that of secret memory which another process made. This class maps that memory instead, and closes the
    descriptor. `share` is called with the descriptor of memory made here, if it has one: only memory of memfd_secret(2) can be
    shared with another process.
    """

    def __init__(
        self,
        size: int,
        *,
        backing: Backing = "auto",
        require: bool = True,
        descriptor: int | None = None,
        share: Callable[[int], object] | None = None,
    ) -> None:
        self.size = whole_pages(size)
        self._share = share
        self.protection: Protection = "none"
        self._used = 0
        self._bytes: memoryview | None = None
        self._free_offsets: dict[int, list[int]] = {}
        """Offsets of bytes that were allocated and wiped, by their capacity."""
        self._blocks: dict[int, list[memoryview]] = {capacity: [] for capacity in SCRATCH_SIZES}
        """Blocks that were borrowed and wiped, by their capacity.

        They need no lock, which would cost a request 2 %: append() and pop() of a list are atomic, with and without the GIL. So
        each block belongs to one thread at a time, and no other state depends on these lists.
        """
        # The reservation includes the guard pages: mapping memory into its middle leaves them inaccessible.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._reserved = _libc.mmap(None, self.size + 2 * mmap.PAGESIZE, _PROT_NONE, flags, -1, 0)
        if self._reserved == _MAP_FAILED:
            raise SecretMemoryError(f"{self.size} bytes of address space could not be reserved: {_errno()}")
        self._address = self._reserved + mmap.PAGESIZE
        # Every Secret and every loan refers to its memory. After the last reference is gone, the memory is wiped and unmapped.
        self._release = weakref.finalize(self, _release, self._reserved, self.size)
        self._release.atexit = False  # the kernel clears memory at exit, when a thread may still be using it
        failures = self._map(backing) if descriptor is None else self._map_existing(descriptor)
        if failures and (require or descriptor is not None):
            self.close()
            raise SecretMemoryError(_advice(self.size, failures), self.size)
        self._bytes = memoryview((ctypes.c_ubyte * self.size).from_address(self._address)).cast("B")

    def __repr__(self) -> str:
        return f"SecretMemory({self.size} bytes, {self.protection})"

    def __reduce__(self) -> str:
        raise TypeError("SecretMemory cannot be pickled or copied: it belongs to one process")

    def allocate(self, size: int) -> Secret:
        """Allocate `size` bytes, all zero. Raises `SecretMemoryError` when the memory is used up."""
        capacity = max(1, -(-size // _ALIGNMENT_BYTES)) * _ALIGNMENT_BYTES
        return Secret(self, self._reserve(capacity), capacity, size)

    def borrow(self, size: int) -> _Borrowed:
        """Lend `size` bytes for one `with` block, and wipe them at its end. Raises `SecretMemoryError`."""
        for capacity, blocks in self._blocks.items():
            if size <= capacity:
                try:
                    block = blocks.pop()
                except IndexError:
                    block = self._view(self._reserve(capacity), capacity)
                return _Borrowed(self, block, size)
        raise SecretMemoryError(f"at most {SCRATCH_SIZES[-1]} bytes can be borrowed, not {size}")

    def _reserve(self, capacity: int) -> int:
        """Return the offset of unused bytes, all zero. Raises `SecretMemoryError` when the memory is used up."""
        with _lock:
            offsets = self._free_offsets.get(capacity)
            if offsets:
                return offsets.pop()
            if self._used + capacity > self.size:
                raise SecretMemoryError(f"{self.size} bytes of secret memory are used up")
            offset = self._used
            self._used += capacity
        return offset

    def close(self) -> None:
        """Wipe all bytes and unmap the memory. All loans must have ended: a view would point to unmapped memory."""
        if self._bytes is not None:
            for blocks in self._blocks.values():
                while blocks:
                    blocks.pop().release()
            self._bytes.release()
        self._release()

    def detach(self) -> None:
        """Do not wipe or unmap the memory when this object is collected: a process that shares it keeps using it."""
        self._release.detach()

    def _view(self, offset: int, size: int) -> memoryview:
        assert self._bytes is not None
        return self._bytes[offset : offset + size]

    def _wipe(self, secret: Secret) -> None:
        ctypes.memset(self._address + secret._offset, 0, secret._capacity)
        self._free_offsets.setdefault(secret._capacity, []).append(secret._offset)

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
        if _libc.mmap(self._address, self.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == _MAP_FAILED:
            raise SecretMemoryError(f"{self.size} bytes of memory could not be mapped: {_errno()}")
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

    def _map_existing(self, descriptor: int) -> list[str]:
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(_MEMFD_NAME):
                return [f"descriptor {descriptor} is not of memfd_secret"]
            size = os.fstat(descriptor).st_size
            if size != self.size:
                return [f"descriptor {descriptor} has {size} bytes, not {self.size}"]
            failure = self._map_descriptor(descriptor)
            self.protection = "none" if failure else "memfd_secret"
            return [failure] if failure else []
        finally:
            os.close(descriptor)

    def _map_descriptor(self, descriptor: int) -> str:
        flags = mmap.MAP_SHARED | _MAP_FIXED
        address = _libc.mmap(self._address, self.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
        return _errno() if address == _MAP_FAILED else ""


def _release(address: int, size: int) -> None:
    if _libc.mprotect(address + mmap.PAGESIZE, size, mmap.PROT_READ | mmap.PROT_WRITE) == 0:  # memory was mapped
        ctypes.memset(address + mmap.PAGESIZE, 0, size)
    _libc.munmap(address, size + 2 * mmap.PAGESIZE)


def whole_pages(size: int) -> int:
    """Return `size` rounded up to whole pages, in bytes: at least one page."""
    return max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE


def fill_random(view: memoryview) -> None:
    """Fill a lent view with random bytes from the kernel's generator, without a copy. Raises OSError."""
    position, size = 0, len(view)
    while position < size:
        count = _getrandom(ctypes.byref(ctypes.c_char.from_buffer(view, position)), size - position, 0)
        if count > 0:
            position += count
        elif ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), "getrandom failed")


def _errno() -> str:
    return os.strerror(ctypes.get_errno())


def _advice(size: int, failures: list[str]) -> str:
    soft_limit, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft_limit == resource.RLIM_INFINITY else f"{soft_limit // 1024} KiB"
    return (
        f"{size // 1024} KiB of memory could not be locked ({'; '.join(failures)}). RLIMIT_MEMLOCK is {limit} for all "
        f"of this process's locked memory together: raise it (systemd: LimitMEMLOCK=, shell: ulimit -l), grant "
        f'CAP_IPC_LOCK, or accept unprotected memory with memory = "prefer"'
    )
