"""`keyferry-agent gateway certificate`: a certificate for a gateway, from an authority of its own."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from keyferry import new_files
from keyferry.arguments import whole_number
from keyferry.stdout import complain, show

from .certificates import DAYS, new_authority, new_certificate, parse_name

__all__ = ["add_parser"]

_PROGRAM: Final = "keyferry-agent"
_FAILED: Final = 1
_DEFAULT_DAYS: Final = 397
"""The most that public authorities may issue: some clients judge certificates by it."""
_READABLE: Final = 0o644
_AUTHORITY, _CERTIFICATE, _KEY = "ca.pem", "tls.pem", "tls.key"


def add_parser(commands: Any) -> None:
    """Add `gateway` and its verbs to the agent's command."""
    gateway = commands.add_parser("gateway", help="make what a gateway needs", allow_abbrev=False)
    verbs = gateway.add_subparsers(dest="verb", required=True, metavar="VERB")
    text = (
        "Make a certificate for an https gateway, and the authority that clients trust: ca.pem, tls.pem and tls.key. "
        "The authority's key is forgotten, and its constraints allow the names of this gateway only."
    )
    parser = verbs.add_parser(
        "certificate", help="make a certificate and its authority", description=text, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder for the three files; is made if missing")
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        type=_name,
        metavar="NAME",
        help="a further DNS name or IP address, besides 127.0.0.1, ::1 and localhost; may be repeated",
    )
    parser.add_argument(
        "--days",
        type=_days,
        default=_DEFAULT_DAYS,
        metavar=f"{DAYS[0]}..{DAYS[-1]}",
        help=f"days of validity (default {_DEFAULT_DAYS})",
    )
    parser.set_defaults(run=_certificate)


def _name(text: str) -> x509.DNSName | x509.IPAddress:
    try:
        return parse_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _days(text: str) -> int:
    days = whole_number(text)
    if days not in DAYS:
        raise argparse.ArgumentTypeError(f"{DAYS[0]} to {DAYS[-1]} days are allowed, not {days}")
    return days


def _certificate(arguments: argparse.Namespace) -> int:
    authority = new_authority(arguments.host, arguments.days)
    issued = new_certificate(authority, arguments.host)
    folder = arguments.folder.absolute()
    try:
        _write_new(folder, {_AUTHORITY: authority.pem, _CERTIFICATE: issued.pem, _KEY: issued.key_pem})
    except FileExistsError as error:
        complain(_PROGRAM, f"{error.filename} exists; remove it, or name another folder: certificates are not replaced")
        return _FAILED
    except OSError as error:
        complain(_PROGRAM, f"{error.filename}: {error.strerror}")
        return _FAILED
    hosts = ", ".join(f'"{name.value}"' for name in arguments.host)
    lines = [
        f"# valid until {issued.certificate.not_valid_after_utc:%Y-%m-%d}; clients trust {folder / _AUTHORITY}",
        f'certificate = "{folder / _CERTIFICATE}"',
        f'private_key = "{folder / _KEY}"',
        *([f"hosts = [{hosts}]"] if hosts else []),
    ]
    return show(_PROGRAM, "\n".join(lines))


def _write_new(folder: Path, contents: dict[str, bytes]) -> None:
    """Write all files, or none. Only the private key stays private. Raises OSError."""
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in contents]
    for path in paths:
        if path.exists():
            raise FileExistsError(None, "", str(path))
    written: list[Path] = []
    try:
        for path, content in zip(paths, contents.values(), strict=True):
            new_files.create(path, content)
            written.append(path)
            if path.name != _KEY:
                path.chmod(_READABLE)
    except BaseException:
        for path in written:
            with suppress(OSError):
                path.unlink()
        raise
