"""Writes the audit log: one JSON line for each request, including refused requests, before the answer is sent.

Fields come from a fixed list: names, hashes and outcomes. They never contain the values of an EncryptionContext, a
CiphertextBlob or key material.
"""

import functools
import itertools
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as quoted
from typing import Final

from keyferry.errors import CODES

from .. import __version__
from ..chained_log.file import Appended, RecordFile
from ..config.settings import Audit
from ..keyring.keyring import Keyring
from ..locking import Lock
from ..peer import Peer
from . import announcements
from .entry import AuditEntry
from .writer_thread import WriterThread

__all__ = ["MAX_CONTEXT_KEYS", "MAX_CONTEXT_KEYS_BYTES", "MAX_GROUPS", "MAX_KEY_CHARACTERS", "AuditLog"]

_PEERS: Final = 1_024
"""Callers and programs whose part of a line is cached."""
MAX_GROUPS: Final = 64
"""Groups of a caller that one entry lists."""
MAX_CONTEXT_KEYS: Final = 32
MAX_KEY_CHARACTERS: Final = 40
"""Characters of an EncryptionContext's key in an entry. A line stays below PIPE_BUF (4,096), so that pipe writes are atomic."""
MAX_CONTEXT_KEYS_BYTES: Final = 1_280
"""Bytes of all context keys in a line, for the same reason. One character may take twelve bytes in JSON."""
_LONGEST_PROGRAM: Final = 512
"""Bytes of the program's path and hash in a line, for the same reason."""
_DONE: Final = frozenset({"OK", "DryRunOperationError"})
_SERVER_ERROR: Final = 500


class AuditLog:
    """Appends lines that form a chain (`chained_log`) to a file. A call blocks for a bounded time (`writer_thread`)."""

    def __init__(self, settings: Audit, lock: Lock | None = None) -> None:
        """Open the file, and hold its lock until `close`. Raises OSError."""
        self._path = settings.path
        self._hand = WriterThread()
        self._file = self._hand.call(RecordFile, settings.path)
        self._lock = lock
        self._last_peer: tuple[Peer | None, str, str] = None, "", ""
        self._named: tuple[tuple[str, tuple[str, ...]], ...] | None = None
        self.failures = 0
        """Requests whose entries could not be written, since the start."""
        self._resumed_at = 0
        self.failing = False
        """Whether the last entry could not be written."""

    def begin(self, started_at: str) -> None:
        """Write the entry of this agent's start. If that fails, it is written before the first request's entry."""
        now = _time_of_day(time.time())
        self._announce([announcements.start(now, __version__, started_at, self._file.chain)])

    def name_keys(self, keyring: Keyring) -> None:
        """Write the entries that name the keys of a keyring, if the keys or their aliases have changed since the last call."""
        named = tuple((key.key_id, key.aliases) for key in keyring.keys.values())
        if named != self._named:
            self._named = named
            self._announce(announcements.key_lists(_time_of_day(time.time()), keyring.loaded_at, named))

    def unsealed(self, peer: Peer, outcome: str, loaded_at: str) -> None:
        """Write the entry of an attempt to unseal the keyring. If that fails, it is written before the next request's entry."""
        now = _time_of_day(time.time())
        self._announce([announcements.unsealing(now, peer, outcome, loaded_at)])

    @property
    def gap(self) -> int:
        """Requests whose entries could not be written since the last `audit.resumed` entry."""
        return self.failures - self._resumed_at

    def resume(self) -> bool:
        """Write the entry that ends a gap. Return False if the audit log cannot be written yet."""
        failures = self.failures
        if self._append([announcements.resumed(_time_of_day(time.time()), self.gap)]).error is None:
            self._resumed_at = failures
        return not self.failing

    def _announce(self, lines: list[str]) -> None:
        self._file.announce(lines)
        with suppress(OSError):  # on failure they are written before the next request's entry, never after it
            self._hand.call(self._file.append, [])

    def reopen(self) -> None:
        """Open the path again after its file was moved away, and continue the chain in the new file.

        Raises OSError. After that, no entry can be written until a later call succeeds.
        """
        self._hand.call(self._file.reopen)

    def moved(self) -> bool:
        """Return whether the path no longer leads to the open file. Calls the file system, which may hang."""
        if self._path == "stderr":
            return False
        try:
            there = os.stat(self._path)
        except OSError:
            return True
        return (there.st_dev, there.st_ino) != self._file.identity

    @property
    def lag(self) -> float:
        """Seconds that the last write took, or that a late write has taken so far."""
        return self._hand.lag

    def close(self) -> None:
        """Release the lock at the end of the agent.

        A hanging write may still reach the file. Then its thread or the end of the process releases the lock after the write,
        so that no other agent writes before.
        """
        if self._lock is not None:
            self._hand.finish(self._lock.release)

    def record(self, requests: Sequence[tuple[Peer, AuditEntry, str]]) -> Appended:
        """Write an entry for each request, with its peer and its outcome, in one call of the writer thread.

        Returns the number of entries that were written, and the error if not all were. After a timeout, an entry may still be
        written although its request was refused because of the timeout.
        """
        now = _time_of_day(time.time())
        lines = []
        last, caller, program = self._last_peer
        for peer, audited, outcome in requests:
            if peer is not last:
                last, caller, program = self._last_peer = peer, _of_peer(peer), _of_program(peer.exe, peer.sha256)
            lines.append(_line(now, caller, audited, outcome, program if audited.by_program else ""))
        appended = self._append(lines)
        if appended.error is not None:
            self.failures += len(lines) - appended.lines
        return appended

    def _append(self, lines: list[str]) -> Appended:
        try:
            appended = self._hand.call(self._file.append, lines)
        except OSError as error:
            appended = Appended(0, error)
        self.failing = appended.error is not None
        return appended


def _time_of_day(now: float) -> str:
    """Return a Unix time in the format of RFC 3339, with milliseconds."""
    milliseconds = int(now * 1_000)
    return f"{_second(milliseconds // 1_000)}.{milliseconds % 1_000:03}+00:00"


@functools.lru_cache(maxsize=1)
def _second(now: int) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _line(now: str, caller: str, audited: AuditEntry, outcome: str, program: str = "") -> str:
    """Return a line without the hash of the line before it and without its closing brace.

    Formatted by hand because every request needs a line: json.dumps takes three times as long for a dictionary of the fields.
    """
    if not audited.line:
        audited.line = _of_request(audited)
    return (
        f'{{"time": "{now}", "event": "audit", "request_id": {quoted(audited.request_id)}, '
        f'"operation": {quoted(audited.operation)}, {caller}, {program}{audited.line}, '
        f'"ciphertext": "{audited.ciphertext}", "destination_ciphertext": "{audited.destination_ciphertext}", '
        f'{_OUTCOMES.get(outcome) or _of_outcome(outcome)}, "microseconds": {round((time.monotonic() - audited.started) * 1e6)}'
    )


def _of_outcome(outcome: str) -> str:
    """Return the fields of the outcome and the level: `error` for a failure of the agent, `warning` for a refusal."""
    known = CODES.get(outcome)
    refused = "error" if known is not None and known.http_status >= _SERVER_ERROR else "warning"
    return f'"outcome": {quoted(outcome)}, "level": "{"info" if outcome in _DONE else refused}"'


_OUTCOMES: Final = {outcome: _of_outcome(outcome) for outcome in ("OK", *CODES)}


def _of_request(audited: AuditEntry) -> str:
    keys = sorted(audited.context_keys)[:MAX_CONTEXT_KEYS]
    listed = _listed(keys)
    while len(listed) > MAX_CONTEXT_KEYS_BYTES:
        listed = _listed(keys := keys[:-1])
    return (
        f'"grant": {quoted(audited.grant)}, "key_id": {quoted(audited.key_id)}, '
        f'"key_version_id": {quoted(audited.key_version_id)}, "context_keys": {listed}, '
        f'"recipient": {quoted(audited.recipient)}, "destination_key_id": {quoted(audited.destination_key_id)}, '
        f'"destination_key_version_id": {quoted(audited.destination_key_version_id)}'
    )


def _listed(keys: Sequence[str]) -> str:
    return f"[{', '.join([quoted(key[:MAX_KEY_CHARACTERS]) for key in keys])}]"


def _of_peer(peer: Peer) -> str:
    # A peer may have 65,536 groups. Only the listed groups become part of the cache's key.
    listed = tuple(sorted(set(itertools.islice(peer.gids, MAX_GROUPS))))
    return _described(peer.uid, listed, peer.pid, peer.unit, peer.listener)


@functools.lru_cache(maxsize=_PEERS)
def _described(uid: int | None, gids: tuple[int, ...], pid: int | None, unit: str | None, listener: str) -> str:
    return json.dumps({"uid": uid, "gids": gids, "pid": pid, "unit": unit, "listener": listener})[1:-1]


@functools.lru_cache(maxsize=_PEERS)
def _of_program(exe: str | None, sha256: str | None) -> str:
    """Return the fields of a caller's program, for requests that a grant on this program allows."""
    while len(shown := json.dumps({"exe": exe, "sha256": sha256})[1:-1]) > _LONGEST_PROGRAM and exe:
        exe = exe[: len(exe) * 3 // 4]
    return f"{shown}, "
