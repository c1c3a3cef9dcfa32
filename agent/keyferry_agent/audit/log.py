"""Writes the audit log: one JSON line for each request, including refused requests, before the answer is sent.

Fields come from a fixed list: names, hashes and outcomes. They never contain the values of an EncryptionContext, a
CiphertextBlob or key material.
"""

import itertools
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as quoted
from typing import Final

import structlog

from keyferry.errors import CODES

from .. import __version__
from ..chained_log.file import Appended, RecordFile
from ..config.settings import Audit
from ..keyring.keyring import Keyring
from ..locking import Lock
from ..peer import HttpOrigin, Peer
from . import agent_entries
from .entry import AuditedRequest
from .writer_thread import WriterThread

__all__ = ["MAX_CONTEXT_KEYS", "MAX_CONTEXT_KEYS_BYTES", "MAX_GROUPS", "MAX_KEY_CHARACTERS", "AuditLog"]

MAX_GROUPS: Final = 64
"""Groups of a caller that one entry lists; half as many beside the fields of a gateway's request."""
MAX_CONTEXT_KEYS: Final = 32
MAX_KEY_CHARACTERS: Final = 40
"""Characters of an EncryptionContext's key in an entry. A line stays below PIPE_BUF (4,096), so that pipe writes are atomic."""
MAX_CONTEXT_KEYS_BYTES: Final = 1_280
"""Bytes of all context keys in a line, for the same reason. One character may take twelve bytes in JSON."""
MAX_PROGRAM_BYTES: Final = 512
"""Bytes of the program's path and hash in a line, for the same reason."""
log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")

_DONE: Final = frozenset({"OK", "DryRunOperationError"})
_SERVER_ERROR: Final = 500


class AuditLog:
    """Appends lines that form a chain (`chained_log`) to a file. A call blocks for a bounded time (`writer_thread`)."""

    def __init__(self, settings: Audit, lock: Lock | None = None) -> None:
        """Open the file, and hold its lock until `close`. Raises OSError."""
        self._path = settings.path
        self._writer = WriterThread()
        self._file = self._writer.call(RecordFile, settings.path)
        self._lock = lock
        self._key_names: tuple[tuple[str, tuple[str, ...]], ...] | None = None
        self.failures = 0
        """Requests whose entries could not be written, since the start."""
        self._resumed_at = 0
        self._lost = False  # whether the path could not be opened again
        self.failing = False
        """Whether the last entry could not be written."""

    def begin(self, started_at: str) -> None:
        """Write the entry of this agent's start. If that fails, it is written before the first request's entry."""
        now = _now()
        self._announce([agent_entries.start(now, __version__, started_at, self._file.chain)])

    def name_keys(self, keyring: Keyring) -> None:
        """Write the entries that name the keys of a keyring, if the keys or their aliases have changed since the last call."""
        key_names = tuple((key.key_id, key.aliases) for key in keyring.keys.values())
        if key_names != self._key_names:
            self._key_names = key_names
            self._announce(agent_entries.key_lists(_now(), keyring.loaded_at, key_names))

    def unsealed(self, peer: Peer, outcome: str, loaded_at: str) -> None:
        """Write the entry of an attempt to unseal the keyring. If that fails, it is written before the next request's entry."""
        now = _now()
        self._announce([agent_entries.unsealing(now, peer, outcome, loaded_at)])

    def unauthenticated(self, listener: str, count: int) -> None:
        """Write the entry of requests without a verified signature that have no entry of their own."""
        now = _now()
        self._announce([agent_entries.unauthenticated(now, listener, count)])

    @property
    def gap(self) -> int:
        """Requests whose entries could not be written since the last `audit.resumed` entry."""
        return self.failures - self._resumed_at

    def maintain(self, *, reopen: bool) -> None:
        """Reopen the file if `reopen`, for log rotation, and end a gap if the audit log can be written again. Logs the results.

        Ending a gap here makes the agent ready without a further request.
        """
        if reopen:
            try:
                self.reopen()
            except OSError as error:
                if not self._lost:  # log once, not at each attempt
                    log.error("audit.failed", error=error.strerror)
                self._lost = True
            else:
                self._lost = False
                log.info("audit.reopened")
        gap, failures = self.gap, self.failures
        if (gap or self.failing) and self._append([agent_entries.resumed(_now(), gap)]).error is None:
            self._resumed_at = failures
            log.info("audit.resumed", unrecorded=gap)

    def _announce(self, lines: list[str]) -> None:
        self._file.announce(lines)
        with suppress(OSError):  # on failure they are written before the next request's entry, never after it
            self._writer.call(self._file.append, [])

    def reopen(self) -> None:
        """Open the path again after its file was moved away, and continue the chain in the new file.

        Raises OSError. After that, no entry can be written until a later call succeeds.
        """
        self._writer.call(self._file.reopen)

    def moved(self) -> bool:
        """Return whether the path no longer leads to the open file. Calls the file system, which may hang."""
        if self._path == "stderr":
            return False
        try:
            status = os.stat(self._path)
        except OSError:
            return True
        return (status.st_dev, status.st_ino) != self._file.identity

    @property
    def lag(self) -> float:
        """Seconds that the last write took, or that a late write has taken so far."""
        return self._writer.lag

    def close(self) -> None:
        """Release the lock at the end of the agent.

        A hanging write may still reach the file. Then its thread or the end of the process releases the lock after the write,
        so that no other agent writes before.
        """
        if self._lock is not None:
            self._writer.finish(self._lock.release)

    def record(self, requests: Sequence[AuditedRequest]) -> Appended:
        """Write an entry for each request, in one call of the writer thread.

        Returns the number of entries that were written, and the error if not all were. After a timeout, an entry may still be
        written although its request was refused because of the timeout.
        """
        now = _now()
        lines = []
        last_peer: Peer | None = None
        caller = ""
        for request in requests:
            if request.peer is not last_peer:  # the requests of one connection come together
                last_peer, caller = request.peer, _of_peer(request.peer)
            lines.append(_line(now, caller, request))
        result = self._append(lines)
        if result.error is not None:
            self.failures += len(lines) - result.lines
        return result

    def _append(self, lines: list[str]) -> Appended:
        try:
            result = self._writer.call(self._file.append, lines)
        except OSError as error:
            result = Appended(0, error)
        self.failing = result.error is not None
        return result


def _now() -> str:
    """Return the time in the format of RFC 3339, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _line(now: str, caller: str, request: AuditedRequest) -> str:
    """Return a line without the hash of the line before it and without its closing brace.

    Formatted by hand because every request needs a line: json.dumps of a dictionary takes eight microseconds instead of one.
    """
    peer, request_id, started, entry, outcome, blob_hash = request
    program = _of_program(peer) if entry.by_program else ""
    if entry.destination_key_id:
        ciphertext, destination_ciphertext = entry.ciphertext, blob_hash
    else:
        ciphertext, destination_ciphertext = blob_hash or entry.ciphertext, ""
    return (
        f'{{"time": "{now}", "event": "audit", "request_id": {quoted(request_id)}, '
        f'"operation": {quoted(entry.operation)}, {caller}, {program}"grant": {quoted(entry.grant)}, '
        f'"key_id": {quoted(entry.key_id)}, "key_version_id": {quoted(entry.key_version_id)}, '
        f'"context_keys": {_context_keys(entry.context_keys)}, "recipient": {quoted(entry.recipient)}, '
        f'"destination_key_id": {quoted(entry.destination_key_id)}, '
        f'"destination_key_version_id": {quoted(entry.destination_key_version_id)}, '
        f'"ciphertext": "{ciphertext}", "destination_ciphertext": "{destination_ciphertext}", '
        f'{_of_outcome(outcome)}, "microseconds": {round((time.monotonic() - started) * 1e6)}'
    )


def _of_outcome(outcome: str) -> str:
    """Return the fields of the outcome and the level: `error` for a failure of the agent, `warning` for a refusal."""
    code = CODES.get(outcome)
    failure = "error" if code is not None and code.http_status >= _SERVER_ERROR else "warning"
    return f'"outcome": {quoted(outcome)}, "level": "{"info" if outcome in _DONE else failure}"'


def _context_keys(keys: Sequence[str]) -> str:
    """Return the first of the sorted keys as a JSON array, as many as the limits allow."""
    names = [quoted(key[:MAX_KEY_CHARACTERS]) for key in sorted(keys)[:MAX_CONTEXT_KEYS]]
    while len(array := f"[{', '.join(names)}]") > MAX_CONTEXT_KEYS_BYTES:
        del names[-1]
    return array


def _of_peer(peer: Peer) -> str:
    max_groups = MAX_GROUPS if peer.http is None else MAX_GROUPS // 2
    gids = sorted(set(itertools.islice(peer.gids, max_groups)))  # a peer may have 65,536 groups
    uid = "null" if peer.uid is None else peer.uid
    pid = "null" if peer.pid is None else peer.pid
    unit = "null" if peer.unit is None else quoted(peer.unit)
    http = "" if peer.http is None else _of_http(peer.access_key, peer.http)
    return f'"uid": {uid}, "gids": {gids}, "pid": {pid}, "unit": {unit}, "listener": {quoted(peer.listener)}{http}'


def _of_http(access_key: str, http: HttpOrigin) -> str:
    """Return the fields of a gateway's request. An access key is only claimed until a signature is verified."""
    name, access_key_id = ("access_key", access_key) if access_key else ("access_key_claimed", http.claimed_access_key)
    fields = {name: access_key_id, "scheme": http.scheme, "remote": http.remote, "tls": http.tls}
    return f", {json.dumps(fields | {'user_agent': http.user_agent})[1:-1]}"


def _of_program(peer: Peer) -> str:
    """Return the fields of a caller's program, for requests that a grant on this program allows."""
    exe = peer.exe
    while len(fields := json.dumps({"exe": exe, "sha256": peer.sha256})[1:-1]) > MAX_PROGRAM_BYTES and exe:
        exe = exe[: len(exe) * 3 // 4]
    return f"{fields}, "
