"""What can go wrong, and who is to blame: codes, statuses and texts on the wire, exceptions in Python.

Three families, told apart by what the caller can do:

* `AgentUnavailable`: nobody answered. The agent is down, or out of reach for this user. Retry.
* `ProtocolError`: the bytes made no sense. One of the two ends has a bug, or is not what it seems. Do not retry.
* `KmsError`: the agent understood and refused. Its `code` is one of the cloud's, so is what it means.

Every exception has `retryable`: whether the same call may succeed later. A repeated call is always safe, because no operation
changes anything in the agent: a call that was executed twice leaves one more audit entry, and a data key that is not used.
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
    """Base of everything this package raises on purpose. `retryable`: whether the same call may succeed later."""

    retryable = False


class AgentUnavailable(KeyferryError):
    """Nobody answered: no socket, no listener, no permission on it, or no answer in time. Safe to retry.

    `retryable` is False where time alone changes nothing: this user may not open the socket, or the path is not a socket.
    """

    def __init__(self, message: str = "", *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class ProtocolError(KeyferryError):
    """Bytes that are not the protocol: a bug at one end, or a peer that is not what it seems. Unlike `KmsError`, the
    connection is of no further use.
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
    """No grant allows this caller to do this. The operator decides; retrying does not help."""


class NotFound(KmsError):
    """No such operation, key, alias or key version."""


class InvalidRequest(KmsError):
    """A parameter is missing or wrong, or a ciphertext does not open. The caller has to change the request."""


class KeyUnusable(KmsError):
    """The key exists, but its state forbids this operation now."""


class Throttled(KmsError):
    """Too many requests or connections of this user. Wait `retry_after` seconds, then retry."""

    retryable = True
    retry_after = 1.0
    """Seconds in which the agent's allowance of requests for one user fills up: it is a number of requests per second."""


class ServiceUnavailable(KmsError):
    """The agent cannot do it now, for example because its audit log cannot be written. Retry; the operator has to help."""

    retryable = True


class InternalFailure(KmsError):
    """Something failed inside the agent: a bug, or a fault of its host. Its log has the RequestId. Retry, and report."""

    retryable = True


class DryRun(KmsError):
    """The answer to a call with DryRun, which never succeeds: `code` says what the call would have done."""


class _Code(NamedTuple):
    http_status: int
    message: str
    raises: type[KmsError]


# Texts and statuses are the ones the cloud documents. The three of DryRun have no documented status or text.
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
    """Make the exception that stands for `code`: its documented text, then `why` as a further sentence.

    `message` replaces the text altogether: for errors that come from the wire. An unknown code gives a plain `KmsError`.
    """
    known = CODES.get(code)
    raises = known.raises if known else KmsError
    if message is None:
        text = known.message if known else ""
        message = f"{text.removesuffix('.')}. {why}" if why else text
    return raises(code, message, request_id, http_status)


def invalid_parameter(name: str, why: str) -> KmsError:
    """Make the `InvalidParameter` that names the parameter and says why it was refused."""
    return kms_error("InvalidParameter", f"{name}: {why}")


def missing_parameter(name: str) -> KmsError:
    """Make the `MissingParameter` that names the parameter."""
    return kms_error("MissingParameter", message=CODES["MissingParameter"].message.format(name))
