"""The record of requests: one JSON line for each, also for the refused, written before its answer leaves.

Fields come from a fixed list: names, fingerprints and outcomes. Never a value of an EncryptionContext, a blob or key material.
"""

import errno
import json
import os
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

from .agent import Audited
from .peer import Peer
from .settings import Audit

__all__ = ["AuditLog"]

_MOST_LISTED: Final = 64
"""Groups and context keys to list of one request."""


class AuditLog:
    """Appends to a file of mode 0600, or writes to standard error."""

    def __init__(self, settings: Audit) -> None:
        """Open the file. Raises OSError."""
        self._descriptor = (
            sys.stderr.fileno()
            if settings.path == "stderr"
            else os.open(settings.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        )

    def record(self, peer: Peer, audited: Audited, outcome: str) -> None:
        """Write one line. Raises OSError when it could not be written whole."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": "audit",
            "request_id": audited.request_id,
            "operation": audited.operation,
            "uid": peer.uid,
            "gids": sorted(peer.gids)[:_MOST_LISTED],
            "pid": peer.pid,
            "listener": peer.listener,
            "grant": audited.grant,
            "key_id": audited.key_id,
            "key_version_id": audited.key_version_id,
            "context_keys": sorted(audited.context_keys)[:_MOST_LISTED],
            "recipient": audited.recipient,
            "destination_key_id": audited.destination_key_id,
            "destination_key_version_id": audited.destination_key_version_id,
            "outcome": outcome,
            "microseconds": round((time.monotonic() - audited.started) * 1e6),
        }
        packed = json.dumps(line).encode() + b"\n"
        written = os.write(self._descriptor, packed)
        if written != len(packed):
            with suppress(OSError):  # take back what would run into the next line; a pipe cannot
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
