"""Peers in processes of their own: `python peers.py HOW SOCKET COUNT`, started by `peers`.

short    COUNT processes, each of which connects, sends a little, and exits without reading
greedy   connects COUNT times, and sends requests endlessly on each, reading available answers
deaf     connects COUNT times, and sends without reading; prints a line when the buffers are full
once     connects COUNT times, sends a request on each, prints a line, and waits for the answers
gone     COUNT processes in sequence, each of which sends a request and is killed; prints their IDs
"""

import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ASK = bytes.fromhex("94 00 01 ab 44657363726962654b6579 91 81 a5 4b65794964 a9 616c6961732f646576")  # DescribeKey
_SAYINGS = (b"", _ASK, _ASK[:7], _ASK * 5 + b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x91\x02" * 500)


def _connect(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.connect(path)
    return made


def _short(path: str, count: int) -> None:
    for number in range(count):
        if os.fork() == 0:
            with suppress(OSError):
                _connect(path).sendall(_SAYINGS[number % len(_SAYINGS)])
            os._exit(0)
        if number % 16 == 15:
            for _ in range(16):
                os.wait()


def _ask(path: str, count: int, ask: bytes, *, deaf: bool) -> None:
    chosen = selectors.DefaultSelector()
    events = selectors.EVENT_WRITE | (0 if deaf else selectors.EVENT_READ)
    for _ in range(count):
        made = _connect(path)
        made.setblocking(False)
        chosen.register(made, events)
    left = count
    while left:
        ready = chosen.select(0.2 if deaf else None)
        if not ready:
            print("full", flush=True)
            chosen.select()  # until the first is hung up on
        for key, event in ready:
            try:
                if event & selectors.EVENT_WRITE:
                    key.fileobj.send(ask * 50)  # type: ignore[union-attr]
                elif not key.fileobj.recv(1 << 16):  # type: ignore[union-attr]
                    raise ConnectionResetError
            except BlockingIOError:
                pass
            except OSError:
                chosen.unregister(key.fileobj)
                left -= 1


def _once(path: str, count: int) -> None:
    made = [_connect(path) for _ in range(count)]
    for each in made:
        each.sendall(_ASK)
    print("asked", flush=True)
    for each in made:
        each.recv(1 << 16)


def _gone(path: str, count: int) -> None:
    for _ in range(count):
        if os.fork() == 0:
            _connect(path).sendall(_ASK)
            os.kill(os.getpid(), signal.SIGKILL)
        print(os.wait()[0], flush=True)


@contextmanager
def peers(
    how: str,
    path: Path,
    count: int,
    *,
    program: str | Path = sys.executable,
    user: int | None = None,
    ask: bytes = _ASK,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Such a process, for the time of a block; then it is killed.

    `program`: a copy of this Python; `user`: whom it becomes, for which it takes root; `ask`: the request that it makes.
    """
    arguments = [program, "-S", __file__, how, str(path), str(count), ask.hex(), *([str(user)] if user else [])]
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    how, path, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    for user in map(int, sys.argv[5:]):
        os.setresuid(user, user, user)
    if how == "short":
        _short(path, count)
    elif how == "once":
        _once(path, count)
    elif how == "gone":
        _gone(path, count)
    else:
        _ask(path, count, bytes.fromhex(sys.argv[4]), deaf=how == "deaf")
