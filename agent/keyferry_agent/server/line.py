"""The state of one connection in rounds: its received messages, its timeout, and whether rounds or its own task has it."""

import os
from collections.abc import Callable, Iterator
from typing import Any, Final

from keyferry.protocol import wire

from ..authz.caller import Caller
from .dispatch import MAX_OFFLOADED, Exchange
from .identity import Identity

__all__ = ["Line"]

_SMALL_READ_BYTES: Final = 4_096
_LARGE_READ: Final = 65_536
"""Bytes of the next read, if the last read returned at least `_SMALL_READ_BYTES`."""


class Line:
    """The state of one connection in rounds. `wake` is called when the connection's own task has something to do."""

    def __init__(self, number: int, caller: Caller, identity: Identity, wake: Callable[[], None]) -> None:
        self.number = number
        """The socket's descriptor, which stays open while rounds serve the line."""
        self.exchange = Exchange(caller)
        self.identity = identity
        self.wake = wake
        self.decoder = wire.Decoder()
        self.messages: Iterator[wire.PackedRequest | wire.Message] | None = None
        """Received messages that no batch has taken yet. The socket is not read before they are taken."""
        self.unread = False
        """Whether all of those messages are still to be taken."""
        self.readable = self.listening = False
        self._read_size = _SMALL_READ_BYTES
        self.notifications = 0
        self.new_message = False
        """Whether the partly received message began after the last answered message."""
        self.message_since = 0.0
        """When the partly received message began, on trio's clock."""
        self.late = False
        self.aside = False
        """Whether the connection's own task has the line, so that rounds leave it alone."""
        self.ended = False
        self.closing = False
        """Whether reading has stopped. The line ends when all its requests are answered."""
        self.last_word = b""
        """The error message to send after all answers."""
        self.refused = False
        """Whether the line ends with an error message."""
        self.unsent = b""
        self.to_inspect = False
        self.failure: Exception | None = None

    @property
    def who(self) -> dict[str, Any]:
        """The caller's uid and pid, as fields of log events."""
        return {"uid": self.exchange.caller.peer.uid, "pid": self.exchange.caller.peer.pid}

    @property
    def asks(self) -> bool:
        """Whether there are messages to take or requests to decide."""
        return self.messages is not None or bool(self.exchange.pending)

    @property
    def full(self) -> bool:
        """Whether the limit of offloaded jobs is reached. Then nothing is read or decided until one of them is answered."""
        return self.exchange.in_flight >= MAX_OFFLOADED

    def receive(self) -> None:
        """Receive the available bytes. Raises OSError if the peer is gone.

        EAGAIN ends the connection, too: out-of-band bytes would make the socket readable again and again.
        """
        data = os.read(self.number, self._read_size)
        if not data:
            self.closing = True
            return
        # malloc.perturb fills every allocation, so a large buffer for a request of 500 bytes would evict the CPU caches.
        self._read_size = _LARGE_READ if len(data) >= _SMALL_READ_BYTES else _SMALL_READ_BYTES
        self.new_message = not self.decoder.incomplete
        self.decoder.feed(data)
        self.messages, self.unread = self.decoder.packed_messages(), True
