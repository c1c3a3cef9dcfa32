"""Load a keyring into secret memory. Key bytes never become objects of the daemon.

`load` reads the pipe of a short-lived process (`loader_process`), in this order: the descriptions of the keys, as usual; then
secret memory of the size they need, whose descriptor `fdstore` may store; then the material, straight into that memory.

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
from pathlib import Path
from typing import Final

import structlog

from keyferry import age_passphrase
from keyferry.secret import Backing, SecretMemory

from ..config.settings import Settings
from . import loader_process
from .description import KeyringDescription
from .document import KeyringError
from .fdstore import FileStatus, KeyringPersister
from .keyring import Keyring, build_keyring, development_keyring, required_bytes
from .loader_process import LENGTH_BYTES, READ_SECONDS, UNSEAL_SECONDS

__all__ = ["load", "load_keyring"]

_STANDARD_INPUT: Final = Path("/dev/stdin")
"""The path from which the loader's process reads an unseal secret that is not in a file."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


def load_keyring(
    settings: Settings,
    persister: KeyringPersister | None = None,
    file_status: FileStatus = None,
    secret: int | None = None,
) -> Keyring:
    """Load the keyring that the settings name; with `--dev`, generate a new one.

    `persister` stores the keyring with the service manager, with the status that its file had before it was read. `secret`: the
    descriptor of a pipe from which the unseal secret is read, instead of its file. Blocks. Raises `KeyringError`, or
    `SecretMemoryError` if there is not enough locked memory.
    """
    require, backing = settings.memory == "require", settings.memory_backing
    if settings.development_aliases is not None:
        return development_keyring(
            backing=backing,
            require=require,
            aliases=settings.development_aliases,
            access_key_id=settings.development_access_key,
        )
    unseal = _STANDARD_INPUT if secret is not None else settings.unseal
    if settings.keyring is None or unseal is None:
        setting = "keyring" if settings.keyring is None else "unseal"
        raise KeyringError(f"no {setting} is configured: set {setting} = in the file, give --{setting}, or try --dev")
    keyring = load(settings.keyring, unseal, backing=backing, require=require, persister=persister, secret=secret)
    if persister and not persister.commit(keyring, file_status):
        log.warning("keyring.not_kept", what="it takes memfd_secret, and a service manager that keeps descriptors")
    return keyring


def load(
    path: Path,
    unseal: Path,
    *,
    backing: Backing,
    require: bool,
    persister: KeyringPersister | None = None,
    secret: int | None = None,
) -> Keyring:
    """Load a keyring file into secret memory. Blocks until the loader's process has ended, or its time limit is over.

    `persister` stores the memory's descriptor with the service manager; its `commit` has to follow. `secret`: a descriptor that
    becomes the process's standard input.

    Raises `KeyringError`, or `SecretMemoryError` when there is not enough locked memory.
    """
    # -P: nothing is imported from the working directory. stderr is small (one line) and read last.
    arguments = [sys.executable, "-P", "-m", loader_process.__name__, os.fspath(path), os.fspath(unseal)]
    with subprocess.Popen(  # noqa: S603 - this interpreter, a module of this package
        arguments,
        stdin=subprocess.DEVNULL if secret is None else secret,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        deadline = _Deadline(child, READ_SECONDS)
        pipe = child.stdout.fileno()  # read without Python's buffers, which would keep copies of the material
        factor = bytearray(1)

        def fill(view: memoryview) -> None:
            size = 0
            while size < len(view):
                count = os.readv(pipe, [view[size:]])
                if not count:
                    raise EOFError
                size += count

        try:
            fill(memoryview(factor))
            deadline.restart(UNSEAL_SECONDS)
            length = bytearray(LENGTH_BYTES)
            fill(memoryview(length))
            descriptions = bytearray(int.from_bytes(length, "big"))
            fill(memoryview(descriptions))
            # A line at a time: to parse one text of megabytes would block every other thread.
            sections, *lines = descriptions.splitlines()
            description = KeyringDescription.from_json(map(json.loads, lines), json.loads(sections))
            share = persister.store_memory if persister else None
            memory = SecretMemory(required_bytes(description), backing=backing, require=require, share=share)
            keyring = build_keyring(description, fill, memory)
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
            memory_text = f"; work factor {factor} takes {age_passphrase.memory_mib(factor)} MiB" if factor else ""
            return f"its loader was killed, as the kernel does where memory runs out{memory_text}"
        return "its loader ended without a message"

    def _start(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._timer = threading.Timer(seconds, self._child.kill)
        self._timer.daemon = True  # the timer does not delay the exit of an agent
        self._timer.start()
