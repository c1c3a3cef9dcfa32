"""Answers of the gateway: results and errors as JSON or XML, and the HTTP response around them. No I/O."""

import json
import time
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final
from xml.sax.saxutils import escape

from keyferry.errors import KmsError

from .authentication import XML
from .head import Head

__all__ = ["ResponseEncoder"]

_OK: Final = 200
_CONTENT_TYPES: Final = {XML: "text/xml;charset=utf-8"}
_JSON_TYPE: Final = "application/json;charset=utf-8"
_CLOSE: Final = "Connection: close\r\n"
_encode_json: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Made once: `json.dumps` would make an encoder for each answer."""


class ResponseEncoder:
    """Encodes the answer to one request as a whole HTTP response.

    `head`: the request's head; None if it could not be read. `host`: the value for HostId, which is empty where Host was not
    checked. `keep_alive`: whether the connection goes on after the answer.
    """

    def __init__(self, head: Head | None, *, keep_alive: bool) -> None:
        self._is_head = head is not None and head.method == "HEAD"
        self.keep_alive = keep_alive
        self.format = ""
        self.action = ""
        self.host = ""

    def __call__(self, _msgid: int, error: Mapping[str, Any] | None, result: Mapping[str, Any] | None) -> bytes:
        """Return the response for an error or a result, each as the dispatcher has it: a map with a RequestId."""
        if error is not None:
            envelope = {
                "HttpStatus": error["HttpStatus"],
                "Code": error["Code"],
                "Message": error["Message"],
                "RequestId": error["RequestId"],
                "HostId": self.host,
            }
            return self._response(error["HttpStatus"], error["RequestId"], "Error", envelope)
        assert result is not None
        return self._response(_OK, result["RequestId"], f"{self.action}Response", result)

    def refused(self, error: KmsError, request_id: str) -> bytes:
        """Return the response for a request that no operation decides."""
        fields = {
            "HttpStatus": error.http_status,
            "Code": error.code,
            "Message": error.message,
            "RequestId": request_id,
        }
        return self(0, fields, None)

    def _response(self, status: int, request_id: str, root: str, content: Mapping[str, Any]) -> bytes:
        if self.format == XML:
            body = f"<?xml version='1.0' encoding='UTF-8'?><{root}>{''.join(_xml(content))}</{root}>".encode()
        else:
            body = _encode_json(content).encode("utf-8", "replace")
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            f"Content-Type: {_CONTENT_TYPES.get(self.format, _JSON_TYPE)}\r\n"
            f"Content-Length: {len(body)}\r\n"
            f"Date: {_date(int(time.time()))}\r\n"
            "Cache-Control: no-store\r\n"
            "X-Content-Type-Options: nosniff\r\n"
            f"x-acs-request-id: {request_id}\r\n"
            f"{'' if self.keep_alive else _CLOSE}\r\n"
        ).encode("ascii")
        return head if self._is_head else head + body


@lru_cache(maxsize=1)
def _date(seconds: int) -> str:
    """Return a time in seconds since 1970 in the form of HTTP."""
    return formatdate(seconds, usegmt=True)


def _xml(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield elements for the values of a map. A list becomes repeated elements."""
    for name, value in content.items():
        for entry in value if isinstance(value, list | tuple) else [value]:
            yield f"<{name}>{_xml_text(entry)}</{name}>"


def _xml_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "".join(_xml(value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return escape(_without_controls(str(value)))


def _without_controls(text: str) -> str:
    """Return a text without the characters that XML 1.0 cannot have."""
    return "".join(character if character >= " " or character in "\t\n\r" else "\ufffd" for character in text)
