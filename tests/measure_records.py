"""Measures a rewrap of many records, on SQLite and on PostgreSQL: `make records`. docs/records.md has the figures.

An agent of its own, a real PostgreSQL server with its durable settings, and the `keyferry` command in a process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from support.keyring import change, new_keyring, serving
from support.postgres import Cluster
from support.records import fill, opened
from support.requires import POSTGRESQL

from keyferry import Client
from keyferry.store import Store

RECORDS = int(os.environ.get("RECORDS", "100000"))
STEP = 5_000


def command(*arguments: object) -> tuple[float, int, str]:
    """Run `keyferry records`: seconds, MiB at most, and what it printed."""
    start = time.monotonic()
    running = subprocess.Popen(
        [sys.executable, "-m", "keyferry", "records", *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    with running.stdout as stdout:
        said = stdout.read()
    _, status, usage = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    assert running.returncode == 0
    return time.monotonic() - start, usage.ru_maxrss // 1024, said


def measure(name: str, url: str, keyring: Path, socket: Path) -> None:
    """Fill a store, rotate the key, move everything, and compare every data key."""
    arguments = ("--store", url, "--socket", socket)
    with serving(keyring, socket) as agent, Client(socket) as kms, Store(url) as store:
        keys: dict[str, str] = {}
        for start in range(0, RECORDS, STEP):
            keys |= fill(store, kms, min(STEP, RECORDS - start), start=start)
        _, least, _ = command("show", "r0", "--store", url)
        change(keyring, "rotate", "alias/a")
        agent.wait_for("reload.done")
        dry, _, said = command("rewrap", "--dry-run", *arguments)
        assert json.loads(said)["Moved"] == RECORDS
        took, most, said = command("rewrap", *arguments)
        assert json.loads(said)["Moved"] == RECORDS
        again, _, said = command("rewrap", *arguments)
        assert json.loads(said)["Found"] == 0
        different = 0
        batch = []
        for record in store:
            batch.append(record)
            if len(batch) == STEP:
                different += sum(keys[each] != plaintext for each, plaintext in opened(batch, kms).items())
                batch = []
        assert not batch
    print(
        f"{name}: {RECORDS} records; rewrap {took:.1f} s ({RECORDS / took:.0f} a second), dry run {dry:.1f} s, "
        f"nothing to do {again:.1f} s; memory {most} MiB (to show one: {least}); data keys that changed: {different}",
        flush=True,
    )
    assert not different


def main() -> None:
    """Both databases."""
    with tempfile.TemporaryDirectory(prefix="kf-records-") as name, ExitStack() as stack:
        databases = {"SQLite": f"sqlite:///{name}/records.sqlite"}
        if POSTGRESQL:
            databases["PostgreSQL"] = stack.enter_context(Cluster(durable=True)).new_database()
        for kind, url in databases.items():
            folder = Path(name) / kind
            folder.mkdir()
            measure(kind, url, new_keyring(folder), folder / "agent.sock")


if __name__ == "__main__":
    main()
