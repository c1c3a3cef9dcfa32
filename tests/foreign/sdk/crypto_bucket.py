"""oss2's CryptoBucket with AliKMSProvider: objects that this process encrypts with data keys of a gateway.

`python -m foreign.sdk.crypto_bucket` reads one line of JSON: `host` (ADDRESS:PORT of an https gateway), `key`,
`access_key_id`, `access_key_secret`, and optionally `passphrase`. OSS is a server in this process, which keeps the objects as
they arrive. ALIBABA_CLOUD_CA_BUNDLE names the authority of the gateway. The output has
whether the plaintexts came back, and the names of the stored metadata.
"""

import json
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import oss2
from aliyunsdkcore.profile import region_provider
from oss2.crypto import AliKMSProvider

REGION = "cn-hangzhou"
STORED: dict[str, tuple[dict[str, str], bytes]] = {}
"""Headers and content of each object, by its path."""


class Storage(BaseHTTPRequestHandler):
    """A small OSS: PUT stores an object with its metadata; GET and HEAD return both, and GET a part of it."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        metadata = {
            name.lower(): value for name, value in self.headers.items() if name.lower().startswith("x-oss-meta-")
        }
        STORED[self.path] = (metadata, self._body())
        self._answer(HTTPStatus.OK, {"ETag": '"1"'}, b"")

    def do_GET(self) -> None:
        metadata, content = STORED[self.path]
        wanted = self.headers.get("range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            extent = {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"}
            self._answer(HTTPStatus.PARTIAL_CONTENT, {**metadata, **extent}, part)
        else:
            self._answer(HTTPStatus.OK, metadata, content)

    do_HEAD = do_GET  # noqa: N815

    def _body(self) -> bytes:
        if "content-length" in self.headers:
            return self.rfile.read(int(self.headers["content-length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: HTTPStatus, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "x-oss-request-id": "1", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Write nothing to standard error."""


def bucket(asked: dict[str, Any], endpoint: str) -> oss2.CryptoBucket:
    """Return a bucket with a key provider of its own."""
    region_provider.modify_point("Kms", REGION, asked["host"])
    names = asked["access_key_id"], asked["access_key_secret"]
    provider = AliKMSProvider(*names, REGION, asked["key"], passphrase=asked.get("passphrase"))
    return oss2.CryptoBucket(oss2.Auth("storage", "of this process"), endpoint, "bucket", crypto_provider=provider)


def main() -> None:
    """Store objects of several sizes, and read them back with another provider: whole, and one in part."""
    asked = json.loads(sys.stdin.readline())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    objects = {"empty": b"", "short": b"an object\n", "long": bytes(range(256)) * 1024}
    outcome: dict[str, Any] = {}
    try:
        writer, reader = bucket(asked, endpoint), bucket(asked, endpoint)
        for name, content in objects.items():
            writer.put_object(name, content)
        outcome["read"] = {name: reader.get_object(name).read() == content for name, content in objects.items()}
        part = reader.get_object("long", byte_range=(1000, 2999)).read()
        outcome["part"] = part == objects["long"][1000:3000]
        outcome["leaked"] = [name for name, (_, content) in STORED.items() if b"an object" in content]
        outcome["stored"] = {path: sorted(metadata) for path, (metadata, _) in STORED.items()}
    except oss2.exceptions.OssError as error:
        outcome["error"] = {"Code": error.code, "HttpStatus": error.status, "Message": error.message}
    server.shutdown()
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
