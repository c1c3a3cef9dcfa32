"""The two signature schemes of the cloud's RPC-style APIs: which scheme a request has, and what it signs. No secrets, no I/O.

Both are computed over decoded parameters that are encoded again: SDKs sign one spelling and send another.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from keyferry.parameters import decode_base64

from .http_request import HttpRequest
from .parameters import COMMON, canonical_query
from .refusals import refusal

__all__ = ["ACS3", "VERSION_1", "Signed", "operation_parameters", "read_signature"]

VERSION_1: Final = "V1"
ACS3: Final = "ACS3"
_ACS3_HASHES: Final = {
    "ACS3-HMAC-SHA256": ("sha256", ("x-acs-content-sha256",)),
    "ACS3-HMAC-SM3": ("sm3", ("x-acs-content-sm3", "x-acs-content-sha256")),
}
"""The hash of each algorithm of the second scheme, and the headers that may have the body's hash.

The SDKs send the hash by SM3 in the header that is named after SHA-256. The cloud's documentation names the other one.
"""
_AUTHORIZATION: Final = re.compile(
    r"(ACS3-HMAC-[A-Z0-9]+) +Credential=([^,\s]+) *, *SignedHeaders=([^,\s]+) *, *Signature=([^,\s]+)", re.ASCII
)
_HEX: Final = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+", re.ASCII)
_V1_REQUIRED: Final = (
    *("Action", "Version", "AccessKeyId", "Signature", "SignatureMethod", "SignatureVersion"),
    *("SignatureNonce", "Timestamp"),
)
_ACS3_REQUIRED: Final = ("x-acs-action", "x-acs-version", "x-acs-date", "x-acs-signature-nonce")
_ALLOWED_WITH_ACS3: Final = frozenset({"RegionId", "Format"})
"""Common parameters that a request of the second scheme may have in its query."""


@dataclass(frozen=True, slots=True)
class Signed:
    """The signed values of a request, before anything was verified."""

    scheme: str
    action: str
    version: str
    access_key_id: str
    timestamp: str
    nonce: str
    token: str
    string_to_sign: str
    signature: bytes
    """The signature in the form that `encode` returns."""
    digest: str
    """The name of the hash for `hmac.digest`."""
    separator: bytes
    """The byte after the secret that belongs to the HMAC's key: `&` for version 1."""
    body_hash_fits: bool = True
    """Whether the header with the body's hash has the hash of the body."""


def read_signature(request: HttpRequest) -> Signed:
    """Return the signed values of a request. Raises `KmsError` if its scheme is unknown, or something needed is absent."""
    authorization = request.header_values("authorization")
    return _acs3(request, authorization) if authorization else _version_1(request)


def operation_parameters(request: HttpRequest, signed: Signed) -> dict[str, str]:
    """Return the parameters for the operation: all but the common ones of the request's scheme."""
    common = COMMON if signed.scheme == VERSION_1 else _ALLOWED_WITH_ACS3
    return {name: value for name, value in request.parameters.items() if name not in common}


def _version_1(request: HttpRequest) -> Signed:
    parameters = request.parameters
    if (
        parameters.get("SignatureMethod", "").upper() not in ("", "HMAC-SHA1")
        or parameters.get("SignatureVersion") not in (None, "", "1.0")
        or parameters.get("SignatureType")
    ):
        raise refusal("InvalidSignatureMethod")
    for name in _V1_REQUIRED:
        if not parameters.get(name):
            raise refusal(f"Missing{name}", f"{name} is mandatory for this action.")
    query = canonical_query((name, value) for name, value in parameters.items() if name != "Signature")
    encoded_query = query.replace("%", "%25").replace("=", "%3D").replace("&", "%26")
    return Signed(
        scheme=VERSION_1,
        action=parameters["Action"],
        version=parameters["Version"],
        access_key_id=parameters["AccessKeyId"],
        timestamp=parameters["Timestamp"],
        nonce=parameters["SignatureNonce"],
        token=parameters.get("SecurityToken", ""),
        string_to_sign=f"{request.method}&%2F&{encoded_query}",
        signature=_decoded(parameters["Signature"]),
        digest="sha1",
        separator=b"&",
    )


def _decoded(signature: str) -> bytes:
    try:
        return decode_base64(signature)
    except ValueError:
        return b""


def _acs3(request: HttpRequest, authorization: list[str]) -> Signed:
    match = _AUTHORIZATION.fullmatch(authorization[0].strip())
    algorithm = authorization[0].split(" ", 1)[0]
    if algorithm not in _ACS3_HASHES:
        raise refusal("InvalidSignatureMethod")
    if match is None or len(authorization) > 1:
        raise refusal("IncompleteSignature")
    digest, hash_headers = _ACS3_HASHES[algorithm]
    hash_header = next((name for name in hash_headers if request.header(name)), hash_headers[-1])
    names = match[3].split(";")
    if len(set(names)) != len(names) or not all(_HEADER_NAME.fullmatch(name) for name in names):
        raise refusal("IncompleteSignature")
    for name in (*_ACS3_REQUIRED, hash_header):
        if not request.header(name):
            raise refusal(f"Missing{name}", f"{name} is mandatory for this action.")
    _check_signed_headers(request, names)
    body_hash = hashlib.new(digest, request.body).hexdigest()
    canonical_request = "\n".join(
        [
            request.method,
            "/",
            canonical_query(request.query),
            *(f"{name}:{request.header(name)}" for name in names),
            "",
            match[3],
            body_hash,
        ]
    )
    hashed_request = hashlib.new(digest, canonical_request.encode("utf-8", "surrogatepass")).hexdigest()
    return Signed(
        scheme=ACS3,
        action=request.header("x-acs-action"),
        version=request.header("x-acs-version"),
        access_key_id=match[2],
        timestamp=request.header("x-acs-date"),
        nonce=request.header("x-acs-signature-nonce"),
        token=request.header("x-acs-security-token"),
        string_to_sign=f"{algorithm}\n{hashed_request}",
        signature=bytes.fromhex(match[4]) if _HEX.fullmatch(match[4]) else b"",
        digest=digest,
        separator=b"",
        body_hash_fits=request.header(hash_header).lower() == body_hash,
    )


def _check_signed_headers(request: HttpRequest, names: list[str]) -> None:
    """Raise `IncompleteSignature` unless everything that a signature has to cover is there once, and is signed.

    SignedHeaders is the client's choice. Without this check, the holder of one recorded request could exchange the date.
    """
    required = {"host", *(name for name in request.headers if name.startswith("x-acs-"))}
    if request.body and "content-type" in request.headers:
        required.add("content-type")
    if not required <= set(names) or any(len(request.header_values(name)) != 1 for name in names):
        raise refusal("IncompleteSignature")
