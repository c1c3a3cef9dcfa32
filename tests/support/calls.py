"""Calls that have to succeed, and calls that have to be refused in the documented way."""

import uuid
from typing import Any

from keyferry.errors import CODES

from .agent import RawConnection


def ok(connection: RawConnection, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """The result of a call that has to succeed."""
    response = connection.call(method, params)
    assert response.error is None, response.error
    assert response.result is not None
    assert str(uuid.UUID(response.result["RequestId"])).upper() == response.result["RequestId"]
    return response.result


def refused(connection: RawConnection, method: str, params: dict[str, Any], code: str, *words: str) -> str:
    """The message of a call that has to be refused with this code; it begins as documented, and holds the words."""
    error = connection.call(method, params).error
    assert error is not None
    assert error.keys() == {"Code", "Message", "RequestId", "HttpStatus"}
    assert (error["Code"], error["HttpStatus"]) == (code, CODES[code].http_status), error
    if code != "MissingParameter":
        assert error["Message"].startswith(CODES[code].message)
    assert all(word in error["Message"] for word in words), error
    message: str = error["Message"]
    return message
