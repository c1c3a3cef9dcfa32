"""Files of an audit log that no agent wrote, and the commands that verify and search it."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from keyferry_agent.chained_log import chain
from keyferry_agent.cli.main import main

START = datetime(2026, 11, 1, tzinfo=UTC)
LOST = "lost-key"
"""The master key that only the oldest entry was about."""


def line(previous: str, number: int, *, key: str = "other", time: datetime | None = None) -> bytes:
    """One entry without its newline: a data key was generated."""
    fields = {
        "time": (time or START + timedelta(hours=number)).isoformat(timespec="milliseconds"),
        "event": "audit",
        "request_id": f"id{number}",
        "operation": "GenerateDataKey",
        "uid": 1000,
        "unit": "",
        "listener": "default",
        "grant": "g",
        "key_id": key,
        "key_version_id": "v",
        "outcome": "OK",
        "previous": previous,
    }
    return json.dumps(fields).encode()


def entries(count: int, previous: str = chain.BEGINNING, first: int = 0) -> list[bytes]:
    """A chain of entries; the very first is about the lost key."""
    lines: list[bytes] = []
    for number in range(first, first + count):
        lines.append(line(previous, number, key="other" if number else LOST))
        previous = chain.link(lines[-1])
    return lines


def text(lines: Sequence[bytes]) -> bytes:
    """Return the content of a file of these entries."""
    return b"".join(each + b"\n" for each in lines)


def requests(path: Path) -> list[dict[str, Any]]:
    """Return the entries of requests in a file: all but an agent's start and the names of its keys."""
    return [fields for line in path.read_text().splitlines() if (fields := json.loads(line)).get("event") == "audit"]


AT_START = 2
"""Entries that an agent with a small keyring writes before the first request's: its start, and the names of its keys."""


class Log:
    """An audit log in a folder, and the commands on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.current = folder / "audit.jsonl"
        self.out = self.err = ""
        self._capsys = capsys
        (folder / "agent.toml").write_text(f'[audit]\npath = "{self.current}"\n')

    def run(self, *arguments: object, key: str = LOST, files: Sequence[Path] = ()) -> int:
        """Run `audit verify` or `audit who` on the configured log, or on files; return its exit code."""
        verb, *more = arguments
        where: list[object] = [*files] or ["--config", self.folder / "agent.toml"]
        self._capsys.readouterr()
        code = main(["audit", *map(str, [verb, *where, *more, *(["--key", key] if verb == "who" else [])])])
        self.out, self.err = self._capsys.readouterr()
        return code

    def is_whole(self, count: int, **more: Any) -> None:
        """Both commands find a complete log, and the entry of the lost key in it."""
        assert self.run("verify", **more) == 0, self.err
        assert self.out.startswith(f"whole: {count} lines, from the beginning; the last has the SHA-256 ")
        assert self.run("who", **more) == 0, self.err
        assert "GenerateDataKey 1 times" in self.out
        assert "complete from its beginning, 2026-11-01T00:00:00.000+00:00" in self.err
        assert self.run("who", "--json", **more) == 0
        assert [group["count"] for group in json.loads(self.out)] == [1]

    def is_not_whole(self, *words: str, **more: Any) -> None:
        """Both commands fail, say why, and do not claim that no caller was given a data key."""
        for verb in (("verify",), ("who",), ("who", "--json")):
            assert self.run(*verb, **more) == 1, verb
            assert "INCOMPLETE" in self.err
            assert "whole" not in self.out
            assert "No caller" not in self.out
            for word in words:
                assert word in self.err, (word, self.err)
        assert self.run("who", key="never used", **more) == 1
        assert "incomplete" in self.out
