"""From the sealed file to secret memory, through a short-lived process: key bytes never become objects of the daemon.

The child (`python -m keyferry_agent.keyring.loader KEYRING UNSEAL`) reads both files and writes to its standard output: one
byte, the passphrase's work factor, or 0 for an identity. Then it opens the keyring and writes the length of the description in
eight bytes, the description in JSON with one line for each key, and each version's raw material in the same order. The daemon
reads the JSON as usual, and the material straight into secret memory. Copies that the child's libraries left in memory
disappear when the child ends.

Reading and unsealing have separate time limits. A file system that hangs is detected early. scrypt, whose work is bounded by
its work factor, can take long on a host with little spare processor time.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from keyferry import age_passphrase
from keyferry.hardening import lock_memory
from keyferry.private_files import owner_of
from keyferry.secret import Backing, SecretMemory

from ..process_hardening import harden
from .description import KeyDescription
from .document import KeyringError
from .file import open_sealed, read_sealed
from .keyring import Keyring, build_keyring, required_bytes
from .sealing import Unsealer

__all__ = ["STANDARD_INPUT", "load"]

STANDARD_INPUT: Final = Path("/dev/stdin")
"""The path from which the loader reads an unseal secret that is not in a file."""

_LENGTH: Final = 8
_CHUNK: Final = 65_536
_MAX_BYTE: Final = 255
_TIMEOUT: Final = 30.0
"""Seconds for the child to start and to read both files, which may be on a file system that hangs."""
_UNSEAL_TIMEOUT: Final = 600.0
"""Seconds for the child to unseal. The highest work factor takes 16 s of processor time: 90 s on a fifth of one processor."""
_LONGEST_MESSAGE: Final = 2_000
"""Most characters of an error that the child writes. The error must fit into the pipe buffer, because stderr is read last."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


def load(
    path: Path,
    unseal: Path,
    *,
    backing: Backing,
    require: bool,
    share: Callable[[int], object] | None = None,
    secret: int | None = None,
) -> Keyring:
    """Load a keyring file into secret memory. Blocks until the loader's process has ended, or its time limit is over.

    `share` is called with the memory's descriptor. `secret`: a descriptor that becomes `STANDARD_INPUT`.

    Raises `KeyringError`, or `SecretMemoryError` when there is not enough locked memory.
    """
    arguments = [sys.executable, "-P", "-m", __spec__.name, os.fspath(path), os.fspath(unseal)]
    # -P: nothing is imported from the working directory. stderr is small (one line) and read last.
    with subprocess.Popen(  # noqa: S603 - this interpreter, this module
        arguments,
        stdin=subprocess.DEVNULL if secret is None else secret,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        deadline = _Deadline(child, _TIMEOUT)
        pipe = child.stdout.fileno()  # read without Python's buffers, which would keep copies of the material
        factor = bytearray(1)

        def fill(view: memoryview) -> None:
            done = 0
            while done < len(view):
                got = os.readv(pipe, [view[done:]])
                if not got:
                    raise EOFError
                done += got

        try:
            fill(memoryview(factor))
            deadline.restart(_UNSEAL_TIMEOUT)
            size = bytearray(_LENGTH)
            fill(memoryview(size))
            description = bytearray(int.from_bytes(size, "big"))
            fill(memoryview(description))
            # A line at a time: to parse one text of megabytes would block every other thread.
            keys = [KeyDescription.from_json(json.loads(line)) for line in description.splitlines()]
            memory = SecretMemory(required_bytes(keys), backing=backing, require=require, share=share)
            keyring = build_keyring(keys, fill, memory)
        except EOFError:
            message = child.stderr.read().decode(errors="replace").strip()
            raise KeyringError(message or f"{path}: {deadline.why_ended(factor[0])}") from None
        finally:
            deadline.cancel()
            child.stdout.close()
    if 0 < factor[0] < age_passphrase.MIN_STRONG_WORK_FACTOR:
        log.warning(
            "keyring.weak_work_factor",
            keyring=os.fspath(path),
            work_factor=factor[0],
            what=f"below {age_passphrase.MIN_STRONG_WORK_FACTOR}; `keyferry-agent keyring reseal` raises it",
        )
    return keyring


class _Deadline:
    """Kills the loader when its time limit is over, and explains why a loader ended."""

    def __init__(self, child: "subprocess.Popen[bytes]", seconds: float) -> None:
        self._child = child
        self._start(seconds)

    def restart(self, seconds: float) -> None:
        """Replace the current time limit with a new one."""
        self.cancel()
        self._start(seconds)

    def cancel(self) -> None:
        """Remove the time limit."""
        self._timer.cancel()

    def why_ended(self, factor: int) -> str:
        """Return the reason why a loader ended that wrote no message. Blocks until it has ended.

        `factor`: the loader's first byte, or 0 before that byte was read.
        """
        status = self._child.wait()
        if status == -signal.SIGALRM or time.monotonic() >= self._end:
            return f"its loader took longer than {self._seconds:g} s"
        if status == -signal.SIGKILL:
            need = f"; work factor {factor} takes {age_passphrase.memory_mib(factor)} MiB" if factor else ""
            return f"its loader was killed, as the kernel does where memory runs out{need}"
        return "its loader ended without a message"

    def _start(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._timer = threading.Timer(seconds, self._child.kill)
        self._timer.daemon = True  # the timer does not delay the exit of an agent
        self._timer.start()


def main(path: str, unseal: str) -> None:
    """Run the child process: open the keyring file and write its content to standard output."""
    signal.alarm(int(_TIMEOUT))  # ends this process even if the agent, which has its own timer, is gone
    harden()  # exec undid the hardening of the daemon
    lock_memory()
    try:
        unsealer = Unsealer.read(Path(unseal), owner_of(path))
        sealed = read_sealed(Path(path))
        signal.alarm(int(_UNSEAL_TIMEOUT))
        os.write(1, bytes([min(age_passphrase.work_factor(sealed) or 0, _MAX_BYTE)]))
        document = open_sealed(sealed, unsealer)
    except KeyringError as error:
        sys.exit((f"{path}: {error}" if path not in str(error) else str(error))[:_LONGEST_MESSAGE])
    description = b"".join(json.dumps(key.to_json()).encode() + b"\n" for key in document.describe())
    with open(1, "wb", buffering=_CHUNK) as out:
        out.write(len(description).to_bytes(_LENGTH, "big") + description)
        for key in document.keys:
            out.writelines(version.material for version in key.versions)


if __name__ == "__main__":
    main(*sys.argv[1:])
