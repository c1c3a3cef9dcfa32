"""A gateway beside the Unix socket: the same call, signed and over HTTP, one at a time on a connection that is kept alive."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from support.gateway import (
    Credentials,
    acs3_headers,
    free_ports,
    gateway_table,
    grant_table,
    new_access_key,
    new_certificate,
    v1_parameters,
)
from support.keys import recipient
from support.sdk import PYTHON, SCRIPTS
from support.skip_unless import ROOT

from ..agent_under_test import CONTEXT, agent_starter, requests
from ..figures import Target, ratios
from ..http_load import HttpLine
from ..load import Connection, closed_loop_rate
from ..run_context import Session, Way

PART = "A gateway, one request at a time"
ACTION = "GenerateAndExportDataKey"
_UNIT = "× the socket's time"


class _Gateways:
    """The gateways of the agent: one on http, and one on https, with an access key and a certificate."""

    def __init__(self) -> None:
        self.http_port, self.https_port = free_ports(2)
        self.credentials = Credentials("", "")
        self.ca = Path()

    def tables(self, folder: Path) -> str:
        """Make an access key and a certificate, and return the tables of the configuration."""
        self.credentials = new_access_key(folder / "keyring.age")
        tls = new_certificate(folder / "tls")
        self.ca = tls / "ca.pem"
        return (
            gateway_table("plain", f"127.0.0.1:{self.http_port}")
            + gateway_table("tls", f"127.0.0.1:{self.https_port}", tls)
            + grant_table("sdk", f'access_key = "{self.credentials.access_key_id}"')
        )

    def signed(self, parameters: dict[str, str]) -> dict[str, Callable[[], bytes]]:
        """Return functions that sign a request of each scheme."""
        host = f"127.0.0.1:{self.https_port}"

        def acs3() -> bytes:
            headers = acs3_headers(self.credentials, host, ACTION, parameters)
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            target = urlencode(parameters, quote_via=quote)
            return f"POST /?{target} HTTP/1.1\r\n{lines}Content-Length: 0\r\n\r\n".encode("ascii")

        def v1() -> bytes:
            target = urlencode(v1_parameters(self.credentials, ACTION, parameters), quote_via=quote)
            return f"GET /?{target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("ascii")

        return {"ACS3": acs3, "V1": v1}


def run(session: Session) -> None:
    """Measure the socket, and gateways with both schemes on http and https; and the SDK for Python."""
    gateways = _Gateways()
    with ExitStack() as stack:
        start = stack.enter_context(agent_starter(more=gateways.tables))
        agent = stack.enter_context(start())
        line = stack.enter_context(Connection(agent.path, requests(agent.aliases)))
        parameters = {
            "KeyId": agent.aliases[0],
            "NumberOfBytes": "32",
            "EncryptionContext": json.dumps(CONTEXT),
            **recipient("RSAES_OAEP_SHA_256").params,
        }
        ways: dict[str, Way] = {"socket": partial(closed_loop_rate, line)}
        for scheme, sign in gateways.signed(parameters).items():
            for protocol, port, ca in (
                ("http", gateways.http_port, None),
                ("https", gateways.https_port, gateways.ca),
            ):
                ways[f"{protocol}, {scheme}"] = stack.enter_context(HttpLine(port, sign, ca)).rate
        if not SCRIPTS[0].missing:
            ways["SDK"] = stack.enter_context(_sdk(gateways, parameters))
        made = session.beside(ways, watched=[agent.pid])
    socket = made.pop("socket").ratios
    sdk = made.pop("SDK", None)
    for name, measured in made.items():
        target = Target("at most", 2.5) if name.startswith("https") else None
        session.add(PART, name, ratios(socket, measured.ratios), unit=_UNIT, absolute=measured.absolute, target=target)
    session.add(
        PART,
        "https, the SDK V2 for Python",
        ratios(socket, sdk.ratios) if sdk else [],
        unit=_UNIT,
        absolute=sdk.absolute if sdk else "",
        note="its own work is the difference to the line https, ACS3" if sdk else f"not measured: {SCRIPTS[0].missing}",
    )


@contextmanager
def _sdk(gateways: _Gateways, parameters: dict[str, str]) -> Iterator[Way]:
    """Run the SDK in its own environment, on this process's core."""
    typed: dict[str, Any] = {**parameters, "NumberOfBytes": 32, "EncryptionContext": CONTEXT}
    settings = {
        "access_key_id": gateways.credentials.access_key_id,
        "access_key_secret": gateways.credentials.secret,
        "host": f"127.0.0.1:{gateways.https_port}",
        "protocol": "https",
        "ca": str(gateways.ca),
    }
    process = subprocess.Popen(
        [str(PYTHON), "-W", "ignore", "-m", "foreign.sdk.timed"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        output = process.stdout
        ask = partial(print, file=process.stdin, flush=True)
        ask(json.dumps({"client": settings, "action": ACTION, "parameters": typed}))

        def rate(seconds: float) -> float:
            ask(seconds)
            return float(output.readline())

        yield rate
        process.stdin.close()
