"""A file system that stops answering: one program in it, served over /dev/fuse by a process of its own. It takes root.

    python hanging_files.py FOLDER PROGRAM FLAG

mounts it on FOLDER, with a copy of PROGRAM called `program`, and prints a line. While FLAG exists, stat(2) of it
does not return.
"""

import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_NOSUID_NODEV: Final = 2 | 4
_DETACH: Final = 2

# linux/fuse.h: the headers of requests and answers, and the operations that running a program needs.
_IN: Final = struct.Struct("<IIQQIIIHH")
_OUT: Final = struct.Struct("<IiQ")
_ATTRIBUTES: Final = struct.Struct("<QQQQQQIIIIIIIIII")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _RELEASE, _FLUSH, _INIT, _INTERRUPT, _BATCH_FORGET = (
    1,
    2,
    3,
    14,
    15,
    18,
    25,
    26,
    36,
    42,
)
_UNANSWERED: Final = (_FORGET, _INTERRUPT, _BATCH_FORGET)
_ROOT, _FILE = 1, 2
_LONGEST: Final = 1 << 17


def _attributes(node: int, size: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o755
    return _ATTRIBUTES.pack(node, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4_096, 0)


def _answer(opcode: int, node: int, body: bytes, content: bytes) -> bytes | int:
    """The answer to one request: its body, or the number of an error."""
    size = len(content) if node == _FILE else 0
    if opcode == _READ:
        _, offset, length = struct.unpack_from("<QQI", body)
        return content[offset : offset + length]
    if opcode == _LOOKUP and body.rstrip(b"\0") != b"program":
        return errno.ENOENT
    answers = {
        _INIT: struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, 0, 12, 10, 4_096, 1, 32, 0, 0),
        _LOOKUP: struct.pack("<QQQQII", _FILE, 0, 3_600, 0, 0, 0) + _attributes(_FILE, len(content)),
        _GETATTR: struct.pack("<QII", 0, 0, 0) + _attributes(node, size),
        _OPEN: struct.pack("<QII", 1, 0, 0),
        _RELEASE: b"",
        _FLUSH: b"",
    }
    return answers.get(opcode, errno.ENOSYS)


def _serve(device: int, content: bytes, flag: Path) -> None:
    while True:
        try:
            request = os.read(device, _LONGEST + 4_096)
        except OSError:  # it was unmounted
            return
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        if opcode in _UNANSWERED or (opcode == _GETATTR and node == _FILE and flag.exists()):
            continue
        answer = _answer(opcode, node, request[_IN.size :], content)
        failed = isinstance(answer, int)
        body = b"" if isinstance(answer, int) else answer
        with suppress(OSError):  # the requester is gone
            os.write(device, _OUT.pack(_OUT.size + len(body), -answer if failed else 0, unique) + body)  # type: ignore[operator]


@contextmanager
def hanging_program(folder: Path, program: str, flag: Path) -> Iterator[Path]:
    """Yield the path of a copy of a program in such a file system. It hangs while `flag` exists."""
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-S", __file__, str(folder), program, str(flag)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"mounted\n"
            yield folder / "program"
        finally:
            process.kill()  # which ends every request that it has not answered
            process.wait()
            _libc.umount2(os.fsencode(folder), _DETACH)


def _main(folder: str, program: str, flag: str) -> None:
    content = Path(program).read_bytes()
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40755,user_id=0,group_id=0,allow_other".encode()
    if _libc.mount(b"hanging", os.fsencode(folder), b"fuse", _NOSUID_NODEV, options) != 0:
        sys.exit(os.strerror(ctypes.get_errno()))
    print("mounted", flush=True)
    _serve(device, content, Path(flag))


if __name__ == "__main__":
    _main(*sys.argv[1:])
