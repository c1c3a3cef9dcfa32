"""Explains why a file does not load as a PKCS#11 library.

The dynamic linker's own messages mislead: for a library for another processor, it reports "No such file or directory".
"""

import os
import stat
from typing import Final, Literal

__all__ = ["explain"]

_MAGIC: Final = b"\x7fELF"
_HEADER_BYTES: Final = 20
_BITS: Final = {1: 32, 2: 64}
"""EI_CLASS, the byte at 4."""
_BYTE_ORDERS: Final[dict[int, tuple[Literal["little", "big"], str]]] = {
    1: ("little", "little-endian"),
    2: ("big", "big-endian"),
}
"""EI_DATA, the byte at 5."""
_MACHINES: Final = {
    3: "x86",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC",
    22: "S/390",
    40: "ARM",
    62: "x86-64",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
}
"""e_machine, in two bytes at 18."""


def explain(path: str, linker_error: str) -> str:
    """Return the fault of the file and advice, or the dynamic linker's message if the file appears to be right."""
    if "\0" in path or not path:
        return f"{path!r}: not a file name; give the path of the token's PKCS#11 library"
    if "/" not in path and not os.path.exists(path):
        return f"{path}: not found where the system keeps its libraries; give the whole path of the file"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return f"{path}: {'a folder' if os.path.isdir(path) else 'not a regular file'}; give the path of the library's file"
        with open(path, "rb", buffering=0) as file:
            header = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        return f"{path}: not found; install the token's PKCS#11 library, or give the path that it has on this host"
    except OSError as error:
        return f"{path}: {error.strerror}; let this process's user read the file"
    return _about_header(path, header) or linker_error


def _about_header(path: str, header: bytes) -> str | None:
    """Return the fault of a file's header and advice; None for the header of a library for this processor."""
    platform, own_platform = _platform(header), _own_platform()
    if platform is None:
        return f"{path}: not a shared library (an ELF file); give the path of the token's PKCS#11 library"
    if platform == own_platform or own_platform is None:
        return None
    return f"{path}: built for {platform}, and this Python for {own_platform}; install the library for {own_platform}"


def _platform(header: bytes) -> str | None:
    """Return a description of the processor in an ELF header; None for another kind of header."""
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        return None
    if header[4] not in _BITS or header[5] not in _BYTE_ORDERS:
        return None
    order, words = _BYTE_ORDERS[header[5]]
    machine = int.from_bytes(header[18:20], order)
    return f"{_MACHINES.get(machine, f'processor {machine}')} ({_BITS[header[4]]} bits, {words})"


def _own_platform() -> str | None:
    try:
        with open("/proc/self/exe", "rb", buffering=0) as file:
            return _platform(file.read(_HEADER_BYTES))
    except OSError:
        return None
