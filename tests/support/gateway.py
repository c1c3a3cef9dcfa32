"""Agents with gateways, and signed HTTP requests to them. The signatures share no code with the product."""

import base64
import hashlib
import hmac
import http.client
import json
import socket
import ssl
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

from keyferry_agent.cli.main import main

from .agent import PATIENCE, RunningAgent
from .keyring import change, new_keyring, printed

VERSION: Final = "2016-01-20"
UNKNOWN_ID: Final = "LTAIUnknownToEveryKeyring"
"""The ID of an access key that no keyring has."""


@dataclass(frozen=True)
class Credentials:
    """An access key; `token` only with temporary credentials."""

    access_key_id: str
    secret: str = field(repr=False)
    token: str = field(default="", repr=False)


@dataclass(frozen=True)
class Prepared:
    """A folder with all that an agent with a gateway needs, and the ports that it will listen on."""

    folder: Path
    credentials: Credentials
    http_port: int
    https_port: int

    @property
    def keyring(self) -> Path:
        """The keyring; `change` and `printed` of support.keyring change it."""
        return self.folder / "keyring.age"

    @property
    def ca(self) -> Path:
        """The certificate of the authority that clients have to trust."""
        return self.folder / "tls" / "ca.pem"

    @property
    def config(self) -> Path:
        """The agent's configuration."""
        return self.folder / "agent.toml"

    @property
    def socket(self) -> Path:
        """The agent's Unix socket."""
        return self.folder / "agent.sock"

    def port(self, protocol: str) -> int:
        """Return the port of http or https."""
        return {"http": self.http_port, "https": self.https_port}[protocol]


@dataclass(frozen=True)
class Reply:
    """An answer to one request."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def content(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return dict(json.loads(self.body))


def new_access_key(keyring: Path, *arguments: str) -> Credentials:
    """Create an access key in a keyring, with further arguments of the verb."""
    created = printed(keyring, "create-access-key", *arguments)
    return Credentials(created["AccessKeyId"], created["AccessKeySecret"], created.get("SecurityToken", ""))


def new_certificate(folder: Path, *hosts: str) -> Path:
    """Make ca.pem, tls.pem and tls.key in a folder, and return the folder."""
    names = [argument for host in hosts for argument in ("--host", host)]
    assert main(["gateway", "certificate", str(folder), *names]) == 0
    return folder


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that no process listens on. They are all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def gateway_table(name: str, listen: str, tls: Path | None = None, more: str = "") -> str:
    """Return a `[[gateway]]` table; `tls` is the folder of `new_certificate`."""
    files = f'certificate = "{tls / "tls.pem"}"\nprivate_key = "{tls / "tls.key"}"\n' if tls else ""
    return f'[[gateway]]\nname = "{name}"\nlisten = "{listen}"\n{files}{more}\n'


def grant_table(name: str, to: str, actions: str = '"kms:*"', keys: str = '"*"', more: str = "") -> str:
    """Return a `[[grant]]` table; `to` is the text of its selectors."""
    return f'[[grant]]\nname = "{name}"\nto = {{ {to} }}\nactions = [{actions}]\nkeys = [{keys}]\n{more}\n'


def prepare(folder: Path, *, limits: str = "", grants: str | None = None, more: str = "") -> Prepared:
    """Make a keyring with alias/a, alias/sm4 and an access key, a certificate, and a configuration.

    The configuration has a gateway `plain` (http) and a gateway `tls` (https). `limits`: lines of the table [limits].
    `grants`: the tables of grants; without them the access key may do everything, and so may every user on the socket.
    """
    keyring = new_keyring(folder)
    change(keyring, "create-key", "--alias", "alias/sm4", "--key-spec", "Aliyun_SM4")
    prepared = Prepared(folder, new_access_key(keyring), *free_ports(2))
    tls = new_certificate(folder / "tls")
    if grants is None:
        grants = grant_table("sdk", f'access_key = "{prepared.credentials.access_key_id}"')
        grants += grant_table("local", 'listener = "default"')
    prepared.config.write_text(
        f'keyring = "{keyring}"\nunseal = "{folder / "identity"}"\nmemory = "prefer"\n'
        + more
        + (f"[limits]\n{limits}\n" if limits else "")
        + gateway_table("plain", f"127.0.0.1:{prepared.http_port}")
        + gateway_table("tls", f"127.0.0.1:{prepared.https_port}", tls)
        + grants
    )
    return prepared


@contextmanager
def serving_gateway(prepared: Prepared) -> Iterator[RunningAgent]:
    """Run an agent with a prepared configuration."""
    with RunningAgent(["--config", str(prepared.config)], prepared.socket) as agent:
        yield agent


def encode(text: str) -> str:
    """Return the percent-encoding of RFC 3986."""
    return quote(text, safe="-_.~")


def canonical(parameters: Mapping[str, str]) -> str:
    """Return the query that both schemes sign."""
    return "&".join(f"{encode(name)}={encode(parameters[name])}" for name in sorted(parameters))


def now() -> str:
    """Return the time in the form of both schemes."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def sign_v1(secret: str, method: str, parameters: Mapping[str, str]) -> str:
    """Return the Signature of parameters that are complete but for it."""
    string_to_sign = "&".join((method, encode("/"), encode(canonical(parameters))))
    digest = hmac.new(f"{secret}&".encode(), string_to_sign.encode(), hashlib.sha1).digest()
    return base64.b64encode(digest).decode()


def v1_parameters(
    credentials: Credentials, action: str, parameters: Mapping[str, str], method: str = "GET", **other: str
) -> dict[str, str]:
    """Return all parameters of a signed request of version 1. `other`: common parameters with other values."""
    every = {
        "Action": action,
        "Version": VERSION,
        "Format": "JSON",
        "AccessKeyId": credentials.access_key_id,
        "SignatureMethod": "HMAC-SHA1",
        "SignatureVersion": "1.0",
        "SignatureNonce": str(uuid.uuid4()),
        "Timestamp": now(),
        **({"SecurityToken": credentials.token} if credentials.token else {}),
        **parameters,
        **other,
    }
    return {**every, "Signature": sign_v1(credentials.secret, method, every)}


def sign_acs3(secret: str, method: str, query: Mapping[str, str], headers: Mapping[str, str], body: bytes) -> str:
    """Return the signature over all headers that the second scheme can sign; their names are in lower case."""
    names = signed_headers(headers)
    lines = "".join(f"{name}:{headers[name].strip()}\n" for name in names)
    request = f"{method}\n/\n{canonical(query)}\n{lines}\n{';'.join(names)}\n{hashlib.sha256(body).hexdigest()}"
    string_to_sign = f"ACS3-HMAC-SHA256\n{hashlib.sha256(request.encode()).hexdigest()}"
    return hmac.new(secret.encode(), string_to_sign.encode(), hashlib.sha256).hexdigest()


def signed_headers(headers: Mapping[str, str]) -> list[str]:
    """Return the names of headers that the second scheme signs, sorted."""
    return sorted(name for name in headers if name.startswith("x-acs-") or name in ("host", "content-type"))


def acs3_headers(
    credentials: Credentials,
    host: str,
    action: str,
    query: Mapping[str, str],
    body: bytes = b"",
    method: str = "POST",
    **other: str,
) -> dict[str, str]:
    """Return all headers of a signed request of the second scheme. `other`: headers with other values, `_` for `-`."""
    headers = {
        "host": host,
        "x-acs-action": action,
        "x-acs-version": VERSION,
        "x-acs-date": now(),
        "x-acs-signature-nonce": str(uuid.uuid4()),
        "x-acs-content-sha256": hashlib.sha256(body).hexdigest(),
        **({"x-acs-security-token": credentials.token} if credentials.token else {}),
        **({"content-type": "application/x-www-form-urlencoded"} if body else {}),
        **{name.replace("_", "-"): value for name, value in other.items()},
    }
    signature = sign_acs3(credentials.secret, method, query, headers, body)
    headers["authorization"] = (
        f"ACS3-HMAC-SHA256 Credential={credentials.access_key_id},"
        f"SignedHeaders={';'.join(signed_headers(headers))},Signature={signature}"
    )
    return headers


def connect(prepared: Prepared, protocol: str = "http") -> http.client.HTTPConnection:
    """Return a connection to the http or https gateway, to be closed. It is kept alive between requests."""
    if protocol == "http":
        return http.client.HTTPConnection("127.0.0.1", prepared.http_port, timeout=PATIENCE)
    context = ssl.create_default_context(cafile=str(prepared.ca))
    return http.client.HTTPSConnection("127.0.0.1", prepared.https_port, timeout=PATIENCE, context=context)


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
) -> Reply:
    """Send one request with a Host header by default, and return its answer."""
    headers = {"host": f"{connection.host}:{connection.port}", **(headers or {})}
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    if body or method == "POST":
        connection.putheader("content-length", str(len(body)))
    connection.endheaders(body)
    with connection.getresponse() as response:
        return Reply(response.status, response.headers, response.read())


def call_v1(
    connection: http.client.HTTPConnection, credentials: Credentials, action: str, method: str = "GET", **given: str
) -> Reply:
    """Call an action with the first scheme: parameters in the query of GET, or in the form of POST."""
    text = urlencode(v1_parameters(credentials, action, given, method))
    if method == "GET":
        return exchange(connection, "GET", f"/?{text}")
    return exchange(
        connection, "POST", "/", {"content-type": "application/x-www-form-urlencoded"}, text.encode("ascii")
    )


def call_acs3(
    connection: http.client.HTTPConnection, credentials: Credentials, action: str, method: str = "POST", **given: str
) -> Reply:
    """Call an action with the second scheme and its parameters in the query, as the SDKs do."""
    host = f"{connection.host}:{connection.port}"
    headers = acs3_headers(credentials, host, action, given, method=method)
    return exchange(connection, method, f"/?{urlencode(given, quote_via=quote)}" if given else "/", headers)
