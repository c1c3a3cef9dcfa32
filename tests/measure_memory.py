"""Measures secrets in an agent's memory *while* it works: `make memory`. docs/memory.md has the results.

An agent under full load is stopped at random moments and its memory copied. When everything has been answered, and so every
key is known, the copies are searched. At rest there are none (tests/test_memory.py); these are the copies in use.
"""

import contextlib
import io
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from support.agent import RunningAgent
from support.keyring import change, configuration, new_keyring
from support.keys import recipient
from support.memory_scan import search, snapshot
from support.secret_recorder import KEYS, SecretRecorder

from keyferry import operations
from keyferry.hardening import DUMPABLE

SNAPSHOTS = 25
CONNECTIONS = 4
RSA = recipient("RSAES_OAEP_SHA_256")
EXPORTS: list[Any] = [operations.GenerateAndExportDataKey(key_id=key_id, **RSA.arguments) for key_id in KEYS] * 8
IN_PLAINTEXT: list[Any] = [operations.GenerateDataKey(key_id=key_id) for key_id in KEYS] * 8
NAIVE = ("-c", "import sys; from keyferry_agent.cli.main import main; sys.exit(main())")


def measure(name: str, command: tuple[str, ...], *, exports_only: bool) -> None:
    """Print in how many snapshots each kind of thing was."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(io.StringIO()):
            keyring = new_keyring(Path(folder))
            change(keyring, "create-key", "--alias", KEYS[1], "--key-spec", "Aliyun_SM4")
        config = Path(folder) / "agent.toml"
        config.write_text(configuration(keyring, more=f'[audit]\npath = "{folder}/audit"'))
        arguments = ["--config", str(config)]
        socket = Path(folder) / "agent.sock"
        agent = stack.enter_context(RunningAgent(arguments, socket, environment={DUMPABLE: "1"}, command=command))
        recorder, done, taken = SecretRecorder(keyring), threading.Event(), []
        wanted = EXPORTS if exports_only else [*EXPORTS, *IN_PLAINTEXT]
        answers: list[Any] = []

        def work() -> None:  # and nothing else: the agent is to be busy
            with agent.client() as kms:
                while not done.is_set():
                    answers.extend(kms.pipeline(wanted))

        workers = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
        for worker in workers:
            worker.start()
        for _ in range(SNAPSHOTS):
            time.sleep(random.uniform(0.01, 0.05))
            agent.signal(signal.SIGSTOP)
            taken.append(snapshot(agent.process.pid))
            agent.signal(signal.SIGCONT)
        done.set()
        for worker in workers:
            worker.join()
        for answer in answers:
            recorder.learn(RSA, answer)
        seen: Counter[str] = Counter()
        for pieces in taken:
            seen.update(
                {re.split(" (?:in|as|reversed|words)", found)[0] for found in search(pieces, recorder.patterns)}
            )
        print(f"{name}: {recorder.secrets} keys, {SNAPSHOTS} snapshots")
        for what, count in seen.most_common():
            print(f"    {what}: in {count}")
        if not seen:
            print("    nothing in any")


def main() -> None:
    """Measure the agent, and for comparison one that does not clear freed memory."""
    if os.geteuid() != 0:
        print("Not root: this works where a process may read the memory of its children.", file=sys.stderr)
    for kind, exports_only in (("exports only", True), ("with answers and requests in plaintext", False)):
        measure(f"the agent, {kind}", ("-m", "keyferry_agent"), exports_only=exports_only)
        measure(f"without clearing what is freed, {kind}", NAIVE, exports_only=exports_only)


if __name__ == "__main__":
    main()
