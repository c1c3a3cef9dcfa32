"""One connection as rounds serve it: what it has received, what it waits for, and whose turn it is."""

import os
from collections.abc import Callable, Iterator
from typing import Any, Final

from keyferry.protocol import wire

from ..authz.caller import Caller
from .dispatch import MAX_OFFLOADED, Exchange
from .identity import Identity

__all__ = ["Line"]

_FIRST_READ: Final = 4_096
_LARGE_READ: Final = 65_536
"""Bytes to read at once, where there were more than a few the last time."""


class Line:
    """One connection, as rounds serve it. `wake` is called when its own task has something to do."""

    def __init__(self, number: int, caller: Caller, identity: Identity, wake: Callable[[], None]) -> None:
        self.number = number
        """The socket's descriptor: open for as long as the line is in the rounds."""
        self.exchange = Exchange(caller)
        self.identity = identity
        self.wake = wake
        self.decoder = wire.Decoder()
        self.messages: Iterator[wire.PackedRequest | wire.Message] | None = None
        """Messages that were received, but did not fit into a batch: the socket is not read before they are taken."""
        self.unread = False
        """Whether none of those messages was taken."""
        self.readable = self.listening = False
        self._read_size = _FIRST_READ
        self.notifications = 0
        self.new_message = False
        """Whether the message that is being received began after the last one that was answered."""
        self.message_since = 0.0
        """When that message began, on trio's clock."""
        self.late = False
        self.aside = False
        """Whether the connection's own task has it."""
        self.ended = False
        self.closing = False
        """Whether nothing more is read: it ends when everything that was asked is answered."""
        self.last_word = b""
        """What is sent after all answers."""
        self.refused = False
        """Whether a last word is or was to be sent."""
        self.unsent = b""
        self.to_inspect = False
        self.failure: Exception | None = None

    @property
    def who(self) -> dict[str, Any]:
        """The caller, for the log."""
        return {"uid": self.exchange.caller.peer.uid, "pid": self.exchange.caller.peer.pid}

    @property
    def asks(self) -> bool:
        """Whether there are messages that no round has taken yet."""
        return self.messages is not None or bool(self.exchange.asked)

    @property
    def full(self) -> bool:
        """Whether it has all offloaded jobs that it may have: nothing more is read or decided before one is answered."""
        return self.exchange.under_way >= MAX_OFFLOADED

    def receive(self) -> None:
        """Receive what there is. Raises OSError where the peer is gone.

        EAGAIN counts as that: there are bytes out of band, and the socket would be readable again and again.
        """
        received = os.read(self.number, self._read_size)
        if not received:
            self.closing = True
            return
        # All of a buffer is written over when it is made: a large one, for a request of 500 bytes, empties the caches.
        self._read_size = _LARGE_READ if len(received) >= _FIRST_READ else _FIRST_READ
        self.new_message = not self.decoder.incomplete
        self.decoder.feed(received)
        self.messages, self.unread = self.decoder.packed_messages(), True
