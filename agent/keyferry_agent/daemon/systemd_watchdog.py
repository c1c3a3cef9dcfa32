"""Feeds the service manager's watchdog, and only while requests are being answered.

A connection of the agent's own, like any other but for its record, asks GetAgentHealth again and again: each answer is one
feeding. An agent that turns, but does not answer, is restarted.
"""

from collections.abc import Callable

import structlog
import trio

from keyferry.errors import ProtocolError
from keyferry.protocol import wire

from .systemd import ServiceManager

__all__ = ["feed"]

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


async def feed(host: ServiceManager, stream: trio.SocketStream, status: Callable[[], str]) -> None:
    """Ask twice in the manager's interval; tell it when an answer came, with a status for people. Ends with the connection."""
    interval = host.watchdog / 2
    decoder = wire.Decoder()
    msgid = 0
    async with stream:
        while True:
            msgid = (msgid + 1) % 2**32
            asked = trio.current_time()
            with trio.move_on_after(host.watchdog):
                try:
                    if await _answered(stream, decoder, msgid):
                        host.alive(status())
                    else:
                        log.error("watchdog.refused", what="the agent's own request was refused")
                except (trio.BrokenResourceError, ProtocolError):
                    return  # the agent drains
            await trio.sleep_until(asked + interval)


async def _answered(stream: trio.SocketStream, decoder: wire.Decoder, msgid: int) -> bool:
    await stream.send_all(wire.encode_request(msgid, "GetAgentHealth", {}))
    while True:
        received = await stream.receive_some()
        if not received:
            raise trio.BrokenResourceError
        decoder.feed(received)
        for message in decoder.messages():
            if isinstance(message, wire.Response) and message.msgid == msgid:
                return message.error is None
