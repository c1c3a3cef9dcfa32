"""A second reader of the wire, written from PROTOCOL.md and the MessagePack specification alone. It shares no code with the
client and no library with it either: it has a whole stream in memory, and reads it from the beginning, value by value.
"""

from typing import Any

LIMIT = 65_536
MAP, ARRAY, DEEP = 1_024, 64, 8
MSGID = 2**32

CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
LENGTHS = {"bin": (0xC4, 0xC5, 0xC6), "str": (0xD9, 0xDA, 0xDB), "array": (0, 0xDC, 0xDD), "map": (0, 0xDE, 0xDF)}
SHORT = {"map": range(0x80, 0x90), "array": range(0x90, 0xA0), "str": range(0xA0, 0xC0)}


class Refused(Exception):
    """The bytes are not a message, or it exceeds a limit."""


class Unfinished(Exception):
    """These bytes may still become one."""


class _Reader:
    def __init__(self, stream: bytes, begin: int, most_entries: int) -> None:
        self.at = begin
        self._stream = stream
        self._end = begin + LIMIT
        self._most_entries = most_entries

    def value(self, deep: int = 0, *, key: bool = False) -> Any:
        first = self._take(1)[0]
        if key and first not in SHORT["str"] and first not in LENGTHS["str"]:  # before its length is asked for
            raise Refused("a key that is no string")
        kind, size = self._head(first)
        if kind == "number":
            return size
        if kind == "constant":
            return CONSTANTS[first]
        if kind in ("str", "bin"):
            taken = self._take(size)
            return taken if kind == "bin" else taken.decode("utf-8", "surrogateescape")
        if size > (MAP if kind == "map" else self._most_entries):
            raise Refused("too many entries")
        if deep == DEEP:
            raise Refused("too deep")
        if kind == "array":
            return [self.value(deep + 1) for _ in range(size)]
        pairs = [(self.value(deep + 1, key=True), self.value(deep + 1)) for _ in range(size)]
        return _Map(pairs)

    def _head(self, first: int) -> tuple[str, int]:
        if first < 0x80 or first >= 0xE0:
            return "number", first if first < 0x80 else first - 0x100
        if first in CONSTANTS:
            return "constant", 0
        if 0xCC <= first <= 0xD3:
            signed, width = first >= 0xD0, 1 << (first & 3)
            return "number", int.from_bytes(self._take(width), "big", signed=signed)
        for kind, short in SHORT.items():
            if first in short:
                return kind, first - short.start
        for kind, firsts in LENGTHS.items():
            if first in firsts:
                return kind, int.from_bytes(self._take(1 << firsts.index(first)), "big")
        raise Refused("a float, an extension, or nothing at all")

    def _take(self, size: int) -> bytes:
        self.at += size
        if self.at > self._end:
            raise Refused("too long")
        if self.at > len(self._stream):
            raise Unfinished
        return self._stream[self.at - size : self.at]


class _Map(dict[str, Any]):
    """A map that remembers whether it had a key twice: that is seen only where a message is whole."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.doubled = len(self) != len(pairs)


def read(stream: bytes, *, most_entries: int = ARRAY) -> tuple[list[tuple[Any, ...]], bool]:
    """The messages of a whole stream, each as ("request", msgid, method, params) and so on, and whether it ends in an error."""
    messages: list[tuple[Any, ...]] = []
    begin = 0
    while begin < len(stream):
        reader = _Reader(stream, begin, most_entries)
        try:
            messages.append(_told_apart(reader.value()))
        except Refused:
            return messages, True
        except Unfinished:
            break
        begin = reader.at
    return messages, False


def _doubled(value: Any) -> bool:
    if isinstance(value, _Map):
        return value.doubled or any(map(_doubled, value.values()))
    return isinstance(value, list) and any(map(_doubled, value))


def _told_apart(body: Any) -> tuple[Any, ...]:
    if not isinstance(body, list) or not body or _doubled(body):
        raise Refused("no message")
    kind, msgid = body[0], body[1] if len(body) > 1 else None
    numbered = type(msgid) is int and 0 <= msgid < MSGID
    if type(kind) is int and kind == 2:
        return ("notification",)
    if type(kind) is int and kind == 1 and len(body) == 4 and (numbered or msgid is None):
        error, result = body[2:]
        if (isinstance(error, dict) and result is None) or (isinstance(result, dict) and error is None):
            return ("response", msgid, error, result)
    if not numbered:
        raise Refused("a msgid that is none")
    if type(kind) is int and kind == 0 and len(body) == 4 and isinstance(body[2], str):
        params = body[3]
        if isinstance(params, list) and len(params) == 1 and isinstance(params[0], dict):
            return ("request", msgid, body[2], params[0])
    return ("unservable", msgid)
