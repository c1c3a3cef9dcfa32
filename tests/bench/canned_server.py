"""A server that computes nothing: every request gets the same answer, with its own message ID."""

import os
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Final, Self

from .cpu import SERVER, pin

__all__ = ["CannedServer", "answer_to"]

_WIDTHS: Final = {0xCC: 2, 0xCD: 3, 0xCE: 5}
_HEAD: Final = 2
"""An array of four, and the kind of message: a byte each."""


def _msgid(message: bytes) -> bytes:
    return message[_HEAD : _HEAD + _WIDTHS.get(message[_HEAD], 1)]


def answer_to(request: bytes, answer: bytes) -> bytes:
    """The canned answer, with the message ID of a request."""
    return answer[:_HEAD] + _msgid(request) + answer[_HEAD + len(_msgid(answer)) :]


class CannedServer:
    """Such a server in a process of its own, on the agent's core."""

    def __init__(self, answer: bytes) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="keyferry-bench-")
        self.path = str(Path(self._folder.name) / "stub.sock")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        self._pid = os.fork()
        if not self._pid:
            pin(0, SERVER)
            _serve(self._listener, answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.close()
        os.kill(self._pid, 9)
        os.waitpid(self._pid, 0)
        self._folder.cleanup()


def _serve(listener: socket.socket, answer: bytes) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection, answer), daemon=True).start()


def _answer(connection: socket.socket, answer: bytes) -> None:
    while request := connection.recv(65_536):
        connection.sendall(answer_to(request, answer))
    connection.close()
    sys.stdout.flush()
