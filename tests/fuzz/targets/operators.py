"""Files of operators: the configuration and the audit log."""

import argparse
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from keyferry_agent.authz.grants import Policy
from keyferry_agent.chained_log import chain
from keyferry_agent.cli.audit import command
from keyferry_agent.config import settings
from keyferry_agent.peer import Peer

from ..memory_bound import assert_memory_bounded

PEER = Peer(uid=1000, gids=frozenset({1000}), pid=7, listener="default", unit="orders.service")
LONGEST_NAME = "alias/" + "a" * 500
_NO_ID = 2**32 - 1


@contextmanager
def in_a_file(data: bytes) -> Iterator[Path]:
    """A file with these bytes, which is on no disk."""
    descriptor = os.memfd_create("fuzz")
    try:
        os.write(descriptor, data)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def configuration(data: bytes) -> None:
    """A configuration file: settings that an agent can start with, or all that is wrong, a line each."""
    with in_a_file(data) as path:
        try:
            read = settings.read(path)
        except settings.SettingsError as error:
            assert error.problems
            assert all(problem.encode().count(b"\n") == 0 for problem in error.problems), error.problems
            return
        assert settings.read(path) == read
    for listener in read.listeners:
        assert listener.path.is_absolute()
        assert 0 <= listener.mode <= 0o777
        assert all(number is None or 0 <= number < _NO_ID for number in (listener.uid, listener.gid))
    assert 0 < read.limits.request_timeout <= 3600
    granted = Policy(read.grants).granted(PEER)
    for action in ("kms:Decrypt", "kms:ListKeys"):
        granted.covering(action, LONGEST_NAME, lambda: (LONGEST_NAME, f"acs:kms:local:0:{LONGEST_NAME}"))


def audit(data: bytes) -> None:
    """A record of requests. With FF before it, the lines of one that is written here, of which a byte is changed: the next two
    bytes say where, and the third how.
    """
    if data[:1] == b"\xff" and len(data) > 4:
        return _changed(data[4:], int.from_bytes(data[1:3], "big"), data[3] or 1)
    with in_a_file(data) as path:
        assert assert_memory_bounded(lambda: _verified(path), len(data), times=64) == _second(data)
        assert _searched(path) in (0, command.FAILED)
    return None


def _verified(path: Path) -> chain.Verified | None:
    try:
        verified = chain.verify([path])
        assert sum(1 for _ in chain.read([path])) == verified.lines
    except chain.ChainError as error:
        assert len(str(error)) < 300
        return None
    return verified


def _second(data: bytes) -> chain.Verified | None:
    """The same, as docs/audit.md has it."""
    lines = data.split(b"\n")
    try:
        records: list[tuple[bytes, Any]] = [(line, json.loads(line)) for line in lines[:-1]]
    except (ValueError, RecursionError):
        return None
    if lines[-1] or not all(isinstance(record, dict) for _, record in records):
        return None
    chained = [
        (line, record.get("previous"))
        for line, record in records
        if record.get("event") == "audit" or "previous" in record
    ]
    hashes = [hashlib.sha256(line).hexdigest() for line, _ in chained]
    if not chained or any(held != before for (_, held), before in zip(chained[1:], hashes, strict=False)):
        return None
    return chain.Verified(len(chained), hashes[-1], chained[0][1] == "0" * 64)


def _searched(path: Path) -> int:
    code = 0
    for more in (
        ["verify"],
        ["who", "--key", "k"],
        ["who", "--json", "--since", "2026-01-01"],
        ["who", "--list", "--key", "alias/k", "--context-key", "c"],
        ["who", "--list", "--json", "--operation", "Decrypt"],
    ):
        out, error = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        arguments = _parser().parse_args(["audit", *more, str(path)])
        with redirect_stdout(out), redirect_stderr(error):
            code = max(code, arguments.run(arguments))
    return code


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser


def _changed(texts: bytes, at: int, how: int) -> None:
    lines, previous = [], chain.BEGINNING
    for text in texts.split(b"\n"):
        record = {"event": "audit", "note": text.decode(errors="replace"), "previous": previous}
        lines.append(json.dumps(record).encode())
        previous = chain.link(lines[-1])
    whole = b"".join(line + b"\n" for line in lines)
    with in_a_file(whole) as path:
        assert _verified(path) == chain.Verified(len(lines), previous, beginning=True)
    if at < len(whole) - len(lines[-1]) - 1:  # a change in the last line is one that no chain shows
        with in_a_file(whole[:at] + bytes([whole[at] ^ how]) + whole[at + 1 :]) as path:
            assert _verified(path) is None
