"""oss2's CryptoBucket with AliKMSProvider: objects that this process encrypts with data keys of a gateway.

`python -m foreign.sdk.crypto_bucket` reads one line of JSON: `host` (ADDRESS:PORT of an https gateway), `oss` (the URL of a
storage), `key`, `access_key_id`, `access_key_secret`, and optionally `passphrase`. ALIBABA_CLOUD_CA_BUNDLE names the authority
of the gateway. The output has whether the plaintexts came back.
"""

import json
import sys
from typing import Any

import oss2
from aliyunsdkcore.profile import region_provider
from oss2.crypto import AliKMSProvider

REGION = "cn-hangzhou"
OBJECTS = {"empty": b"", "short": b"an object\n", "long": bytes(range(256)) * 1024}


def bucket(asked: dict[str, Any]) -> oss2.CryptoBucket:
    """Return a bucket with a key provider of its own."""
    region_provider.modify_point("Kms", REGION, asked["host"])
    names = asked["access_key_id"], asked["access_key_secret"]
    provider = AliKMSProvider(*names, REGION, asked["key"], passphrase=asked.get("passphrase"))
    auth = oss2.Auth("of the storage", "and its secret")
    return oss2.CryptoBucket(auth, asked["oss"], "bucket", crypto_provider=provider)


def main() -> None:
    """Store objects of several sizes, and read them back with another provider: whole, and one in part."""
    asked = json.loads(sys.stdin.readline())
    outcome: dict[str, Any] = {}
    try:
        writer, reader = bucket(asked), bucket(asked)
        for name, content in OBJECTS.items():
            writer.put_object(name, content)
        outcome["read"] = {name: reader.get_object(name).read() == content for name, content in OBJECTS.items()}
        part = reader.get_object("long", byte_range=(1000, 2999)).read()
        outcome["part"] = part == OBJECTS["long"][1000:3000]
    except oss2.exceptions.OssError as error:
        outcome["error"] = {"Code": error.code, "HttpStatus": error.status, "Message": error.message}
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
