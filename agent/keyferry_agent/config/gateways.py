"""The `[[gateway]]` tables of the configuration: listeners that speak the cloud's API over HTTP."""

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from keyferry import private_files

from . import validators
from .table import ConfigTable

__all__ = ["CertificateError", "Gateway", "certificate_context", "certificate_problems", "gateway_of", "problems"]

DEFAULT_MODE: Final = 0o660


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway. `listen`: ADDRESS:PORT, or the path of a Unix socket, whose file has `mode`, `uid` and `gid`.

    `certificate` and `private_key` are both set, for https, or both None. `hosts`: further values of Host.
    """

    name: str = ""
    listen: str = ""
    certificate: Path | None = None
    private_key: Path | None = None
    hosts: tuple[str, ...] = ()
    expose: bool = False
    mode: int = DEFAULT_MODE
    uid: int | None = None
    gid: int | None = None

    @property
    def is_unix(self) -> bool:
        """Whether the gateway listens on a Unix socket."""
        return self.listen.startswith("/")

    @property
    def path(self) -> Path:
        """The path of a gateway on a Unix socket."""
        return Path(self.listen)

    @property
    def address(self) -> tuple[str, int]:
        """The IP address and the port of a gateway that is not on a Unix socket."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def url(self) -> str:
        """The gateway's URL, for the log."""
        return f"{'https' if self.certificate else 'http'}://{self.listen}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach the gateway."""
        return self.is_unix or ip_address(self.address[0]).is_loopback

    @property
    def files(self) -> list[Path]:
        """The files of a gateway that speaks https."""
        return [path for path in (self.certificate, self.private_key) if path is not None]


def gateway_of(table: ConfigTable) -> Gateway:
    """Return the gateway of a `[[gateway]]` table, and add the table's problems to it."""
    defaults = Gateway()
    for required_name in ("name", "listen"):
        if not table.has(required_name):
            table.add_problem(required_name, "missing")
    gateway = Gateway(
        name=table.get("name", "a name", validators.string, ""),
        listen=table.get(
            "listen", 'an absolute path, or an address like "127.0.0.1:8461"', validators.remote_address, ""
        ),
        certificate=table.get("certificate", "the path of a PEM file", validators.path, None),
        private_key=table.get("private_key", "the path of a PEM file", validators.path, None),
        hosts=table.get("hosts", "a list of host names, without ports", _hosts, ()),
        expose=table.get("expose", "true or false", validators.boolean, defaults.expose),
        mode=table.get("mode", 'an octal mode as text, like "0660"', validators.mode, defaults.mode),
        uid=table.get("user", "a user of this host, by name or number", validators.uid, None),
        gid=table.get("group", "a group of this host, by name or number", validators.gid, None),
    )
    table.check_unknown()
    if (gateway.certificate is None) != (gateway.private_key is None):
        table.add_problem("certificate", "certificate and private_key go together: set both for https, or neither")
    if gateway.listen:
        _check_exposure(table, gateway)
    return gateway


def _check_exposure(table: ConfigTable, gateway: Gateway) -> None:
    if not gateway.is_unix and any(table.has(name) for name in ("mode", "user", "group")):
        table.add_problem("listen", "mode, user and group are for a Unix socket; leave them out")
    if gateway.is_loopback:
        if gateway.expose:
            table.add_warning("expose", f"has no effect: only this host can reach {gateway.listen}")
    elif not gateway.expose:
        table.add_problem(
            "listen", f"{gateway.listen} is not a loopback address; set expose = true to serve other hosts"
        )
    elif gateway.certificate is None:
        table.add_problem(
            "listen", f"{gateway.listen} would serve other hosts over http; set certificate and private_key"
        )
    else:
        table.add_warning("expose", f"other hosts can reach {gateway.listen}; only signatures protect it from them")


def _hosts(value: Any) -> tuple[str, ...]:
    hosts = validators.list_of(validators.HOST, "host name")(value)
    return tuple(host.lower() for host in hosts)


class CertificateError(Exception):
    """A certificate or its key cannot be used. The message names the file, the fault and a remedy."""


def certificate_context(gateway: Gateway) -> ssl.SSLContext | None:
    """Return the TLS context of a gateway, or None if it speaks http. Reads files. Raises `CertificateError`."""
    if gateway.certificate is None or gateway.private_key is None:
        return None
    if faults := private_files.problems(gateway.private_key, secret=True):
        raise CertificateError("; ".join(faults))
    from cryptography import x509  # noqa: PLC0415 - most agents have no certificate, and it takes a tenth of their start

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        certificates = x509.load_pem_x509_certificates(gateway.certificate.read_bytes())
        context.load_cert_chain(gateway.certificate, gateway.private_key, password=_no_password)
    except ssl.SSLError as error:
        raise CertificateError(
            f"{gateway.certificate}: does not fit {gateway.private_key}, or one of them is not PEM ({error.reason}); "
            "run `keyferry-agent gateway certificate`"
        ) from None
    except OSError as error:
        raise CertificateError(f"{error.filename or gateway.certificate}: {error.strerror}") from None
    except ValueError:
        raise CertificateError(f"{gateway.certificate}: not a PEM certificate") from None
    expiry = certificates[0].not_valid_after_utc
    if expiry <= datetime.now(UTC):
        raise CertificateError(
            f"{gateway.certificate}: expired at {expiry:%Y-%m-%dT%H:%M:%SZ}; run `keyferry-agent gateway certificate`"
        )
    return context


def _no_password() -> str:
    """Return a password for an encrypted key: OpenSSL would otherwise ask for it on the terminal."""
    return ""


def problems(gateways: Sequence[Gateway], names: Sequence[str], paths: Sequence[str]) -> list[tuple[str, str]]:
    """Return problems between gateways and other sockets, each with the setting's name.

    `names` and `paths`: those of the listeners and of other sockets.
    """
    faults = []
    for attribute, taken in (("name", list(names)), ("listen", list(paths))):
        for gateway in gateways:
            value = getattr(gateway, attribute)
            if value and value in taken:
                faults.append(("gateway", f"another listener has the {attribute} {value}; choose another one"))
            taken.append(value)
    return faults


def certificate_problems(gateways: Sequence[Gateway]) -> list[str]:
    """Return one message for each certificate that cannot be used, of those whose files are on this host."""
    messages = []
    for gateway in gateways:
        if all(path.exists() for path in gateway.files):
            try:
                certificate_context(gateway)
            except CertificateError as error:
                messages.append(f"gateway {gateway.name!r}: {error}")
    return messages
