"""Parameters of an HTTP request: from query and form to names and values, and to an operation's parameters.

Percent-encoding is decoded and encoded run by run: character by character, a query of 74 KB would take 40 ms of the event loop.
"""

import re
from collections.abc import Iterable
from typing import Any, Final

from keyferry.errors import KmsError, invalid_parameter, kms_error
from keyferry.operations import OPERATIONS

__all__ = ["COMMON", "MAX_PARAMETERS", "canonical_query", "decode_form", "percent_encode", "to_operation"]

COMMON: Final = frozenset(
    {
        *("Action", "Version", "Format", "RegionId", "AccessKeyId", "Signature", "SignatureMethod"),
        *("SignatureVersion", "SignatureType", "SignatureNonce", "Timestamp", "SecurityToken"),
    }
)
"""Parameters of every request of signature version 1, which no operation receives."""
MAX_PARAMETERS: Final = 64
"""Parameters of a request, common ones included. An operation has at most eight of its own."""
_NOT_SERVED: Final = frozenset({"GetAgentStatus", "GetAgentHealth"})
"""Operations of the agent that the cloud does not have."""
_CLOUD_ACTIONS: Final = frozenset(
    """
    AsymmetricDecrypt AsymmetricEncrypt AsymmetricSign AsymmetricVerify CancelKeyDeletion CertificatePrivateKeySign
    CertificatePublicKeyEncrypt CertificatePrivateKeyDecrypt CertificatePublicKeyVerify ConnectKmsInstance CreateAlias
    CreateApplicationAccessPoint CreateCertificate CreateClientKey CreateKey CreateKeyVersion CreateNetworkRule
    CreatePolicy CreateSecret DeleteAlias DeleteApplicationAccessPoint DeleteCertificate DeleteClientKey
    DeleteKeyMaterial DeleteNetworkRule DeletePolicy DeleteSecret DescribeAccountKmsStatus
    DescribeApplicationAccessPoint DescribeCertificate DescribeKeyVersion DescribeNetworkRule DescribePolicy
    DescribeRegions DescribeSecret DisableKey EnableKey ExportCertificate GenerateMac GetCertificate GetClientKey
    GetDefaultKmsInstance GetKeyPolicy GetKmsInstance GetParametersForImport GetPublicKey GetRandomPassword
    GetSecretPolicy GetSecretValue ImportCertificate ImportEncryptionCertificate ImportKeyMaterial ListAliasesByKeyId
    ListApplicationAccessPoints ListCertificates ListClientKeys ListKmsInstances ListNetworkRules ListPolicies
    ListResourceTags ListSecrets ListSecretVersionIds ListTagResources OpenKmsService PutSecretValue ReleaseKmsInstance
    RestoreSecret RotateSecret ScheduleKeyDeletion SetDeletionProtection SetKeyPolicy SetSecretPolicy TagResource
    TagResources UntagResource UntagResources UpdateAlias UpdateApplicationAccessPoint UpdateCertificateStatus
    UpdateKeyDescription UpdateKmsInstanceBindVpc UpdateNetworkRule UpdatePolicy UpdateRotationPolicy UpdateSecret
    UpdateSecretRotationPolicy UpdateSecretVersionStage UploadCertificate VerifyMac
    """.split()  # noqa: SIM905 - the list would have ninety lines
)
"""Actions of the cloud's KMS, version 2016-01-20, that the agent does not have."""
_RESERVED: Final = re.compile(rb"[^A-Za-z0-9\-_.~]+")
_ESCAPES: Final = re.compile(rb"(?:%[0-9A-Fa-f]{2})+")
_BROKEN_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_INTEGER: Final = re.compile(r"[0-9]{1,10}", re.ASCII)


def percent_encode(text: str) -> str:
    """Return the percent-encoding of a text's UTF-8: all but `A-Z a-z 0-9 - _ . ~`, in upper-case hex (RFC 3986)."""
    return _RESERVED.sub(_escape, text.encode("utf-8", "surrogatepass")).decode("ascii")


def _escape(match: re.Match[bytes]) -> bytes:
    return b"%" + match[0].hex("%").upper().encode("ascii")


def decode_form(text: bytes) -> list[tuple[str, str]]:
    """Return the names and values of a query or of an `application/x-www-form-urlencoded` body, in their order.

    Raises `InvalidParameter` for a broken escape, bytes that are not UTF-8, and more than `MAX_PARAMETERS` pairs.
    """
    pieces = [piece for piece in text.split(b"&", MAX_PARAMETERS + 1) if piece]
    if len(pieces) > MAX_PARAMETERS or text.count(b"&") > 2 * MAX_PARAMETERS:
        raise kms_error("InvalidParameter", f"The request has more than {MAX_PARAMETERS} parameters.")
    pairs = []
    for piece in pieces:
        name, _, value = piece.partition(b"=")
        pairs.append((_decode(name), _decode(value)))
    return pairs


def _decode(text: bytes) -> str:
    if b"+" in text:
        text = text.replace(b"+", b" ")
    if b"%" in text:
        if _BROKEN_ESCAPE.search(text):
            raise kms_error("InvalidParameter", "A percent-encoding is broken.")
        text = _ESCAPES.sub(lambda match: bytes.fromhex(match[0].replace(b"%", b"").decode()), text)
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise kms_error("InvalidParameter", "A name or value is not UTF-8.") from None


def merged(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the pairs as a dictionary. Raises `InvalidParameter` for a name that occurs twice, and for too many names."""
    parameters: dict[str, str] = {}
    for name, value in pairs:
        if name in parameters:
            raise invalid_parameter(shown(name), "it is there twice.")
        parameters[name] = value
    if len(parameters) > MAX_PARAMETERS:
        raise kms_error("InvalidParameter", f"The request has more than {MAX_PARAMETERS} parameters.")
    return parameters


def shown(name: str) -> str:
    """Return a parameter's name for a message."""
    return ascii(name[:40])[1:-1]


def canonical_query(parameters: Iterable[tuple[str, str]]) -> str:
    """Return the encoded parameters, sorted by their names, as both signature schemes sign them."""
    return "&".join(f"{percent_encode(name)}={percent_encode(value)}" for name, value in sorted(parameters))


def to_operation(action: str, parameters: dict[str, str]) -> dict[str, Any]:
    """Return an operation's own parameters for `handlers.prepare`: texts, and integers where the API has them.

    An empty value counts as absent. Raises `InvalidAction.NotFound`, `UnsupportedOperation` or `InvalidParameter`.
    """
    operation = None if action in _NOT_SERVED else OPERATIONS.get(action)
    if operation is None:
        raise _unknown(action)
    values: dict[str, Any] = {}
    for name, text in parameters.items():
        if not text:
            continue
        parameter = operation.parameters.get(name)
        is_integer = parameter is not None and parameter.integer
        if is_integer and not _INTEGER.fullmatch(text):
            raise invalid_parameter(name, "an integer is expected.")
        values[name] = int(text) if is_integer else text
    return values


def _unknown(action: str) -> KmsError:
    return kms_error("UnsupportedOperation" if action in _CLOUD_ACTIONS else "InvalidAction.NotFound")
