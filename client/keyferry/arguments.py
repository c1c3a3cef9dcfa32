"""Strict parsers of numbers and sockets on the command line: `int` and `float` accept more forms than users intend.

Each function is for `type=` of argparse, and its errors name the expected form.
"""

import math
import re
from argparse import ArgumentTypeError
from typing import Final

from .protocol.rpc import socket_path

__all__ = ["seconds", "socket", "whole_number"]

_WHOLE_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,1000}", re.ASCII)
_DECIMAL_NUMBER: Final = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", re.ASCII)
_MAX_QUOTED_CHARACTERS: Final = 40


def whole_number(text: str) -> int:
    """Return a whole number of ASCII digits: neither `1_6` nor digits of other scripts."""
    if not _WHOLE_NUMBER.fullmatch(text):
        raise ArgumentTypeError(f"an integer is expected, in the digits 0 to 9, not {_quoted(text)}")
    return int(text)


def seconds(text: str) -> float:
    """Return a number of seconds, such as 30 or 0.5."""
    number = float(text) if _DECIMAL_NUMBER.fullmatch(text) else math.nan
    if not 0 <= number < math.inf:
        raise ArgumentTypeError(f"a number of seconds is expected, like 30 or 0.5, not {_quoted(text)}")
    return number


def socket(text: str) -> str:
    """Return the path of a socket, in any form that `rpc.socket_path` accepts."""
    try:
        return socket_path(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _MAX_QUOTED_CHARACTERS else f"{text[:_MAX_QUOTED_CHARACTERS]}...")
