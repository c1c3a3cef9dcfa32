"""The keyring file: read whole, changed under a lock, replaced in one step.

A change is: lock, read, change, seal, write beside, fsync, rename, fsync the directory. Two commands at the same moment take
turns; a crash at any instant leaves the old file or the new one, never a mixture and never half.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .document import Document, KeyringError
from .sealing import Unsealer, seal

__all__ = ["change", "create", "read"]


def read(path: Path, unsealer: Unsealer) -> Document:
    """Read and check a keyring. Raises `KeyringError`."""
    try:
        sealed = path.read_bytes()
    except OSError as error:
        raise KeyringError(f"{path}: {error.strerror}") from None
    return Document.from_json(unsealer.unseal(sealed))


def create(path: Path, document: Document, passphrase: str | None) -> None:
    """Write a new keyring. Raises `KeyringError` if the file exists: a keyring is never replaced by an empty one."""
    path = _real(path)
    with _locked(path):
        if path.exists():
            raise KeyringError(f"{path} exists; a keyring is never overwritten")
        _replace(path, seal(document.to_json(), document.recipients, passphrase))


@contextmanager
def change(path: Path, unsealer: Unsealer) -> Iterator[Document]:
    """Lend the document for a `with` block and write it back at its end. An exception in the block changes nothing."""
    path = _real(path)
    with _locked(path):
        document = read(path, unsealer)
        yield document
        _replace(path, unsealer.seal(document.to_json(), document.recipients))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # a rename would replace a symlink, not the file it names


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The directory is locked, not the file: the file is another one after each change, and nothing is left lying about.
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KeyringError(f"{path.parent}: {error.strerror}") from None
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _replace(path: Path, content: bytes) -> None:
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileNotFoundError):  # whoever could read the old file may read the new one; no more than 0600
                status = path.stat()
                if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    os.chown(temporary, status.st_uid, status.st_gid)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise KeyringError(f"{path}: {error.strerror}") from None
