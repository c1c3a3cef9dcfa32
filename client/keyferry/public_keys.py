"""The public key of a cryptographic module in the forms that people keep it in: DER, PEM, and Base64 of the DER.

Only `to_der` recognises these forms. Its messages name the form that was found, and the command that converts it. The agent
decides whether the key is valid.
"""

import json
import re
from base64 import b64decode
from typing import Final

from . import content

__all__ = ["to_der"]

_BLOCK: Final = re.compile(rb"-----BEGIN PUBLIC KEY-----\s(.*)\s-----END PUBLIC KEY-----", re.DOTALL)
_OBJECT: Final = b"{"
_BEGIN: Final = b"-----BEGIN"

_ADVICE: Final = {
    content.PKCS1_PUBLIC_KEY: "convert it: openssl rsa -RSAPublicKey_in -in FILE -pubout",
    content.CERTIFICATE: "extract its public key: openssl x509 -in FILE -noout -pubkey",
    content.SSH_PUBLIC_KEY: "convert an RSA key: ssh-keygen -e -m PKCS8 -f FILE",
    content.RECIPIENT: "age recipients seal keyrings, and a data key is not exported to one",
    content.AGE_FILE: "name the file of the public key, which `keyferry module init` prints as PublicKeyBlob",
}
_PRIVATE: Final = "it is secret: a PUBLIC KEY block is expected, as openssl pkey -in FILE -pubout writes it"
_EXPECTED: Final = "PEM, DER, or Base64 of the DER of a SubjectPublicKeyInfo is expected"


def to_der(data: bytes) -> bytes:
    """Return the DER of a public key in PEM, DER, Base64, or the JSON of `keyferry module init`.

    Other bytes are returned unchanged: the agent refuses them. Raises ValueError, whose message names the kind of the bytes,
    and contains nothing of them.
    """
    encoding = content.byte_order_mark(data)
    if encoding is not None:
        raise ValueError(f"it begins with a byte order mark ({encoding}); save it without one")
    resemblance = content.resemblance(data)
    if resemblance is None:
        return _from_json(data) if data.lstrip().startswith(_OBJECT) else data
    if resemblance.kind in content.SECRETS:
        raise ValueError(f"it looks like {resemblance}; {_PRIVATE}")
    if resemblance.kind == content.PUBLIC_KEY:
        return _der_of_public_key(data)
    raise ValueError(f"it looks like {resemblance}; {_ADVICE.get(resemblance.kind, _EXPECTED)}")


def _from_json(data: bytes) -> bytes:
    """Return the DER in the output of `keyferry module init`. Raises ValueError for any other JSON."""
    try:
        der = content.base64_text(json.loads(data)["PublicKeyBlob"].encode())
    except (ValueError, LookupError, AttributeError, RecursionError):
        der = b""
    if content.der_kind(der) != content.PUBLIC_KEY:
        raise ValueError(f"it begins as JSON does, and has no public key as its PublicKeyBlob; {_EXPECTED}")
    return der


def _der_of_public_key(data: bytes) -> bytes:
    if _BEGIN not in data:
        return data if content.der_kind(data) else content.base64_text(data)
    text = data.strip()
    if not text.startswith(_BEGIN):
        raise ValueError("it has text before -----BEGIN PUBLIC KEY-----; remove the text")
    block = _BLOCK.fullmatch(text)
    if block is None or _BEGIN in block.group(1):
        raise ValueError("expected one PUBLIC KEY block (a SubjectPublicKeyInfo) in the PEM, and nothing after it")
    der = b64decode(b"".join(block.group(1).splitlines()), validate=True)
    if content.der_kind(der) not in (None, content.PUBLIC_KEY):
        raise ValueError(f"its PUBLIC KEY block holds {content.der_kind(der)}; {_EXPECTED}")
    return der
