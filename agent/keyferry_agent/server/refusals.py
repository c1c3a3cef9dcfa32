"""Errors as answers: of a request that failed, and of a connection that ends."""

from typing import Any

import structlog

from keyferry.errors import KmsError, kms_error
from keyferry.protocol import wire

from ..audit.entry import AuditEntry
from .request_id import new_request_id

__all__ = ["closing", "error_fields", "refusal"]

log: structlog.stdlib.BoundLogger = structlog.get_logger("keyferry_agent")


def refusal(error: Exception, request_id: str, entry: AuditEntry) -> KmsError:
    """Return the error to answer instead of a result. Logs an internal error.

    The error is a new exception. A raised exception refers to every frame that it passed through, and so to a plaintext or to
    a replaced keyring. If one of these frames refers to it in turn, they live until the next garbage collection.
    """
    if isinstance(error, KmsError):
        return kms_error(error.code, message=error.message, http_status=error.http_status)
    log.error("request.failed", request_id=request_id, operation=entry.operation, exc_info=error)
    return kms_error("InternalFailure")


def error_fields(code: str, message: str, request_id: str, http_status: int) -> dict[str, Any]:
    """Return the error of an answer, as the protocol and the gateways' encoders have it."""
    return {"Code": code, "Message": message, "RequestId": request_id, "HttpStatus": http_status}


def closing(code: str, message: str, http_status: int) -> bytes:
    """Return the last message on a connection: an error without a message ID, which answers no single request."""
    return wire.encode_response(None, error_fields(code, message, new_request_id(), http_status), None)
