"""Measures a rewrap of many records, on SQLite and on PostgreSQL: `make records`. docs/records.md has the figures.

An agent of its own, a real PostgreSQL server with its durable settings, and the `keyferry` command in a process of its own.
"""

import itertools
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
from support.skip_unless import POSTGRESQL

from keyferry import Client
from keyferry.store import Store

RECORDS = int(os.environ.get("RECORDS", "100000"))
STEP = 5_000


# ru_maxrss would begin with this process's own: a child has it until it is another program.
RUN = """import re, sys
from keyferry.command import main
code = main(["records", *sys.argv[1:]])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)"""


def command(*arguments: object) -> tuple[float, int, str]:
    """Run `keyferry records`; return seconds, the maximum of MiB, and its output."""
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return time.monotonic() - start, int(ended.stderr) // 1024, ended.stdout


def measure(name: str, url: str, keyring: Path, socket: Path) -> None:
    """Fill a store, rotate the key, move everything, and compare every data key."""
    arguments = ("--store", url, "--socket", socket)
    # The record of requests goes to a file: this process would not read a pipe as fast as the agent writes.
    audit = f'[audit]\npath = "{keyring.parent / "audit.jsonl"}"'
    with serving(keyring, socket, more=audit) as agent, Client(socket) as kms, Store(url) as store:
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
        records = iter(store)
        different = 0
        while batch := list(itertools.islice(records, STEP)):
            different += sum(keys[each] != plaintext for each, plaintext in opened(batch, kms).items())
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
