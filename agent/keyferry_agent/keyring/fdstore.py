"""Keys that survive a restart: systemd's file descriptor store holds the keyring's memory and the description of its keys.

The store (`FileDescriptorStoreMax=`, sd_pid_notify_with_fds(3)) holds descriptors under names while the service is restarted.
Each keyring has a number N and two descriptors in the store:

    keyring-N-memory         its secret memory: each version's material, then the SHA-256 of the description and the material
    keyring-N-description    a memfd with file seals: JSON with Format, LoadedAt, File (the file's status) and Keys

A load stores them in three steps, which begin in `loader`. `SecretMemory` calls `store_memory` when it has mapped fresh memory,
and closes the descriptor before there is a key in the memory.

1. `store_memory`   FDSTORE=1, FDNAME=keyring-N-memory: N is one more than the highest number in the store
2. the loader fills the memory
3. `commit`         writes the digest into the memory; FDSTORE=1, FDNAME=keyring-N-description; then FDSTOREREMOVE=1 for both
                    names of all other numbers

A crash leaves a memory without a description, or two keyrings; both are found by their numbers. At a start the manager passes
all descriptors with their names (LISTEN_FDS, LISTEN_FDNAMES). `restore` maps the keyring with the highest number that has both
descriptors, checks its digest, and removes all others from the store. If none is whole, the agent opens the keyring's file.
"""

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

from keyferry.secret import SecretMemory, SecretMemoryError

from .description import KeyringDescription
from .keyring import KEPT, Keyring, build_keyring, required_bytes

__all__ = ["FileStatus", "KeyringPersister"]

_NAME: Final = re.compile(r"keyring-(\d{1,9})-(memory|description)")
_FORMAT: Final = 1
_FORMAT_WITH_DISABLED: Final = 2
"""The format of a description with disabled versions. An agent that knows only format 1 must not decrypt with a disabled
version; it does not accept this format, and opens the keyring's file instead.
"""
_FORMAT_WITH_SECTIONS: Final = 3
"""The format of a description with access keys or receipt keys, whose material follows that of the master keys."""
_MAX_DESCRIPTION_BYTES: Final = 1 << 28

FileStatus: TypeAlias = Sequence[int] | None
"""The status of the keyring's file before it was read; None if the file was missing."""


class KeyringPersister:
    """Stores the descriptors of the newest keyring with the service manager, and removes those of all others."""

    def __init__(self, store: Callable[[str, int], bool], forget: Callable[[str], None]) -> None:
        """`store` and `forget` store a descriptor with the service manager under a name, and remove it."""
        self._store = store
        self._forget = forget
        self._numbers: set[int] = set()
        self._pending: int | None = None
        self._stored: int | None = None

    def store_memory(self, descriptor: int) -> None:
        """Store the descriptor of the next keyring's memory with the service manager, before the memory is filled."""
        self._discard(self._numbers - {self._stored})  # memory whose keyring was never committed
        self._pending = max(self._numbers, default=0) + 1
        self._numbers.add(self._pending)
        self._store(f"keyring-{self._pending}-memory", descriptor)

    def commit(self, keyring: Keyring, file_status: FileStatus) -> bool:
        """Store the description of the keyring whose memory was stored last, and remove older keyrings from the store.

        Return False if its memory was not stored, or its description cannot be stored.
        """
        number, self._pending = self._pending, None
        if number is None:
            return False
        description = json.dumps(_describe(keyring, file_status)).encode()
        digest = _digest(keyring, description)
        with keyring.check.lend() as check:
            check[:] = digest
        descriptor = os.memfd_create("keyferry-keyring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(description)
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            is_stored = self._store(f"keyring-{number}-description", descriptor)
        finally:
            os.close(descriptor)
        if is_stored:
            self._stored = number
            self._discard(self._numbers - {number})
        return is_stored

    def restore(self, descriptors: Iterable[tuple[str, int]]) -> tuple[Keyring, FileStatus] | None:
        """Return the newest complete keyring among the manager's descriptors, and the status of its file; None without one.

        Closes all the descriptors.
        """
        by_number: dict[int, dict[str, int]] = {}
        for name, descriptor in descriptors:
            match = _NAME.fullmatch(name)
            if match and match[2] not in by_number.get(int(match[1]), {}):
                by_number.setdefault(int(match[1]), {})[match[2]] = descriptor
            else:
                os.close(descriptor)
        self._numbers |= by_number.keys()
        keyring = None
        for number in sorted(by_number, reverse=True):
            pair = by_number[number]
            if keyring is None and len(pair) == 2:
                keyring = _restore(pair["memory"], pair["description"])
                self._stored = number if keyring else None
            else:
                for descriptor in pair.values():
                    os.close(descriptor)
        self._discard(self._numbers - {self._stored})
        return keyring

    def _discard(self, numbers: Iterable[int | None]) -> None:
        for number in list(numbers):
            for part in ("memory", "description"):
                self._forget(f"keyring-{number}-{part}")
            self._numbers.discard(number)


def _restore(memory: int, description_file: int) -> tuple[Keyring, FileStatus] | None:
    with open(description_file, "rb") as file:
        file.seek(0)
        description = file.read(_MAX_DESCRIPTION_BYTES)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, memory)
        try:
            content = json.loads(description)
            if content["Format"] not in (_FORMAT, _FORMAT_WITH_DISABLED, _FORMAT_WITH_SECTIONS):
                return None
            description_of_keys = KeyringDescription.from_json(
                content["Keys"],
                content if content["Format"] == _FORMAT_WITH_SECTIONS else KeyringDescription().sections(),
            )
            size = required_bytes(description_of_keys)
        except (ValueError, KeyError, TypeError):
            return None
        stack.pop_all()
    try:
        keyring = build_keyring(description_of_keys, _leave_unchanged, SecretMemory(size, descriptor=memory))
    except (SecretMemoryError, ValueError, KeyError, TypeError):
        return None
    with keyring.check.lend() as check:
        if not hmac.compare_digest(check, _digest(keyring, description)):
            return None
    keyring.loaded_at, keyring.source = content["LoadedAt"], KEPT
    return keyring, content["File"]


def _leave_unchanged(_view: memoryview) -> None:
    """Leave the material unchanged: it is already in the memory."""


def _digest(keyring: Keyring, description: bytes) -> bytes:
    """Return the SHA-256 over the description and the material. It detects incomplete memory and memory of another keyring."""
    digest = hashlib.sha256(description)
    for piece in keyring.material():
        with piece.lend() as material:
            digest.update(material)
    return digest.digest()


def _describe(keyring: Keyring, file_status: FileStatus) -> dict[str, Any]:
    content = keyring.describe()
    has_disabled = any(version.disabled for key in content.keys for version in key.versions)
    sections = content.sections() if content.access_keys or content.receipt_keys else {}
    return {
        "Format": _FORMAT_WITH_SECTIONS if sections else _FORMAT_WITH_DISABLED if has_disabled else _FORMAT,
        "LoadedAt": keyring.loaded_at,
        "File": file_status,
        "Keys": [key.to_json() for key in content.keys],
        **sections,
    }
