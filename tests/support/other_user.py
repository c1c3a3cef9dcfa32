"""A second user of this machine: a process that runs Python code under another uid. It takes root."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OTHER_USER = 4_207
"""A uid that no grant of a test names, unless the test says so."""

_SWITCH = """
import ctypes, fcntl, mmap, os, select, signal, socket, struct, sys, time  # the other user may not read their files
uid = int(sys.argv[1])
exec(sys.argv[4])
os.setgroups(list(map(int, filter(None, sys.argv[2].split(",")))))
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
code, sys.argv = sys.argv[3], ["-c", *sys.argv[5:]]
exec(code)
"""


@contextmanager
def running_as(
    code: str, *arguments: object, uid: int = OTHER_USER, groups: tuple[int, ...] = (), before: str = ""
) -> Iterator["subprocess.Popen[str]"]:
    """Run code as another user for a `with` block, with pipes to its standard input and from its standard output.

    The process is ended at the end of the block. `arguments` are its `sys.argv[1:]`; `before` is run as root.
    """
    switch = [str(uid), ",".join(map(str, groups)), code, before, *map(str, arguments)]
    with subprocess.Popen(
        [sys.executable, "-S", "-c", _SWITCH, *switch], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    """Return the next line of such a process; empty if it has ended."""
    assert process.stdout is not None
    return process.stdout.readline().strip()
