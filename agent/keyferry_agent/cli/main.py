"""The `keyferry-agent` command: its arguments and exit codes."""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from keyferry import guard
from keyferry.arguments import socket
from keyferry.protocol.rpc import DEFAULT_SOCKET, default_socket, pem_to_der
from keyferry.stdout import complain, say, show

from .. import __version__
from ..config import validators
from ..config.gateways import Gateway
from ..config.options import DevelopmentGateway, Options, StartError
from ..crypto.ciphertext_blob import KEY_SIZES
from ..crypto.public_key import PublicKeyError, check_rsa_2048, check_sm2, fingerprint
from ..daemon.daemon import run_daemon
from ..keyring.access_keys import new_access_key_id
from ..keyring.document import KeyringError, check_alias
from ..telemetry import logging_setup
from . import check, explain, gateway, unseal
from .audit import command as audit_command
from .keyring import command as keyring_command

PROGRAM: Final = "keyferry-agent"
DONE: Final = 0
FAILED: Final = 1

_EPILOG: Final = (
    "exit codes: 0 success; 1 failure, with the reason on stderr; 2 wrong usage; 74 standard output cannot be written"
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keyferry-agent", description="The key agent of this host.", epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"keyferry-agent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="run the daemon in the foreground; its log goes to stderr", allow_abbrev=False
    )
    run.add_argument(
        "--config", type=Path, metavar="FILE", help="the configuration (TOML); without it every caller is refused"
    )
    run.add_argument("--socket", type=socket, metavar="PATH", help=f"where to listen (default {DEFAULT_SOCKET})")
    run.add_argument("--keyring", type=Path, metavar="FILE", help="the sealed keyring")
    run.add_argument(
        "--unseal",
        type=Path,
        metavar="FILE",
        help="the secret that opens it: an age or SSH identity, or a passphrase file",
    )
    run.add_argument(
        "--dev",
        action="store_true",
        help="development mode: a keyring in memory only (alias/dev, alias/dev-sm4), and full access for the current user",
    )
    run.add_argument(
        "--alias",
        action="append",
        default=[],
        type=_alias,
        metavar="ALIAS[=SPEC]",
        help="with --dev, a further key with this alias; SPEC is Aliyun_AES_256 (default) or Aliyun_SM4",
    )
    run.add_argument(
        "--gateway",
        type=_loopback,
        metavar="ADDRESS:PORT",
        help="with --dev, a gateway for the cloud's SDKs, like 127.0.0.1:8461, and an access key, which is printed",
    )
    run.set_defaults(run=_run, wrong_usage=run.error)

    unseal.add_parser(commands)
    check.add_parser(commands)

    of_public_key = commands.add_parser(
        "fingerprint", help="a public key's fingerprint, as `recipients` takes it", allow_abbrev=False
    )
    of_public_key.add_argument("file", type=Path, metavar="FILE", help="a public key: PEM, DER or Base64")
    of_public_key.set_defaults(run=_fingerprint)

    explain.add_parser(commands)
    audit_command.add_parser(commands)
    keyring_command.add_parser(commands)
    gateway.add_parser(commands)
    return parser


def _alias(text: str) -> tuple[str, str]:
    """Return an alias and the key spec of its key."""
    alias, equals, key_spec = text.partition("=")
    try:
        check_alias(alias)
    except KeyringError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if equals and key_spec not in KEY_SIZES:
        raise argparse.ArgumentTypeError(f"{key_spec!r} is not a key spec: expected {' or '.join(KEY_SIZES)}")
    return alias, key_spec or next(iter(KEY_SIZES))


def _loopback(text: str) -> str:
    """Return an address and a port that only this host can reach."""
    try:
        if not text.startswith("/") and Gateway(listen=validators.remote_address(text)).is_loopback:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a loopback address and a port, like 127.0.0.1:8461")


def _run(arguments: argparse.Namespace) -> int:
    aliases = dict(arguments.alias)
    if aliases and not arguments.dev:
        arguments.wrong_usage(
            "--alias needs --dev; `keyferry-agent keyring create-key --alias` adds a key to a keyring"
        )
    if len(aliases) < len(arguments.alias):
        arguments.wrong_usage("--alias: the same alias twice; name each alias once")
    if arguments.gateway and not arguments.dev:
        arguments.wrong_usage("--gateway needs --dev; a [[gateway]] table of the configuration opens one without it")
    logging_setup.configure()
    path = arguments.socket
    if path is None and arguments.dev and os.environ.get("KEYFERRY_SOCKET"):
        path = default_socket()  # the default of a client that is started from the same shell
    try:
        run_daemon(
            Options(
                config=arguments.config,
                socket=Path(path) if path is not None else None,
                keyring=arguments.keyring,
                unseal=arguments.unseal,
                dev=arguments.dev,
                aliases=aliases,
                gateway=DevelopmentGateway(arguments.gateway, new_access_key_id()) if arguments.gateway else None,
            )
        )
    except* StartError as errors:
        for error in errors.exceptions:
            for line in f"{PROGRAM}: {error}".splitlines():
                say(f"{logging_setup.priority(logging.ERROR)}{line}")
        return_code = FAILED
    else:
        return_code = DONE
    return return_code


def _fingerprint(arguments: argparse.Namespace) -> int:
    try:
        der = pem_to_der(arguments.file.read_bytes())
    except (OSError, ValueError) as error:
        complain(PROGRAM, f"{arguments.file}: {error}")
        return FAILED
    try:
        check_rsa_2048(der)
    except PublicKeyError as rsa:
        try:
            check_sm2(der)
        except PublicKeyError as sm2:
            complain(PROGRAM, f"{arguments.file}: data keys cannot be exported to this key: {rsa} {sm2}")
            return FAILED
    return show(PROGRAM, fingerprint(der))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own arguments), and return its exit code."""
    return guard.guarded(PROGRAM, lambda: _run_command(guard.parse(PROGRAM, _parser(), argv)))


def _run_command(arguments: argparse.Namespace) -> int:
    code: int = arguments.run(arguments)
    return code
