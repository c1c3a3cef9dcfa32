"""A client in nothing but Python's standard library, written from PROTOCOL.md and the MessagePack specification.

    python plain_client.py SOCKET < messages.json

The input is a JSON list of messages, as PROTOCOL.md draws them: [0, msgid, method, [params]] or [2, method, params], and at
least one is a request. {"$hex": "…"} stands for binary. All are sent at once. The output is a JSON list of all that the agent
sent until the connection was closed.
"""

import contextlib
import json
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 60.0

CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
NUMBERS = {0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q", 0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q"}
# Types with a length: the first mark with a length inside, their number, and the marks that a length follows.
SIZED: dict[type, tuple[int, int, dict[int, str]]] = {
    dict: (0x80, 16, {0xDE: "H", 0xDF: "I"}),
    list: (0x90, 16, {0xDC: "H", 0xDD: "I"}),
    str: (0xA0, 32, {0xD9: "B", 0xDA: "H", 0xDB: "I"}),
    bytes: (0, 0, {0xC4: "B", 0xC5: "H", 0xC6: "I"}),
}

Read = Callable[[int], bytes]


def encode(value: Any) -> bytes:
    """One value in MessagePack, in its shortest form."""
    if value is None or isinstance(value, bool):
        return bytes(mark for mark, constant in CONSTANTS.items() if constant is value)
    if isinstance(value, int):
        return struct.pack("b" if value < 0 else "B", value) if -32 <= value < 128 else _first_that_fits(NUMBERS, value)
    if isinstance(value, str):
        data = value.encode()
        return _head(str, len(data)) + data
    if isinstance(value, bytes):
        return _head(bytes, len(value)) + value
    if isinstance(value, list):
        return _head(list, len(value)) + b"".join(map(encode, value))
    if isinstance(value, dict):
        return _head(dict, len(value)) + b"".join(encode(part) for pair in value.items() for part in pair)
    raise TypeError(f"the protocol has no {type(value).__name__}")


def _head(kind: type, length: int) -> bytes:
    first, count, long_forms = SIZED[kind]
    return bytes([first + length]) if length < count else _first_that_fits(long_forms, length)


def _first_that_fits(forms: dict[int, str], number: int) -> bytes:
    for mark, form in forms.items():
        with contextlib.suppress(struct.error):
            return struct.pack(f">B{form}", mark, number)
    raise OverflowError(f"{number} does not fit")


def decode(read: Read) -> Any:
    """Return one value, of bytes that `read` returns in the requested number."""
    mark = read(1)[0]
    if mark < 0x80 or mark >= 0xE0:
        return mark if mark < 0x80 else mark - 0x100
    if mark in CONSTANTS:
        return CONSTANTS[mark]
    if mark in NUMBERS:
        return _number(NUMBERS[mark], read)
    for kind, (first, count, long_forms) in SIZED.items():
        if first <= mark < first + count:
            return _content(kind, mark - first, read)
        if mark in long_forms:
            return _content(kind, _number(long_forms[mark], read), read)
    raise ValueError(f"the protocol has no {mark:#04x}")


def _number(form: str, read: Read) -> int:
    number: int = struct.unpack(f">{form}", read(struct.calcsize(form)))[0]
    return number


def _content(kind: type, length: int, read: Read) -> Any:
    if kind is list:
        return [decode(read) for _ in range(length)]
    if kind is dict:
        return {decode(read): decode(read) for _ in range(length)}
    return read(length).decode() if kind is str else read(length)


def exchange(path: str, data: bytes, answers: int) -> Iterator[Any]:
    """Send all the data while taking the answers; when there are so many, close one's own side, and take what is still to come.

    An agent that closes first may not have read everything: the end is then an error of the socket.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, connection.makefile("rb") as stream:
        connection.settimeout(PATIENCE)
        connection.connect(path)

        def send() -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)

        def read(length: int) -> bytes:
            received = stream.read(length)
            if len(received) < length:
                raise EOFError
            return received

        sender = threading.Thread(target=send)
        sender.start()
        with contextlib.suppress(ConnectionResetError):
            while stream.peek(1):
                yield decode(read)
                answers -= 1
                if answers == 0:
                    sender.join()
                    connection.shutdown(socket.SHUT_WR)
        sender.join()


def with_binary(value: Any) -> Any:
    """Return the JSON, with bytes for {"$hex": "…"}."""
    if isinstance(value, list):
        return [with_binary(item) for item in value]
    if isinstance(value, dict):
        return (
            bytes.fromhex(value["$hex"]) if "$hex" in value else {key: with_binary(item) for key, item in value.items()}
        )
    return value


if __name__ == "__main__":
    messages = with_binary(json.load(sys.stdin))
    requests = sum(message[0] == 0 for message in messages)
    json.dump(list(exchange(sys.argv[1], b"".join(map(encode, messages)), requests)), sys.stdout)
