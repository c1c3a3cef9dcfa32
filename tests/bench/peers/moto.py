"""moto, which plays AWS for tests: its KMS over HTTP."""

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from support.agent import PATIENCE

from ..cpu import SERVER
from ..run_context import Way
from . import http
from .peer import Peer

__all__ = ["Moto"]

_HEADERS = {
    "Content-Type": "application/x-amz-json-1.1",
    # moto looks at the service in it, and checks no signature
    "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/kms/aws4_request, SignedHeaders=host, Signature=0",
}


class Moto(Peer):
    """`moto_server`, with its development web server in one process."""

    name = "moto KMS"
    does = (
        "HTTP over TCP on loopback, a connection for each request: a data key sealed by AES-256-GCM, returned in plaintext "
        "too. The RSA step is the client's, on its core. Not: any check of who asks, a record, protection of keys. It is a "
        "fake for tests, and in Python as the agent is"
    )

    def missing(self) -> str:
        found = all(importlib.util.find_spec(name) for name in ("moto", "flask", "flask_cors"))
        return "" if found else "moto's server is not installed (pip: moto, flask, flask-cors)"

    @contextmanager
    def running(self) -> Iterator[Mapping[str, Way]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, SERVER),  # noqa: PLW1509
        )

        def dial() -> socket.socket:
            connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection

        def ask(operation: str, body: dict[str, Any]) -> bytes:
            return http.request("POST", "/", body, {**_HEADERS, "X-Amz-Target": f"TrentService.{operation}"})

        try:
            http.wait_until_listening(dial)
            key_id = http.exchange(dial, ask("CreateKey", {}))["KeyMetadata"]["KeyId"]
            asked = ask(
                "GenerateDataKey", {"KeyId": key_id, "KeySpec": "AES_256", "EncryptionContext": {"tenant": "acme"}}
            )
            yield http.ways(dial, asked, http.wrapper(lambda answer: str(answer["Plaintext"])), stays=False)
        finally:
            server.terminate()
            server.wait()
