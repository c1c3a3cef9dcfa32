"""The log of a keyring's changes, beside the keyring: an entry before each change and one after it, in the audit log's chain.

The first entry of a change (`begun`) is on the disk before the keyring is replaced, and a change without it is refused. The
second one (`done` or `failed`) follows the replacement. A crash between them leaves `begun` alone: the hashes in the next
entry, or of the file, show whether the keyring was replaced (`history` compares them).

The changes are found by comparing the document before and after, for every verb alike. No entry contains key material.
"""

import dataclasses
import hashlib
import json
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from keyferry import new_files, private_files

from .document import Document, KeyringError

if TYPE_CHECKING:
    from ..chained_log.file import RecordFile

__all__ = ["EVENT", "Change", "Picture", "attributed", "copy_owner", "file_hash", "log_of", "picture", "recorded"]

EVENT: Final = "keyring.change"
MAX_CHANGES_BYTES: Final = 3_072
"""Most bytes of all single changes in an entry, so that a line stays below 4,096 bytes, as in the audit log."""
MAX_VALUE_CHARACTERS: Final = 100
"""Most characters of a recipient, or of a changed value, in an entry: a description has up to 8,192."""
_MAX_UID: Final = 2**32 - 1
"""(uid_t) -1: the kernel's number for a process that no login began."""

Picture: TypeAlias = dict[tuple[tuple[str, str], ...], dict[str, Any]]
"""Keys, versions, aliases, recipients, hosts and access keys, each by its names, with all its values that are not secret."""

_verb: ContextVar[str] = ContextVar("verb", default="")


@contextmanager
def attributed(verb: str) -> Iterator[None]:
    """Name the verb of all changes that are made in the `with` block."""
    token = _verb.set(verb)
    try:
        yield
    finally:
        _verb.reset(token)


def log_of(keyring: Path) -> Path:
    """Return the path of the log of a keyring's changes."""
    return keyring.with_name(f"{keyring.name}.changes.jsonl")


def file_hash(content: bytes | None) -> str | None:
    """Return the SHA-256 of a keyring file in the format of entries; None if there is no file."""
    return None if content is None else f"sha256:{hashlib.sha256(content).hexdigest()}"


def picture(document: Document) -> Picture:
    """Return the values of a document that an entry may contain."""
    values: Picture = {(("recipient", text[:MAX_VALUE_CHARACTERS]),): {} for text in document.recipients}
    for key in document.keys:
        key_name = ("key_id", key.key_id)
        values[(key_name,)] = _values(key)
        values |= {(key_name, ("key_version_id", version.version_id)): _values(version) for version in key.versions}
    for access_key in document.access_keys:
        values[(("access_key_id", access_key.access_key_id),)] = _values(access_key)
    for receipt_key in document.receipt_keys:
        key_name = ("receipt_key_id", receipt_key.key_id)
        values[(key_name,)] = _values(receipt_key)
        values |= {
            (key_name, ("key_version_id", version.version_id)): _values(version) for version in receipt_key.versions
        }
    values |= {(("host", name),): {"recipient": recipient} for name, recipient in document.hosts.items()}
    return values | {(("alias", alias),): {"key_id": owner} for alias, owner in document.aliases.items()}


def _values(entry: Any) -> dict[str, Any]:
    """Return the values of a key or a version: texts, numbers and flags, without the material, which its repr leaves out."""
    return {
        field.name: getattr(entry, field.name)
        for field in dataclasses.fields(entry)
        if field.repr and isinstance(getattr(entry, field.name), str | bool | int)
    }


@dataclasses.dataclass(frozen=True)
class Change:
    """The change of a keyring: its sealed content before and after, and the pictures of both."""

    before: bytes | None
    after: bytes
    was: Picture
    now: Picture

    def entry(self) -> dict[str, Any]:
        """Return the entry of the change, without its result."""
        changes: list[dict[str, Any]] = []
        size, omitted_count = 0, 0
        for change in self._differences():
            size += len(json.dumps(change)) + len(", ")
            if size <= MAX_CHANGES_BYTES:
                changes.append(change)
            else:
                omitted_count += 1
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": EVENT,  # without a level: `audit verify` would then expect the start of an agent before the entry
            "verb": _verb.get(),
            **_operator(),
            "changes": changes,
            "omitted_changes": omitted_count,
            "recipients": sum(names[0][0] == "recipient" for names in self.now),
            "before": file_hash(self.before),
            "after": file_hash(self.after),
        }

    def _differences(self) -> Iterator[dict[str, Any]]:
        """Yield an entry's single changes: each addition, each removal, and each changed value."""
        for kind, new_rows, old_rows in (("added", self.now, self.was), ("removed", self.was, self.now)):
            for names, values in new_rows.items():
                if names not in old_rows:
                    owner = {"key_id": values["key_id"]} if names[0][0] == "alias" else {}
                    yield {**dict(names), **owner, "change": kind}
        for names, values in self.now.items():
            for name in sorted(values.keys() | self.was.get(names, values).keys()):
                before, after = self.was.get(names, values).get(name), values.get(name)
                if before != after:
                    yield {**dict(names), "change": name, "before": _short(before), "after": _short(after)}


def _short(value: Any) -> Any:
    return value[:MAX_VALUE_CHARACTERS] if isinstance(value, str) else value


def _operator() -> dict[str, Any]:
    """Return the user of this process, the kernel's login user, if there is one, and the user that sudo claims."""
    uid = os.getuid()
    user = login = None
    with suppress(KeyError):
        user = pwd.getpwuid(uid).pw_name
    with suppress(OSError, ValueError):
        login = int(Path("/proc/self/loginuid").read_text())
    sudo_uid = os.environ.get("SUDO_UID", "")
    return {
        "uid": uid,
        "user": user,
        "login_uid": None if login == _MAX_UID else login,
        "claimed_sudo_uid": int(sudo_uid)
        if sudo_uid.isascii() and sudo_uid.isdecimal() and len(sudo_uid) <= 10
        else None,
    }


@contextmanager
def recorded(keyring: Path, change: Change) -> Iterator[None]:
    """Write the first entry of a change before the `with` block, which replaces the keyring, and the second one after it.

    The caller holds the keyring's lock. Raises `KeyringError` before the block if the entry cannot be written.
    """
    log = log_of(keyring)
    entry = change.entry()
    try:
        file = _open(log, keyring)
        try:
            _append(file, {**entry, "result": "begun"})
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise KeyringError(
            f"{log}: {error.strerror}; the keyring was not changed, because each change needs an entry in this file"
        ) from None
    try:
        try:
            yield
        except BaseException:
            with suppress(OSError):
                _append(file, {**entry, "result": "failed"})
            raise
        _append(file, {**entry, "result": "done"})
    except OSError as error:
        raise KeyringError(
            f"{log}: {error.strerror}; {keyring} was changed, and the entry of that is not complete"
        ) from None
    finally:
        file.close()


def _open(log: Path, keyring: Path) -> "RecordFile":
    """Open the log, or create it with the keyring's owner. Raises OSError, and `KeyringError` if other users can write it."""
    from ..chained_log.file import RecordFile  # noqa: PLC0415 - the loader reads keyrings, and is not to import an audit log

    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        pass
    else:
        try:
            copy_owner(keyring, descriptor)
        finally:
            os.close(descriptor)
        new_files.sync_folder(log.parent, tolerant=False)
    # Root manages the keyrings of other users.
    owners = private_files.owner_of(keyring) or private_files.owner_of(keyring.parent)
    if problems := private_files.problems(log, owners=owners):
        raise KeyringError(f"{'; '.join(problems)}; the keyring was not changed")
    return RecordFile(str(log))


def _append(file: "RecordFile", entry: dict[str, Any]) -> None:
    """Write an entry to the disk. Raises OSError."""
    result = file.append([json.dumps(entry)[:-1]])
    if result.error is not None:
        raise result.error
    file.sync()


def copy_owner(keyring: Path, descriptor: int) -> None:
    """Give an open file the owner and group of a keyring, if the keyring exists. Raises OSError."""
    with suppress(FileNotFoundError):
        status = keyring.lstat()
        if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
            # By the descriptor: another user may own the folder, and replace the file of this name.
            os.fchown(descriptor, status.st_uid, status.st_gid)
