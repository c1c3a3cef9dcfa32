"""The process that opens a keyring file for `loader`: `python -m keyferry_agent.keyring.loader_process KEYRING UNSEAL`.

It reads both files and writes to its standard output, in this order:

    1 byte      the passphrase's work factor, or 0 for an identity; then the process opens the keyring
    8 bytes     the length of the descriptions, big-endian
    the rest    the descriptions in JSON: one line with access keys and receipt keys, then one line for each master key; then
                the raw material of all of them, in the order of `KeyringDescription.material_sizes`

A failure is one line on standard error. Copies that libraries left in the memory of this process disappear when it ends.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Final

from keyferry import age_passphrase
from keyferry.hardening import lock_memory
from keyferry.private_files import owner_of

from ..process_hardening import harden
from .document import KeyringError
from .file import open_sealed, read_sealed
from .sealing import Unsealer

__all__ = ["LENGTH_BYTES", "READ_SECONDS", "UNSEAL_SECONDS", "main"]

LENGTH_BYTES: Final = 8
READ_SECONDS: Final = 30.0
"""Time limit for this process to start and to read both files, which may be on a file system that hangs."""
UNSEAL_SECONDS: Final = 600.0
"""Time limit for unsealing. The highest work factor takes 16 s of processor time: 90 s on a fifth of one processor."""
_BUFFER_BYTES: Final = 65_536
_MAX_MESSAGE: Final = 2_000
"""Limit of characters of an error. The error must fit into the pipe buffer, because the agent reads standard error last."""


def main(path: str, unseal: str) -> None:
    """Run the child process: open the keyring file and write its content to standard output."""
    signal.alarm(int(READ_SECONDS))  # ends this process even if the agent, which has its own timer, is gone
    harden()  # exec undid the hardening of the daemon
    lock_memory()
    try:
        unsealer = Unsealer.read(Path(unseal), owner_of(path))
        sealed_bytes = read_sealed(Path(path))
        signal.alarm(int(UNSEAL_SECONDS))
        os.write(1, bytes([min(age_passphrase.work_factor(sealed_bytes) or 0, 255)]))
        document = open_sealed(sealed_bytes, unsealer)
    except KeyringError as error:
        sys.exit((f"{path}: {error}" if path not in str(error) else str(error))[:_MAX_MESSAGE])
    content = document.describe()
    lines = [content.sections(), *(key.to_json() for key in content.keys)]
    description = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    with open(1, "wb", buffering=_BUFFER_BYTES) as output:
        output.write(len(description).to_bytes(LENGTH_BYTES, "big") + description)
        output.writelines(document.material())


if __name__ == "__main__":
    main(*sys.argv[1:])
