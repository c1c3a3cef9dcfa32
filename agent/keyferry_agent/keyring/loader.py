"""From the sealed file to secret memory, through a short-lived process: key bytes never become objects of the daemon.

The child (`python -m keyferry_agent.keyring.loader KEYRING UNSEAL`) opens the file and writes to its standard output: eight
bytes of length, that much JSON about the keys, a line for each, then each version's raw material in the same order. The
daemon reads the JSON as usual, and the material straight into secret memory. What the child's libraries left in its memory
ends with it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from keyferry.hardening import lock_memory
from keyferry.private_files import owner_of
from keyferry.secret import Backing, SecretMemory

from ..startup import harden
from .document import Document, KeyringError
from .file import read
from .loaded import Keyring, build, room_for
from .sealing import Unsealer

__all__ = ["load"]

_LENGTH: Final = 8
_CHUNK: Final = 65_536
_TIMEOUT: Final = 30.0
"""Seconds that opening a keyring may take; the slowest passphrase takes two."""
_LONGEST_MESSAGE: Final = 2_000
"""Characters of an error to hand on: less than a pipe holds, as it is read last."""


def load(
    path: Path, unseal: Path, *, backing: Backing, require: bool, share: Callable[[int], object] | None = None
) -> Keyring:
    """Load a keyring file; `share` is told its memory's descriptor.

    Raises `KeyringError`, or `SecretMemoryError` when there is not enough locked memory.
    """
    arguments = [sys.executable, "-P", "-m", __spec__.name, os.fspath(path), os.fspath(unseal)]
    # -P: nothing is imported from the working directory. stderr is small (one line) and read last.
    with subprocess.Popen(  # noqa: S603 - this interpreter, this module
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        deadline = threading.Timer(_TIMEOUT, child.kill)  # a keyring on a file system that hangs
        deadline.start()
        pipe = child.stdout.fileno()  # read below Python's buffers: those would keep what passed through them

        def fill(view: memoryview) -> None:
            done = 0
            while done < len(view):
                got = os.readv(pipe, [view[done:]])
                if not got:
                    raise EOFError
                done += got

        try:
            size = bytearray(_LENGTH)
            fill(memoryview(size))
            description = bytearray(int.from_bytes(size, "big"))
            fill(memoryview(description))
            # A line at a time: reading one text of megabytes would keep every other thread waiting.
            keys = [json.loads(line) for line in description.splitlines()]
            memory = SecretMemory(room_for(keys), backing=backing, require=require, share=share)
            return build(keys, fill, memory)
        except EOFError:
            message = (
                child.stderr.read().decode(errors="replace").strip()
                or f"{path}: its loader ended without a word, or took longer than {_TIMEOUT:g} s"
            )
            raise KeyringError(message) from None
        finally:
            deadline.cancel()
            child.stdout.close()


def describe(document: Document) -> list[dict[str, Any]]:
    """Everything about the keys but their material, as `loaded.build` takes it."""
    aliases = document.aliases_by_key()
    return [
        {
            "KeyId": key.key_id,
            "KeySpec": key.key_spec,
            "Description": key.description,
            "Origin": key.origin,
            "CreationDate": key.created,
            "DeleteDate": key.delete_date,
            "KeyState": key.state,
            "PrimaryKeyVersion": key.primary,
            "KeyVersions": [
                {"KeyVersionId": version.version_id, "CreationDate": version.created, "Staged": version.staged}
                for version in key.versions
            ],
            "Aliases": aliases.get(key.key_id, []),
        }
        for key in document.keys
    ]


def main(path: str, unseal: str) -> None:
    """The child: open the file and write it to standard output."""
    signal.alarm(int(_TIMEOUT))  # ends this process where nobody else is left to: the agent may be gone
    harden()  # exec undid what the daemon had done for itself
    lock_memory()
    try:
        document = read(Path(path), Unsealer.read(Path(unseal), owner_of(path)))
    except KeyringError as error:
        sys.exit((f"{path}: {error}" if path not in str(error) else str(error))[:_LONGEST_MESSAGE])
    description = b"".join(json.dumps(key).encode() + b"\n" for key in describe(document))
    with open(1, "wb", buffering=_CHUNK) as out:
        out.write(len(description).to_bytes(_LENGTH, "big") + description)
        for key in document.keys:
            out.writelines(version.material for version in key.versions)


if __name__ == "__main__":
    main(*sys.argv[1:])
