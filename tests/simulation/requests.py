"""The requests of a simulated client: any operation, of any key, valid and invalid."""

import random
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from keyferry.parameters import encode_base64

from . import fixtures
from .fixtures import Blob

__all__ = ["GeneratedRequest", "random_request"]


class GeneratedRequest(NamedTuple):
    """One request. Fields that its operation does not use have their defaults."""

    method: str
    params: Mapping[str, Any]
    alias: str = ""
    context: Mapping[str, str] = {}
    blob: Blob | None = None
    to: str = ""
    """The WrappingAlgorithm of the recipient."""
    size: int = 32
    plaintext: bytes = b""
    destination_context: Mapping[str, str] = {}
    dry: bool = False
    always: str = ""
    """The code of a refusal that does not depend on who asks when."""


_METHODS: Final = {
    "GenerateAndExportDataKey": 6,
    "ExportDataKey": 4,
    "GenerateDataKey": 3,
    "GenerateDataKeyWithoutPlaintext": 3,
    "Encrypt": 4,
    "Decrypt": 4,
    "ReEncrypt": 3,
    "DescribeKey": 2,
    "ListKeys": 1,
    "ListAliases": 1,
    "GetAgentStatus": 2,
    "Nonsense": 1,
}
_PLAIN: Final = ("ListKeys", "ListAliases", "GetAgentStatus", "Nonsense")
_OF_A_BLOB: Final = ("ExportDataKey", "Decrypt", "ReEncrypt")
_EXPORTS: Final = ("GenerateAndExportDataKey", "ExportDataKey")
_ALIASES: Final = ("alias/orders",) * 4 + ("alias/pay", "alias/off", "alias/going", "alias/none")
_RECIPIENTS: Final = ("RSAES_OAEP_SHA_256", "RSAES_OAEP_SHA_256", "RSAES_OAEP_SHA_1", "SM2PKE", "SM2PKE")


def random_request(rng: random.Random, *, slow: bool = False) -> GeneratedRequest:
    """Any request; or one that takes a thread."""
    if slow:
        params = {"KeyId": "alias/orders", **fixtures.recipients()["SM2PKE"].params}
        return GeneratedRequest("GenerateAndExportDataKey", params, "alias/orders", to="SM2PKE")
    ask = GeneratedRequest(rng.choices([*_METHODS], [*_METHODS.values()])[0], {})
    if ask.method == "Nonsense":
        return ask._replace(always="InvalidAction.NotFound")
    ask = _of_a_blob(ask, rng) if ask.method in _OF_A_BLOB else _of_a_key(ask, rng)
    if ask.method in _EXPORTS:
        to = rng.choice(_RECIPIENTS)
        ask = ask._replace(to=to, params={**ask.params, **fixtures.recipients()[to].params})
    if ask.method not in ("DescribeKey", *_PLAIN) and rng.random() < 0.06:
        ask = ask._replace(dry=True, params={**ask.params, "DryRun": True})
    if ask.method != "GetAgentStatus" and rng.random() < 0.04:
        ask = ask._replace(always="InvalidParameter", params={**ask.params, "EncryptoinContext": "x"})
    return ask


def _of_a_blob(ask: GeneratedRequest, rng: random.Random) -> GeneratedRequest:
    blob = rng.choice(fixtures.blobs())
    context = dict(blob.context if rng.random() < 0.9 else rng.choice(fixtures.CONTEXTS))
    params: dict[str, Any] = {"CiphertextBlob": blob.blob if rng.random() < 0.3 else encode_base64(blob.blob)}
    if context:
        params["SourceEncryptionContext" if ask.method == "ReEncrypt" else "EncryptionContext"] = context
    ask = ask._replace(blob=blob, context=context, params=params)
    if ask.method == "ReEncrypt":
        alias, to = rng.choice(_ALIASES), rng.choice(fixtures.CONTEXTS)
        params |= {"DestinationKeyId": alias, "DestinationEncryptionContext": to}
        ask = ask._replace(alias=alias, destination_context=to)
    return ask


def _of_a_key(ask: GeneratedRequest, rng: random.Random) -> GeneratedRequest:
    if ask.method in _PLAIN:
        return ask
    alias, context, size = rng.choice(_ALIASES), rng.choice(fixtures.CONTEXTS), rng.choice((1, 16, 32, 64))
    params: dict[str, Any] = {"KeyId": alias}
    if ask.method == "DescribeKey":
        return ask._replace(alias=alias, params=params)
    if context:
        params["EncryptionContext"] = context
    if ask.method != "Encrypt":
        return ask._replace(alias=alias, context=context, size=size, params={**params, "NumberOfBytes": size})
    plaintext = rng.randbytes(rng.choice((1, 32, 900)))
    params["Plaintext"] = encode_base64(plaintext)
    return ask._replace(alias=alias, context=context, plaintext=plaintext, params=params)
