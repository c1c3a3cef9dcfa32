"""The audit log by its file, seen from outside: its content when an answer is sent, and at the end."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["Record"]

BEGINNING = "0" * 64
LONGEST = 4_096
"""Bytes of a line, with its newline, that a pipe takes whole."""


class Record:
    """The files of the audit log. `report_violation` is called with their faults."""

    def __init__(self, path: Path, report_violation: Callable[[str], None]) -> None:
        self.path = path
        self._violate = report_violation
        self.rotated: list[Path] = []
        self.descriptors: set[int] = set()
        """The agent's, of the record."""
        self.lines: dict[str, dict[str, Any]] = {}
        """The recorded entries so far, by RequestId."""
        self.failed: set[str] = set()
        """The requests of which the log says that they could not be recorded."""
        self.may_be_cut_off = False
        """Whether a part of a line was written, and could not be taken back at once."""
        self.hung = False
        """Whether the file has ever not answered: then a request may be recorded that was refused because of that."""

    @property
    def in_place(self) -> bool:
        """Whether the agent has the file at the audit log's path open."""
        if self.path.name not in os.listdir(self.path.parent):
            return False
        there = os.stat(self.path)
        return any(os.path.samestat(os.fstat(descriptor), there) for descriptor in self.descriptors)

    def written(self, part: bytes) -> None:
        """Bytes were appended. A line counts when its end is there."""
        for line in part.split(b"\n")[:-1]:
            try:
                fields = json.loads(line)
            except ValueError:
                continue  # the rest of a line that runs into this one: found at the end
            if fields.get("event") != "audit":
                continue  # an agent's start, or the names of its keys
            if fields["request_id"] in self.lines:
                self._violate(f"recorded twice: {fields['request_id']}")
            self.lines[fields["request_id"]] = fields

    def taken_back(self, part: bytes) -> None:
        """Bytes at the end are about to go."""
        for line in part.split(b"\n"):
            for request_id in [request_id for request_id in self.lines if f'"{request_id}"'.encode() in line]:
                del self.lines[request_id]

    def check(self, *, cut_off: bool) -> None:
        """Read the files as somebody does who verifies them: every line whole, each after the other, and none but these.

        `cut_off`: whether the last line may be, as nothing could be taken back.
        """
        found: list[str] = []
        events: list[str] = []
        for fields in self._chained(cut_off=cut_off):
            if fields.get("request_id") != "FIRST":
                events.append(fields["event"])
            if fields.get("event") == "audit":
                found.append(fields["request_id"])
        if found != [*self.lines]:
            self._violate(f"the record has {len(found)} lines, of the {len(self.lines)} that were written")
        # The names of the keys may be missing where their entry failed, and no request came after it.
        if events and (events[:2] != ["audit.start", "audit.keys"][: len(events)] or events.count("audit.start") != 1):
            self._violate(f"the record begins with {events[:2]}, and has {events.count('audit.start')} starts")

    def _chained(self, *, cut_off: bool) -> Iterator[dict[str, Any]]:
        previous = BEGINNING
        for path in (*self.rotated, self.path):
            text = path.read_bytes() if path.exists() else b""
            if text and not text.endswith(b"\n"):
                if not cut_off:
                    self._violate(f"the record's last line is cut off: {text[-40:]!r}")
                text = text[: text.rfind(b"\n") + 1]
            for line in text.splitlines():
                try:
                    fields = json.loads(line)
                except ValueError:
                    self._violate(f"a line of the record is damaged: {line[:40]!r} ... {line[-40:]!r}")
                    continue
                if fields["previous"] != previous:
                    self._violate(f"the record's chain is broken at {fields.get('request_id', fields['event'])}")
                previous = hashlib.sha256(line).hexdigest()
                if len(line) >= LONGEST:
                    self._violate(f"a line of {len(line)} bytes")
                yield fields
