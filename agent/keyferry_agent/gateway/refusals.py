"""Refusals of the gateway: requests that end before an operation is decided, with the cloud's codes and texts."""

from typing import Final

from keyferry.errors import KmsError

__all__ = ["HttpRefusal", "refusal"]

_TEXTS: Final[dict[str, tuple[int, str]]] = {
    "IncompleteSignature": (400, "The request signature does not conform to Alibaba Cloud standards."),
    "InvalidSignatureMethod": (400, "Specified signature method is not valid."),
    "InvalidVersion": (400, "Specified parameter Version is not valid."),
    "InvalidParameter.Format": (400, "Specified parameter Format is not valid."),
    "InvalidTimeStamp.Format": (400, "Specified time stamp or date value is not well formatted."),
    "InvalidTimeStamp.Expired": (400, "Specified time stamp or date value is expired."),
    "InvalidAccessKeyId.NotFound": (404, "Specified access key is not found."),
    "Forbidden.AccessKey": (403, "This AccessKey is not enabled."),
    "InvalidSecurityToken.Malformed": (400, "Specified SecurityToken is malformed."),
    "SignatureNonceUsed": (400, "Specified signature nonce was used already."),
    "UnsupportedContentType": (400, "Specified content type is not supported; send application/x-www-form-urlencoded."),
    "UnsupportedHTTPMethod": (403, "This http method is not supported."),
    "InvalidProduct.NotFound": (404, "Cannot find product according to your specified domain."),
    "InvalidAction.NotFound": (404, "Specified api is not found, please check your url and method."),
}
"""The HTTP status and message of each code that only a gateway answers (the cloud's public errors of its gateway)."""


class HttpRefusal(Exception):
    """A request that violates HTTP or a limit. The connection is closed after the answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.error = KmsError(code, message, "", status)


def refusal(code: str, message: str | None = None) -> KmsError:
    """Return the error of a gateway's code. `message` replaces its text. The connection goes on after the answer."""
    status, text = _TEXTS.get(code, (400, ""))
    return KmsError(code, text if message is None else message, "", status)
