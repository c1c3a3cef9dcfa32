"""The errors of both packages: codes, statuses and texts on the wire, and exceptions in Python.

Three families differ in the action that the caller can take:

* `AgentUnavailable`: the agent did not answer. It is down, or this user cannot reach it. Retry.
* `ProtocolError`: bytes did not follow the protocol. One end has a bug, or is not the expected program. Do not retry.
* `KmsError`: the agent understood the request and refused it. Its `code` and the code's meaning are the cloud's.

Every exception has `retryable`: True if the same call may succeed later. A repeated call is always safe, because no operation
changes anything in the agent. A call that was executed twice leaves one more audit entry, and a data key that is not used.
"""

from typing import Final, NamedTuple

__all__ = [
    "CODES",
    "AccessDenied",
    "AgentUnavailable",
    "DryRun",
    "InternalFailure",
    "InvalidRequest",
    "KeyUnusable",
    "KeyferryError",
    "KmsError",
    "NotFound",
    "ProtocolError",
    "ServiceUnavailable",
    "Throttled",
    "invalid_parameter",
    "kms_error",
    "missing_parameter",
]


class KeyferryError(Exception):
    """Base class of this package's own exceptions. `retryable` is True if the same call may succeed later."""

    retryable = False


class AgentUnavailable(KeyferryError):
    """The agent did not answer: no socket, no listener, no permission on it, or no answer in time. Safe to retry.

    `retryable` is False where waiting does not help: this user may not open the socket, or the path is not a socket.
    """

    def __init__(self, message: str = "", *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class ProtocolError(KeyferryError):
    """Bytes did not follow the protocol: one end has a bug, or is not the expected program.

    Unlike after a `KmsError`, the connection cannot be used again.
    """


class KmsError(KeyferryError):
    """The agent understood the request and refused it. Attributes: `code`, `message`, `request_id`, `http_status`."""

    def __init__(self, code: str, message: str, request_id: str = "", http_status: int = 0) -> None:
        super().__init__(code, message, request_id, http_status)
        self.code = code
        self.message = message
        self.request_id = request_id
        self.http_status = http_status or (CODES[code].http_status if code in CODES else 0)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" (RequestId {self.request_id})" if self.request_id else "")


class AccessDenied(KmsError):
    """No grant allows the caller this operation. Retrying does not help; the operator has to add a grant."""


class NotFound(KmsError):
    """The operation, key, alias or key version does not exist."""


class InvalidRequest(KmsError):
    """A parameter is missing or wrong, or a ciphertext does not open. The caller has to change the request."""


class KeyUnusable(KmsError):
    """The key exists, but its state forbids this operation now."""


class Throttled(KmsError):
    """Too many requests or connections of this user. Wait `retry_after` seconds, then retry."""

    retryable = True
    retry_after = 1.0
    """Seconds until the agent's allowance of requests for one user is full again. The allowance is per second."""


class ServiceUnavailable(KmsError):
    """The agent cannot serve the request now, for example because its audit log cannot be written.

    Retry; the operator has to remove the cause.
    """

    retryable = True


class InternalFailure(KmsError):
    """The agent failed, through a bug or a fault of its host. Its log contains the RequestId. Retry, and report the failure."""

    retryable = True


class DryRun(KmsError):
    """The answer to a call with DryRun, which never succeeds. `code` is the outcome that the call would have had."""


class _Code(NamedTuple):
    http_status: int
    message: str
    raises: type[KmsError]


# Texts and statuses are those that the cloud documents. It documents neither for the three codes of DryRun.
CODES: Final[dict[str, _Code]] = {
    "MissingParameter": _Code(400, 'The parameter "{}" is needed but not provided.', InvalidRequest),
    "InvalidParameter": _Code(400, "The specified parameter is not valid.", InvalidRequest),
    "UnsupportedOperation": _Code(400, "This action is not supported.", InvalidRequest),
    "InvalidAction.NotFound": _Code(404, "Specified api is not found, please check your url and method.", NotFound),
    "Forbidden.NoPermission": _Code(403, "This operation is forbidden by permission system.", AccessDenied),
    "Forbidden.KeyNotFound": _Code(404, "The specified Key is not found.", NotFound),
    "Forbidden.AliasNotFound": _Code(404, "The specified Alias is not found.", NotFound),
    "Forbidden.KeyVersionNotFound": _Code(404, "The specified Key version is not found.", NotFound),
    "InvalidAccessKeyId.NotFound": _Code(404, "The Access Key ID provided does not exist in our records.", NotFound),
    "Rejected.Disabled": _Code(409, "The request was rejected because the key state is Disabled.", KeyUnusable),
    "Rejected.PendingDeletion": _Code(
        409, "The request was rejected because the key state is PendingDeletion.", KeyUnusable
    ),
    "Rejected.PendingImport": _Code(
        409, "The request was rejected because the key state is PendingImport.", KeyUnusable
    ),
    "Rejected.Unavailable": _Code(409, "The request was rejected because the key state is Unavailable.", KeyUnusable),
    "Rejected.Throttling": _Code(429, "QPS Limit Exceeded", Throttled),
    "InternalFailure": _Code(500, "Internal Failure.", InternalFailure),
    "ServiceUnavailableTemporary": _Code(503, "Service Unavailable Temporary.", ServiceUnavailable),
    "DryRunOperationError": _Code(412, "The request would have succeeded, but the DryRun option is set.", DryRun),
    "ValidationError": _Code(400, "The request would have failed: a parameter is not valid.", DryRun),
    "AccessDeniedError": _Code(403, "The request would have failed: it is not authorized.", DryRun),
}


def kms_error(
    code: str, why: str = "", *, message: str | None = None, request_id: str = "", http_status: int = 0
) -> KmsError:
    """Return the exception for `code`. Its message is the documented text, then `why` as a further sentence.

    `message` replaces the whole text, for errors from the wire. For an unknown code, the function returns a plain `KmsError`.
    """
    entry = CODES.get(code)
    error_class = entry.raises if entry else KmsError
    if message is None:
        text = entry.message if entry else ""
        message = f"{text.removesuffix('.')}. {why}" if why else text
    return error_class(code, message, request_id, http_status)


def invalid_parameter(name: str, why: str) -> KmsError:
    """Return the `InvalidParameter` error with the parameter's name and the reason."""
    return kms_error("InvalidParameter", f"{name}: {why}")


def missing_parameter(name: str) -> KmsError:
    """Return the `MissingParameter` error with the parameter's name."""
    return kms_error("MissingParameter", message=CODES["MissingParameter"].message.format(name))
