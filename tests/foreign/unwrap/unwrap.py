"""Unwraps an ExportedDataKey with the `cryptography` package, for an application without keyferry.

    python unwrap.py KEY.der RSAES_OAEP_SHA_256|RSAES_OAEP_SHA_1 < ExportedDataKey

KEY.der is the private key as PKCS#8; the output is the data key in Base64.
"""

# [shown in PROTOCOL.md]
import base64

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

OAEP_HASHES = {"RSAES_OAEP_SHA_256": hashes.SHA256(), "RSAES_OAEP_SHA_1": hashes.SHA1()}


def unwrap(key: rsa.RSAPrivateKey, algorithm: str, exported_data_key: str) -> bytes:
    digest = OAEP_HASHES[algorithm]
    oaep = padding.OAEP(mgf=padding.MGF1(digest), algorithm=digest, label=None)
    return key.decrypt(base64.b64decode(exported_data_key), oaep)


# [end]

if __name__ == "__main__":
    import sys
    from pathlib import Path

    from cryptography.hazmat.primitives.serialization import load_der_private_key

    private_key = load_der_private_key(Path(sys.argv[1]).read_bytes(), None)
    assert isinstance(private_key, rsa.RSAPrivateKey)
    print(base64.b64encode(unwrap(private_key, sys.argv[2], sys.stdin.read())).decode())
