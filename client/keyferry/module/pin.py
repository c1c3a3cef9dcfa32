"""Reads a token's PIN from a file, a systemd credential or a prompt. The PIN is in locked memory, and wiped with its module."""

import os
from collections.abc import Callable
from typing import Final

from .. import private_files
from ..content import first_line_end
from ..secret import Secret, SecretMemory
from .interface import ModuleError

__all__ = ["read_pin"]

_MAX_PIN_BYTES: Final = 255
"""Most bytes of a PIN. PKCS#11 does not set a limit; tokens do, well below this one."""
_CREDENTIAL: Final = "credential:"


def read_pin(pin_file: str | os.PathLike[str] | None, prompt: Callable[[], str] | None) -> Secret | None:
    """Read the PIN from a file's first line, or from the result of `prompt`; return None if both arguments are None.

    A `pin_file` of "credential:NAME" is systemd's credential. Raises `ModuleError`, and ValueError if both arguments are set.
    """
    if pin_file is not None and prompt is not None:
        raise ValueError("pin_file or pin is expected, not both")
    # Not memfd_secret: a forked child shares such memory, and would wipe the parent's PIN together with its own.
    memory = SecretMemory(2 * _MAX_PIN_BYTES, backing="mlock", require=False)
    if pin_file is not None:
        return _from_file(_path(os.fspath(pin_file)), memory)
    return _store(bytearray(prompt().encode()), memory, "the PIN that was typed") if prompt is not None else None


def _path(pin_file: str) -> str:
    if not pin_file.startswith(_CREDENTIAL):
        return pin_file
    name, directory = pin_file.removeprefix(_CREDENTIAL), os.environ.get("CREDENTIALS_DIRECTORY")
    if not name or "/" in name:
        raise ModuleError(f"pin_file={pin_file!r}: credential:NAME is expected")
    if directory is None:
        raise ModuleError(
            f"pin_file={pin_file!r}: systemd gave this process no credentials (LoadCredential={name}:PATH)"
        )
    return os.path.join(directory, name)


def _from_file(path: str, memory: SecretMemory) -> Secret:
    content = bytearray(_MAX_PIN_BYTES + 2)
    try:
        with open(path, "rb", buffering=0) as file:
            private_files.check(file.fileno(), path, secret=True)
            size = file.readinto(content)
    except OSError as error:
        raise ModuleError(f"{path}: the PIN cannot be read: {error.strerror}") from None
    except private_files.PrivateFileError as error:
        raise ModuleError(str(error)) from None
    del content[size:]
    del content[first_line_end(content) :]
    return _store(content, memory, f"{path}: the first line")


def _store(pin: bytearray, memory: SecretMemory, source: str) -> Secret:
    try:
        if not 1 <= len(pin) <= _MAX_PIN_BYTES:
            fault = f"longer than {_MAX_PIN_BYTES} bytes" if pin else "empty"
            raise ModuleError(f"{source} is {fault}; a PIN of 1 to {_MAX_PIN_BYTES} bytes is expected")
        secret = memory.allocate(len(pin))
        with secret.lend() as buffer:
            buffer[:] = pin
        return secret
    finally:
        pin[:] = bytes(len(pin))
