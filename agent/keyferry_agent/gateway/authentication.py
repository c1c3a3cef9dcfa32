"""Authentication of a signed request: the checks in the order of their answers, from the signature to the nonce.

A caller without the secret learns only whether an access key ID exists, and that a clock is off.
"""

import hmac
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from keyferry.errors import invalid_parameter

from ..keyring.keyring import AccessKey, Keyring
from .nonces import Nonces, Verdict
from .refusals import refusal
from .signatures import Signed

__all__ = ["API_VERSION", "XML", "check_freshness", "check_signature", "response_format"]

API_VERSION: Final = "2016-01-20"
_TIMESTAMP: Final = re.compile(r"(\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2})(\.\d{1,9})?Z", re.ASCII)
_MAX_NONCE_LENGTH: Final = 128
JSON: Final = "JSON"
XML: Final = "XML"


def response_format(parameter: str, accept: str) -> str:
    """Return the format of a request's answer: "JSON", "XML", or an empty text for a Format that is neither.

    The parameter decides, and without it the Accept header.
    """
    if parameter:
        return parameter.upper() if parameter.upper() in (JSON, XML) else ""
    return XML if "xml" in accept.lower() and "json" not in accept.lower() else JSON


def check_signature(signed: Signed, keyring: Keyring) -> tuple[AccessKey, int]:
    """Return the access key that signed a request, and the request's timestamp in seconds since 1970. Raises `KmsError`.

    The order of the checks decides which of several faults is answered.
    """
    if signed.version != API_VERSION:
        raise refusal("InvalidVersion")
    signed_at = _seconds(signed.timestamp)
    access_key = keyring.access_keys.get(signed.access_key_id)
    if access_key is None:
        raise refusal("InvalidAccessKeyId.NotFound")
    if not _is_signed_by(access_key, signed):
        # A client of the cloud splits this message at its only colon, and compares the rest with its own string.
        raise refusal(
            "SignatureDoesNotMatch",
            "Specified signature is not matched with our calculation. server string to sign is:"
            f"{signed.string_to_sign}",
        )
    return access_key, signed_at


def check_freshness(
    signed: Signed,
    access_key: AccessKey,
    signed_at: int,
    nonces: Nonces,
    clock: Callable[[], float] = time.time,
) -> None:
    """Raise `KmsError` unless an access key is enabled, its token is right, and the request is recent and new."""
    if not access_key.description.enabled:
        raise refusal("Forbidden.AccessKey")
    _check_token(access_key, signed.token)
    if len(signed.nonce) > _MAX_NONCE_LENGTH:
        raise invalid_parameter("SignatureNonce", f"it has more than {_MAX_NONCE_LENGTH} characters.")
    verdict = nonces.use(access_key.description.access_key_id, signed.nonce, signed_at, clock())
    if verdict == Verdict.EXPIRED:
        raise refusal("InvalidTimeStamp.Expired")
    if verdict == Verdict.USED:
        raise refusal("SignatureNonceUsed")


def _seconds(timestamp: str) -> int:
    match = _TIMESTAMP.fullmatch(timestamp)
    try:
        if match is None:
            raise ValueError
        return int(datetime.fromisoformat(match[1]).replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise refusal("InvalidTimeStamp.Format") from None


def _is_signed_by(access_key: AccessKey, signed: Signed) -> bool:
    """Return whether a signature is the HMAC under an access key's secret. Compares in constant time, as bytes.

    The one-shot function of `hmac` takes the secret as a view, and leaves no copy of it.
    """
    message = signed.string_to_sign.encode("utf-8", "surrogatepass")
    with access_key.secret.lend() as secret:
        key = secret if signed.separator else secret[:-1]
        try:
            expected = hmac.digest(key, message, signed.digest)
        finally:
            if key is not secret:
                key.release()
    return hmac.compare_digest(expected, signed.signature) and signed.body_hash_fits


def _check_token(access_key: AccessKey, token: str) -> None:
    if access_key.token is None:
        if token:
            raise refusal("InvalidSecurityToken.Malformed")
        return
    if not token:
        raise refusal("MissingSecurityToken", "SecurityToken is mandatory for this action.")
    with access_key.token.lend() as expected:
        is_right = hmac.compare_digest(expected, token.encode("utf-8", "surrogatepass"))
    if not is_right:
        raise refusal("InvalidSecurityToken.Malformed")
