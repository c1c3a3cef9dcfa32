"""HTTP as cheaply as it can be asked: one request's bytes, made beforehand, over connections that stay open."""

import json
import socket
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from support.agent import PATIENCE
from support.keys import rsa_private_key

from ..run_context import Way

__all__ = ["exchange", "request", "wait_until_listening", "ways", "wrapper"]

_TOGETHER: Final = 16
"""Connections, where several ask at a time."""
_OAEP: Final = padding.OAEP(padding.MGF1(SHA256()), SHA256(), None)

Dial = Callable[[], socket.socket]


def request(method: str, path: str, body: dict[str, Any] | None, headers: dict[str, str]) -> bytes:
    """The bytes of a request; the body is JSON."""
    packed = json.dumps(body).encode() if body is not None else b""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(packed)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + packed


def receive(connection: socket.socket) -> bytes:
    """The body of one answer. Raises ConnectionError, or ValueError for another status than 2xx."""
    data = b""
    while (end := data.find(b"\r\n\r\n")) < 0:
        data += _more(connection)
    head, body = data[:end].lower(), data[end + 4 :]
    at = head.find(b"content-length:")
    size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
    while len(body) < size:
        body += _more(connection)
    if head.split(b" ", 2)[1][:1] != b"2":
        raise ValueError(f"{head.decode()}: {body.decode()}")
    return body


def _more(connection: socket.socket) -> bytes:
    received = connection.recv(65_536)
    if not received:
        raise ConnectionError("the server hung up")
    return received


def exchange(dial: Dial, asked: bytes) -> Any:
    """One request over a connection of its own; its answer's JSON."""
    with dial() as connection:
        connection.sendall(asked)
        return json.loads(receive(connection) or b"null")


def wait_until_listening(dial: Dial) -> None:
    """Wait until the server accepts. Raises TimeoutError."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            dial().close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError("the peer does not listen")


def wrapper(plaintext: Callable[[Any], str]) -> Callable[[bytes], object]:
    """The client's part: take the data key out of an answer, and encrypt it to a module's public key."""
    public: rsa.RSAPublicKey = rsa_private_key().public_key()
    return lambda body: public.encrypt(b64decode(plaintext(json.loads(body))), _OAEP)


def ways(dial: Dial, asked: bytes, after: Callable[[bytes], object], *, stays: bool = True) -> dict[str, Way]:
    """One at a time, and over several connections; over a new one each time, where the server does not let them `stay`."""

    def together(count: int, seconds: float) -> float:
        lines = deque(dial() for _ in range(count))
        answers, elapsed, began = 0, 0.0, time.perf_counter()
        for line in lines:
            line.sendall(asked)
        while elapsed < seconds:
            body = receive(lines[0])  # answers come roughly in the order of the requests
            if not stays:
                lines[0].close()
                lines[0] = dial()
            lines[0].sendall(asked)
            lines.rotate(-1)
            after(body)
            answers += 1
            elapsed = time.perf_counter() - began
        for line in lines:
            receive(line)
            line.close()
        return answers / elapsed

    return {
        "one request at a time": partial(together, 1),
        f"{_TOGETHER} connections": partial(together, _TOGETHER),
    }
