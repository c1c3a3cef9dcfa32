"""A load generator for gateways: signed requests over one connection that is kept alive, one at a time.

Requests are signed before the clock runs, in batches: a nonce is good once, and a timestamp for some minutes. Answers are not
parsed, but the first. All of them have one size.
"""

import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

__all__ = ["HttpLine"]

_BATCH: Final = 200
_RECEIVE: Final = 1 << 16
_SUCCESS: Final = b"HTTP/1.1 200 "


class HttpLine:
    """A connection to a gateway on a port of this host. `sign` returns the bytes of the next request; `ca` makes it https."""

    def __init__(self, port: int, sign: Callable[[], bytes], ca: Path | None = None) -> None:
        self._sign = sign
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if ca is not None:
            context = ssl.create_default_context(cafile=str(ca))
            self._socket = context.wrap_socket(self._socket, server_hostname="127.0.0.1")
        self._size = self._first()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()

    def _first(self) -> int:
        """Send a request, and return the size of its answer, which has to be good."""
        self._socket.sendall(self._sign())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._receive()
        head, _, body = answer.partition(b"\r\n\r\n")
        if not answer.startswith(_SUCCESS):
            raise ValueError(f"not the answer that was expected: {answer!r}")
        (length,) = [
            int(line.partition(b":")[2]) for line in head.splitlines() if line.lower().startswith(b"content-length:")
        ]
        while len(body) < length:
            body += self._receive()
        return len(head) + 4 + length

    def _receive(self) -> bytes:
        received = self._socket.recv(_RECEIVE)
        if not received:
            raise ConnectionError("the agent hung up")
        return received

    def rate(self, seconds: float) -> float:
        """Ask, wait for the answer, ask again. Return the answers per second of such a client."""
        answers, elapsed = 0, 0.0
        while elapsed < seconds:
            batch = [self._sign() for _ in range(_BATCH)]
            began = time.perf_counter()
            for request in batch:
                self._socket.sendall(request)
                left = self._size
                while left > 0:
                    left -= len(self._receive())
                if left:
                    raise ValueError("an answer is not as long as it should be: it is an error")
            elapsed += time.perf_counter() - began
            answers += _BATCH
        return answers / elapsed
