"""The program that a process runs: its path and its hash. Every function here can block for as long as a file system blocks.

The caller controls the file, and possibly the file system: overlayfs over FUSE in a user namespace of its own, or a network
file system whose server does not answer. So only `inspector` calls these functions, in a process of its own.
"""

import hashlib
import os
from typing import Final, NamedTuple

__all__ = ["Program", "inspect"]

_MAX_CACHED_HASHES: Final = 1_024
_LARGEST: Final = 2**30
"""Most bytes of a program that is hashed. A sparse file of any length costs its owner nothing."""


class Program(NamedTuple):
    """An executable file: its path, its identity on the file system, and its hash if that was requested.

    `path` is None if this agent finds another file at that path.
    """

    path: str | None
    identity: tuple[int, ...]
    sha256: str | None = None

    def runs_in(self, program: "Program | None") -> bool:
        """Return True if another inspection found the same file at the same path."""
        return program is not None and self.identity == program.identity and self.path == program.path


def inspect(pid: int, *, with_hash: bool = False) -> Program | None:
    """Return the program that a process runs, with its hash if `with_hash`. Blocks.

    Return None if the process changed its program meanwhile. Raises OSError if the agent may not read the program (for another
    user's process, that requires CAP_SYS_PTRACE).
    """
    program = _program(pid)
    if not with_hash:
        return program
    digest = _hash(pid)
    return program._replace(sha256=digest) if program.runs_in(_program(pid)) else None


def _program(pid: int) -> Program:
    link = f"/proc/{pid}/exe"
    path, identity = os.readlink(link), _identity(link)
    return Program(path if _same_file(path, identity) else None, identity)


def _hash(pid: int) -> str | None:
    """Return `sha256:` and the hash of the file that a process runs, which may differ from the file at its path.

    Return None for a file above `_LARGEST`, or one that changes meanwhile. Raises OSError.
    """
    with open(f"/proc/{pid}/exe", "rb", buffering=0) as file:
        identity = _identity(file.fileno())
        if os.fstat(file.fileno()).st_size > _LARGEST:
            return None
        digest_text = _hashes.get(identity)
        if digest_text is None:
            digest = hashlib.file_digest(file, "sha256")
            if _identity(file.fileno()) != identity:
                return None  # the file was written to meanwhile
            if len(_hashes) >= _MAX_CACHED_HASHES:
                _hashes.clear()
            digest_text = _hashes[identity] = f"sha256:{digest.hexdigest()}"
        return digest_text


_hashes: dict[tuple[int, ...], str] = {}


def _identity(path: str | int) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _same_file(path: str, identity: tuple[int, ...]) -> bool:
    # A process in a mount namespace of its own can have any file at any path.
    try:
        return _identity(path) == identity
    except OSError:
        return False
