"""Keys that survive a restart: the service manager stores the descriptors of the keyring's memory and of its description.

Each keyring has two descriptors with one number. The first is its secret memory, stored when the memory is allocated. The
second is a description of its keys in JSON, in a memfd with file seals, stored when the keyring is complete. A starting agent
maps the complete keyring with the highest number again; it needs no unseal secret for that.
"""

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from keyferry.secret import SecretMemory, SecretMemoryError

from .description import KeyDescription
from .keyring import KEPT, Keyring, build_keyring, required_bytes

__all__ = ["KeyringPersister"]

_NAME: Final = re.compile(r"keyring-(\d{1,9})-(memory|description)")
_FORMAT: Final = 1
_FORMAT_WITH_DISABLED: Final = 2
"""The format of a description with disabled versions. An agent that knows only format 1 must not decrypt with a disabled
version; it does not accept this format, and opens the keyring's file instead.
"""
_MOST: Final = 1 << 28
"""Most bytes that are read of a description."""

Look = Sequence[int] | None
"""The status of the keyring's file when it was read."""


class KeyringPersister:
    """Stores the descriptors of the newest keyring with the service manager, and removes those of all others."""

    def __init__(self, store: Callable[[str, int], bool], forget: Callable[[str], None]) -> None:
        """`store` and `forget` store a descriptor with the service manager under a name, and remove it."""
        self._store = store
        self._forget = forget
        self._numbers: set[int] = set()
        self._shared: int | None = None
        self._kept: int | None = None

    def share(self, descriptor: int) -> None:
        """Store the descriptor of the next keyring's memory with the service manager, before the memory is filled."""
        self._drop(self._numbers - {self._kept})  # memory that was shared, but whose keyring was never completed
        self._shared = max(self._numbers, default=0) + 1
        self._numbers.add(self._shared)
        self._store(f"keyring-{self._shared}-memory", descriptor)

    def keep(self, keyring: Keyring, look: Look) -> bool:
        """Complete the storing of the keyring whose memory was shared last; older keyrings are removed.

        Return False if its memory was not shared, or the description cannot be stored.
        """
        number, self._shared = self._shared, None
        if number is None:
            return False
        description = json.dumps(_describe(keyring, look)).encode()
        digest = _digest(keyring, description)
        with keyring.check.lend() as check:
            check[:] = digest
        descriptor = os.memfd_create("keyferry-keyring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(description)
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            stored = self._store(f"keyring-{number}-description", descriptor)
        finally:
            os.close(descriptor)
        if stored:
            self._kept = number
            self._drop(self._numbers - {number})
        return stored

    def restore(self, given: Iterable[tuple[str, int]]) -> tuple[Keyring, Look] | None:
        """Return the newest complete keyring among the manager's descriptors, and the status of its file; None without one.

        Closes all the descriptors.
        """
        found: dict[int, dict[str, int]] = {}
        for name, descriptor in given:
            match = _NAME.fullmatch(name)
            if match and match[2] not in found.get(int(match[1]), {}):
                found.setdefault(int(match[1]), {})[match[2]] = descriptor
            else:
                os.close(descriptor)
        self._numbers |= found.keys()
        restored = None
        for number in sorted(found, reverse=True):
            pair = found[number]
            if restored is None and len(pair) == 2:
                restored = _restore(pair["memory"], pair["description"])
                self._kept = number if restored else None
            else:
                for descriptor in pair.values():
                    os.close(descriptor)
        self._drop(self._numbers - {self._kept})
        return restored

    def _drop(self, numbers: Iterable[int | None]) -> None:
        for number in list(numbers):
            for part in ("memory", "description"):
                self._forget(f"keyring-{number}-{part}")
            self._numbers.discard(number)


def _restore(memory: int, described: int) -> tuple[Keyring, Look] | None:
    with open(described, "rb") as file:
        file.seek(0)
        description = file.read(_MOST)
    with contextlib.ExitStack() as closing:
        closing.callback(os.close, memory)
        try:
            content = json.loads(description)
            if content["Format"] not in (_FORMAT, _FORMAT_WITH_DISABLED):
                return None
            keys = [KeyDescription.from_json(fields) for fields in content["Keys"]]
            size = required_bytes(keys)
        except (ValueError, KeyError, TypeError):
            return None
        closing.pop_all()
    try:
        keyring = build_keyring(keys, _as_it_is, SecretMemory(size, given=memory))
    except (SecretMemoryError, ValueError, KeyError, TypeError):
        return None
    with keyring.check.lend() as check:
        if not hmac.compare_digest(check, _digest(keyring, description)):
            return None
    keyring.loaded_at, keyring.source = content["LoadedAt"], KEPT
    return keyring, content["File"]


def _as_it_is(_view: memoryview) -> None:
    """Leave the material unchanged: it is already in the memory."""


def _digest(keyring: Keyring, description: bytes) -> bytes:
    """Return the SHA-256 over the description and the material. It detects incomplete memory and memory of another keyring."""
    digest = hashlib.sha256(description)
    for key in keyring.keys.values():
        for version in key.versions.values():
            with version.material.lend() as material:
                digest.update(material)
    return digest.digest()


def _describe(keyring: Keyring, look: Look) -> dict[str, Any]:
    keys = [key.describe() for key in keyring.keys.values()]
    disabled = any(version.disabled for key in keys for version in key.versions)
    form = _FORMAT_WITH_DISABLED if disabled else _FORMAT
    return {"Format": form, "LoadedAt": keyring.loaded_at, "File": look, "Keys": [key.to_json() for key in keys]}
