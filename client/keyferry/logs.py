"""The clients' log: one line for each call, to the logger `keyferry` of the standard library.

A line contains the operation, the RequestId, the code and the duration. It never contains a parameter, a result or a message
of the agent: these can hold plaintexts, ciphertexts and encryption contexts.

Answers are DEBUG. Refusals, failures and repeats are INFO: the exception that is raised has the reason. A program that has not
imported `logging` has no handler. So this module does not import it either: the import takes as long as that of the client.
"""

import functools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .errors import KeyferryError, KmsError
from .protocol.rpc import PendingCall

if TYPE_CHECKING:
    import logging

__all__ = ["answered", "failed", "repeating"]


def answered(calls: Iterable[PendingCall], seconds: float) -> None:
    """Log the outcome of each call. `seconds`: how long all of them took together."""
    logger = _logger()
    if logger is None or not logger.isEnabledFor(_INFO):
        return
    for call in calls:
        refusal = call.refusal()
        if refusal is not None:
            logger.info("%s: %s, %.1f ms", _escaped(call.name), _description(refusal), seconds * 1_000)
        elif logger.isEnabledFor(_DEBUG):
            request_id = _escaped(call.request_id())
            logger.debug("%s: answered, RequestId %s, %.1f ms", _escaped(call.name), request_id, seconds * 1_000)


def failed(calls: Iterable[PendingCall], error: BaseException, seconds: float) -> None:
    """Log that calls failed without an answer."""
    logger = _logger()
    if logger is not None and logger.isEnabledFor(_INFO):
        logger.info("%s: %s, %.1f ms", _names(calls), _description(error), seconds * 1_000)


def repeating(calls: Iterable[PendingCall], error: KeyferryError | None, delay: float) -> None:
    """Log that calls are repeated after a delay in seconds. `error` is the reason, unless each call was refused on its own."""
    logger = _logger()
    if logger is not None and logger.isEnabledFor(_INFO):
        reason = "refused" if error is None else _description(error)
        logger.info("%s: %s, repeated in %.0f ms", _names(calls), reason, delay * 1_000)


_DEBUG = 10
_INFO = 20
"""Levels of the module `logging`."""


def _logger() -> "logging.Logger | None":
    """Return the logger, and None in a program that has not imported `logging`."""
    return _configured_logger() if "logging" in sys.modules else None


@functools.cache
def _configured_logger() -> "logging.Logger":
    import logging  # noqa: PLC0415 - it is there already

    logger = logging.getLogger("keyferry")
    logger.addHandler(logging.NullHandler())
    return logger


def _description(error: BaseException) -> str:
    if isinstance(error, KmsError):
        return f"refused with {_escaped(error.code)}, RequestId {_escaped(error.request_id)}"
    return type(error).__name__


def _names(calls: Iterable[PendingCall]) -> str:
    """Return the names of the operations, each once."""
    return ", ".join(dict.fromkeys(_escaped(call.name) for call in calls))


def _escaped(text: str) -> str:
    """Return at most 64 characters of a peer's or a caller's text, escaped where they could begin another line."""
    return text[:64] if text.isprintable() else ascii(text[:64])
