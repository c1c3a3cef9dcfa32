"""Writes the record of requests: one JSON line for each, also for the refused, before its answer leaves.

Fields come from a fixed list: names, fingerprints and outcomes. Never a value of an EncryptionContext, a blob or key material.
"""

import errno
import json
import os
import select
import stat
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

from ..agent import Audited
from ..peer import Peer
from ..settings import Audit
from .chain import BEGINNING, link

__all__ = ["AuditLog"]

_MOST_LISTED: Final = 64
"""Groups to list of one request."""
_MOST_KEYS: Final = 32
_LONGEST_KEY: Final = 40
"""Characters of a context's key to record. A line stays below 4,096 bytes: so much a pipe takes whole, or not at all."""
_NONE: Final = -1
_TAIL: Final = 65_536
"""Bytes at a file's end in which its last line is."""
_PATIENCE: Final = 2_000
"""Milliseconds to wait for the reader of a pipe: once. Until it reads again, nothing can be recorded, and nobody waits."""


class AuditLog:
    """Appends to a file of mode 0600, or writes to standard error. Lines form a chain (`chain`)."""

    def __init__(self, settings: Audit) -> None:
        """Open the file. Raises OSError."""
        self._settings = settings
        self._descriptor = _NONE
        self._patience = _PATIENCE
        self._previous = BEGINNING
        self._open()

    def reopen(self) -> None:
        """Open the file again, after it was moved away, and go on with the chain in the new one.

        Raises OSError; then nothing can be recorded until it succeeds.
        """
        if self._settings.path != "stderr":
            old, self._descriptor = self._descriptor, _NONE
            if old != _NONE:
                os.close(old)
            self._open()

    def moved(self) -> bool:
        """Whether another file, or none, is where this one was."""
        if self._settings.path == "stderr":
            return False
        if self._descriptor == _NONE:
            return True
        own = os.fstat(self._descriptor)
        try:
            there = os.stat(self._settings.path)
        except OSError:
            return True
        return (own.st_dev, own.st_ino) != (there.st_dev, there.st_ino)

    def record(self, peer: Peer, audited: Audited, outcome: str) -> None:
        """Write one line. Raises OSError when it could not be written whole."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": "audit",
            "previous": self._previous,
            "request_id": audited.request_id,
            "operation": audited.operation,
            "uid": peer.uid,
            "gids": sorted(peer.gids)[:_MOST_LISTED],
            "pid": peer.pid,
            "unit": peer.unit,
            "listener": peer.listener,
            "grant": audited.grant,
            "key_id": audited.key_id,
            "key_version_id": audited.key_version_id,
            "context_keys": sorted(key[:_LONGEST_KEY] for key in audited.context_keys)[:_MOST_KEYS],
            "recipient": audited.recipient,
            "destination_key_id": audited.destination_key_id,
            "destination_key_version_id": audited.destination_key_version_id,
            "outcome": outcome,
            "microseconds": round((time.monotonic() - audited.started) * 1e6),
        }
        packed = json.dumps(line).encode()
        self._write(packed + b"\n")
        self._previous = link(packed)

    def _write(self, packed: bytes) -> None:
        if self._waits:
            ready = self._waits.poll(self._patience)
            self._patience = _PATIENCE if ready else 0
            if not ready:
                raise OSError(errno.EAGAIN, "nobody reads the pipe that it goes to")
        written = os.write(self._descriptor, packed)
        if written != len(packed):
            with suppress(OSError):  # take back what would run into the next line; a pipe cannot
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open(self) -> None:
        if self._settings.path == "stderr":
            self._descriptor = sys.stderr.fileno()
        else:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self._settings.path, flags, 0o600)
        mode = os.fstat(self._descriptor).st_mode
        self._waits: select.poll | None = None
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            self._waits = select.poll()
            self._waits.register(self._descriptor, select.POLLOUT)
        elif stat.S_ISREG(mode) and self._settings.path != "stderr":
            self._continue()

    def _continue(self) -> None:
        """Take the chain up where the file's last line left it."""
        size = os.fstat(self._descriptor).st_size
        tail = os.pread(self._descriptor, _TAIL, max(0, size - _TAIL))
        whole = tail.rfind(b"\n") + 1
        if whole != len(tail):  # cut off by a crash: no answer left after it
            os.ftruncate(self._descriptor, size - (len(tail) - whole))
        if whole:
            self._previous = link(tail[:whole].splitlines()[-1])
