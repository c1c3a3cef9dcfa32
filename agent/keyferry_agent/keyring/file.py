"""The keyring file: read whole, changed under a lock, replaced atomically.

A change is: lock, read, change, seal, write beside, fsync, write an entry of the change (changes.py), rename, fsync the
directory, complete the entry. Two simultaneous commands run one after the other. A crash at any instant leaves the old file or
the new file, never a mixture and never half. A crash can leave a temporary file beside the keyring, sealed like the keyring
itself; the next change removes it.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from keyferry import descriptors, new_files, private_files

from ..locking import Lock, LockError
from . import changes
from .changes import Change, Picture
from .document import Document, KeyringError
from .recipients import missing, shortened
from .sealing import Unsealer, count_recipients, seal

__all__ = ["Before", "change", "create", "open_sealed", "read", "read_sealed", "reseal"]

_LOCK_SECONDS: Final = 30.0
"""Seconds to wait for other commands that change the same keyring: sealing with a passphrase takes seconds."""


def read(path: Path, unsealer: Unsealer) -> Document:
    """Read and check a keyring, without the keys whose deletion date has come. Raises `KeyringError`."""
    return open_sealed(read_sealed(path), unsealer)


def read_sealed(path: Path) -> bytes:
    """Return the sealed bytes of a keyring file. Raises `KeyringError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: opening a pipe would block
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise KeyringError(f"{path}: not a regular file")
            private_files.check(descriptor, path, owners=None)  # root manages the keyrings of other users
            return file.read()
    except OSError as error:
        raise KeyringError(f"{path}: {error.strerror}") from None
    except private_files.PrivateFileError as error:
        raise KeyringError(str(error)) from None


def open_sealed(sealed_bytes: bytes, unsealer: Unsealer) -> Document:
    """Unseal and check a keyring, without the keys whose deletion date has come. Raises `KeyringError`."""
    document, _ = _opened(sealed_bytes, unsealer)
    return document


def _opened(sealed_bytes: bytes, unsealer: Unsealer) -> tuple[Document, Picture]:
    """Return the document of `open_sealed`, and the picture of the file, which includes keys that the next change removes."""
    document = Document.from_json(unsealer.unseal(sealed_bytes))
    picture = changes.picture(document)
    document.purge()
    return document, picture


def create(path: Path, document: Document, passphrase: str | None) -> None:
    """Write a new keyring. Raises `KeyringError` if the file exists: a keyring is never replaced by an empty one."""
    with creating(path, document, passphrase):
        pass


@contextmanager
def creating(path: Path, document: Document, passphrase: str | None) -> Iterator[None]:
    """Write a new keyring, which has its name after the `with` block. In the block, the caller stores the unseal secret.

    All checks and all writing are done before the block. An exception in the block leaves no keyring. Raises `KeyringError`.
    """
    path = _real(path)
    with _locked(path):
        if path.exists():
            raise KeyringError(f"{path} exists; a keyring is never overwritten")
        after = seal(document.to_json(), document.recipients, passphrase)
        with _replacing(path, Change(None, after, {}, changes.picture(document))):
            yield


@contextmanager
def change(path: Path, unsealer: Unsealer) -> Iterator[Document]:
    """Lend the document for a `with` block and write it back at its end. An exception in the block changes nothing.

    Raises `KeyringError`, also when the change would lock out a recipient: the file was sealed by hand, to other recipients
    than its content names.
    """
    path = _real(path)
    with _locked(path):
        before = read_sealed(path)
        document, picture = _opened(before, unsealer)
        yield document
        after = seal(document.to_json(), document.recipients, unsealer.passphrase)
        if not unsealer.opens(after) or count_recipients(before) != count_recipients(after):
            raise _sealed_by_hand(path)
        with _replacing(path, Change(before, after, picture, changes.picture(document))):
            pass


class Before(NamedTuple):
    """The recipients of a keyring before it was resealed."""

    recipients: list[str]
    unnamed: int
    """Number of recipients of the sealed file that its content did not name."""


@contextmanager
def reseal(
    path: Path,
    unsealer: Unsealer,
    choose: Callable[[list[str]], list[str]],
    passphrase: str | None,
    *,
    confirmed: bool = False,
    keeps_others: bool = False,
) -> Iterator[Before]:
    """Seal to the recipients that `choose` returns for the previous recipients, or to a passphrase. Raises `KeyringError`.

    Unless `confirmed`, a change is refused that the unsealer could not open, or that leaves one recipient. `keeps_others`:
    refuse a file that was sealed by hand to recipients which its content does not name. All checks are done before the `with`
    block, and the file is replaced after it: in the block, the caller stores a new passphrase. An exception in the block
    changes nothing.
    """
    path = _real(path)
    with _locked(path):
        sealed_bytes = read_sealed(path)
        document, picture = _opened(sealed_bytes, unsealer)
        before = Before(document.recipients, count_recipients(sealed_bytes) - len(document.recipients))
        if keeps_others and before.unnamed:
            raise _sealed_by_hand(path)
        document.recipients = choose(list(before.recipients))
        after = seal(document.to_json(), document.recipients, passphrase)
        if not confirmed:
            _check_access(path, unsealer, after, before.recipients, document.recipients)
        with _replacing(path, Change(sealed_bytes, after, picture, changes.picture(document))):
            yield before


def _check_access(path: Path, unsealer: Unsealer, sealed_bytes: bytes, before: list[str], after: list[str]) -> None:
    """Raise `KeyringError` for a change that may lock out the operator, or all operators."""
    reasons = []
    if not unsealer.opens(sealed_bytes):
        reasons.append("--unseal could no longer open it")
    if len(after) == 1:
        reasons.append("one recipient would be left, whose identity may be lost, and every key with it")
    if reasons:
        lost_recipients = missing(before, after)
        raise KeyringError(
            f"{path}: nothing was changed: {', and '.join(reasons)}"
            + (f"; it would remove: {shortened(lost_recipients)}" if lost_recipients else "")
            + "; `keyring add-recipient` keeps all recipients, and --yes makes the change nevertheless"
        )


def _sealed_by_hand(path: Path) -> KeyringError:
    return KeyringError(
        f"{path} was sealed by hand: its recipients differ from the list inside it, and a change would lock some of them out. "
        "Run `keyring reseal` first, with all recipients"
    )


def _real(path: Path) -> Path:
    """Return the path without symlinks: a rename would replace a symlink, not the file it names. Raises `KeyringError`."""
    try:
        if descriptors.find(path) is not None or descriptors.find_output(path) is not None:
            raise KeyringError(
                f"{path}: leads to an open descriptor, whose file is not replaced; name the keyring itself"
            )
        return Path(os.path.realpath(path))
    except OSError as error:
        raise KeyringError(f"{path}: {error.strerror}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The lock is not on the file itself, which each change replaces. Nor is it on the folder, which other users may be able to
    # open, and to keep locked.
    try:
        with Lock(path, seconds=_LOCK_SECONDS, with_owner=True):
            yield
    except LockError as error:
        raise KeyringError(str(error)) from None


@contextmanager
def _replacing(path: Path, change: Change) -> Iterator[None]:
    """Write the new file beside the old one and the entry of the change, and replace the old file after the `with` block.

    Raises `KeyringError`, and then leaves the old file in place, unless the message states that the keyring was changed.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()  # left by a killed process: a live one would hold the lock, which this process has now
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(change.after)
                file.flush()
                os.fsync(descriptor)
                with changes.recorded(path, change):
                    yield
                    _rename(temporary, path, descriptor)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise KeyringError(f"{path}: {error.strerror}") from None


def _rename(temporary: Path, path: Path, descriptor: int) -> None:
    """Change the owner and the name of the new file to those of the old file. Raises `KeyringError` or OSError.

    `descriptor`: the open new file.
    """
    changes.copy_owner(path, descriptor)  # the owner of the old file can read the new file; its mode remains 0600
    os.replace(temporary, path)
    if not os.path.samestat(path.lstat(), os.fstat(descriptor)):
        raise KeyringError(f"{path}: another user replaced the file while it was written; check its folder")
    try:
        new_files.sync_folder(path.parent, tolerant=False)
    except OSError as error:
        raise KeyringError(f"{path} was changed, but a power failure may undo it: {error.strerror}") from None
