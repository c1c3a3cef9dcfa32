"""Calls that have to succeed, and calls that have to be refused in the documented way."""

import uuid
from typing import Any

from keyferry.errors import CODES
from keyferry.protocol import wire

from .agent import RawConnection


def result(response: wire.Response | None) -> dict[str, Any]:
    """Return the result of a response, which has to be there and no error."""
    assert response is not None
    assert response.error is None, response.error
    assert response.result is not None
    return response.result


def error(response: wire.Response | None) -> dict[str, Any]:
    """Return the error of a response, which has to be there and a refusal."""
    assert response is not None
    assert response.error is not None, response.result
    return response.error


def call_ok(connection: RawConnection, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a call that has to succeed."""
    answer = result(connection.call(method, params))
    assert str(uuid.UUID(answer["RequestId"])).upper() == answer["RequestId"]
    return answer


def call_refused(connection: RawConnection, method: str, params: dict[str, Any], code: str, *words: str) -> str:
    """Return the message of a call that has to be refused with this code.

    The message has to begin as documented, and to contain the words.
    """
    refusal = error(connection.call(method, params))
    assert refusal.keys() == {"Code", "Message", "RequestId", "HttpStatus"}
    assert (refusal["Code"], refusal["HttpStatus"]) == (code, CODES[code].http_status), refusal
    if code != "MissingParameter":
        assert refusal["Message"].startswith(CODES[code].message)
    assert all(word in refusal["Message"] for word in words), refusal
    message: str = refusal["Message"]
    return message
