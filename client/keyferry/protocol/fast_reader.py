"""The fast reader: msgpack's own parser for usual messages, then a check of the protocol's rules that msgpack lacks.

It accepts a message or leaves it to the strict reader (`msgpack_scanner`), which finds and names the fault.
"""

import sys
from typing import Any, Final

import msgpack

from .msgpack_scanner import MAX_DEPTH, UNICODE_ERRORS, unique_keys

__all__ = ["SENDABLE", "TEXT", "parse_fast"]

SENDABLE: Final = frozenset({str, int, bool, bytes, type(None)})
TEXT: Final = frozenset({str})
"""Types of the values that are not containers, and of the keys of maps."""
_MAX_FAST_MAP: Final = 64
"""Entries of a map in the fast reader: it allocates what headers claim, up to 1,000 levels deep."""


def _keeps_map_keys() -> bool:
    """Return whether this interpreter keeps the keys of maps that msgpack's parser interns, as long as the process lives."""
    (key,) = msgpack.unpackb(msgpack.packb({f"{__name__} {id(object())}": None}))
    return sys.getrefcount(key) > 2**16


# On the first releases of Python 3.12, interned strings are immortal: a client that sends ever new keys would fill the memory.
# The strict reader interns nothing.
_IS_ENABLED: Final = not _keeps_map_keys()


def parse_fast(message: bytearray, max_array: int) -> Any:
    """Return the value of one message as msgpack's parser reads it; None if the value may break a rule of the protocol."""
    if not _IS_ENABLED:
        return None
    try:
        value = msgpack.unpackb(
            message,
            unicode_errors=UNICODE_ERRORS,
            object_pairs_hook=unique_keys,
            max_array_len=max_array,
            max_map_len=_MAX_FAST_MAP,
            max_ext_len=0,
        )
    except Exception:  # for any fault: the scanner finds out which
        return None
    return value if _is_plain(value) else None


def _is_plain(value: Any, depth: int = 1) -> bool:
    """Return whether a value that msgpack's parser accepted is also valid in the protocol.

    `depth` is the nesting depth of the value, including itself.
    """
    kind, members = type(value), value
    if kind is dict:
        if not TEXT.issuperset(map(type, value)):
            return False
        members = value.values()
    elif kind is not list:
        return kind in SENDABLE
    if depth > MAX_DEPTH:
        return False
    # Compare the types as a set where that decides: a loop would take as long as the parsing.
    if SENDABLE.issuperset(map(type, members)):
        return True
    for member in members:  # noqa: SIM110 - a generator is a function that is made each time
        if type(member) not in SENDABLE and not _is_plain(member, depth + 1):
            return False
    return True
