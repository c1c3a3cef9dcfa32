"""The `keyferry-agent` command: its arguments and exit codes. What it does is elsewhere."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from keyferry import private_files
from keyferry.exchange import DEFAULT_SOCKET, pem_to_der

from . import __version__, explain, log
from .audit import command as audit_command
from .crypto.public_key import PublicKeyError, check_rsa_2048, check_sm2, fingerprint
from .keyring import command as keyring_command
from .options import Options, StartError
from .run import daemon
from .settings import Settings, examine

DONE: Final = 0
FAILED: Final = 1

_EPILOG: Final = "exit codes: 0 done; 1 it could not be done, and why is on stderr; 2 usage"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keyferry-agent", description="The key agent of this host.", epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"keyferry-agent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="the daemon, in the foreground; its log is on stderr", allow_abbrev=False)
    run.add_argument(
        "--config", type=Path, metavar="FILE", help="the configuration (TOML); without it nobody is granted anything"
    )
    run.add_argument("--socket", type=Path, metavar="PATH", help=f"where to listen (default {DEFAULT_SOCKET})")
    run.add_argument("--keyring", type=Path, metavar="FILE", help="the sealed keyring")
    run.add_argument(
        "--unseal", type=Path, metavar="FILE", help="what opens it: an age or SSH identity, or a passphrase file"
    )
    run.add_argument(
        "--dev",
        action="store_true",
        help="for trying out: a keyring that lives only in memory (alias/dev, alias/dev-sm4), everything granted to you",
    )
    run.set_defaults(run=_run)

    check = commands.add_parser("check", help="say everything that is wrong with a configuration", allow_abbrev=False)
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(run=_check)

    pin = commands.add_parser("fingerprint", help="a public key's pin, as `recipients` takes it", allow_abbrev=False)
    pin.add_argument("file", type=Path, metavar="FILE", help="a public key, PEM or DER")
    pin.set_defaults(run=_fingerprint)

    explain.add_parser(commands)
    audit_command.add_parser(commands)
    keyring_command.add_parser(commands)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    log.configure()
    socket = arguments.socket
    if socket is None and arguments.dev and os.environ.get("KEYFERRY_SOCKET"):
        socket = Path(os.environ["KEYFERRY_SOCKET"])  # where the client, started from the same shell, looks for it
    try:
        daemon(
            Options(
                config=arguments.config,
                socket=socket,
                keyring=arguments.keyring,
                unseal=arguments.unseal,
                dev=arguments.dev,
            )
        )
    except* StartError as errors:
        for error in errors.exceptions:
            for line in f"keyferry-agent: {error}".splitlines():
                print(f"{log.priority(logging.ERROR)}{line}", file=sys.stderr)
        return_code = FAILED
    else:
        return_code = DONE
    return return_code


def _check(arguments: argparse.Namespace) -> int:
    settings, wrong, open_to_others = examine(arguments.file)
    warnings: list[str] = []
    if settings is not None:
        open_to_others += _open_files(settings)
        warnings += settings.warnings
        if not wrong:  # else a file may seem to be missing only because its line is wrong
            warnings += _missing_files(settings)
    for problem in (*open_to_others, *wrong):
        print(problem, file=sys.stderr)
    for warning in warnings:
        print(f"{arguments.file}: warning: {warning}", file=sys.stderr)
    if settings is None or wrong or open_to_others:
        return FAILED
    print(f"{arguments.file}: good; grants: {len(settings.grants)}")
    return DONE


def _missing_files(settings: Settings) -> list[str]:
    """Return one warning for each file that `run` would not find."""
    warnings: list[str] = []
    for name, path in (("keyring", settings.keyring), ("unseal", settings.unseal)):
        if path is None:
            warnings.append(f"{name}: not set; run needs it, or --{name}")
        elif not os.path.exists(path):
            warnings.append(f"{name}: {path} does not exist here, or may not be seen by this user")
    return warnings


def _open_files(settings: Settings) -> list[str]:
    """Return one message for each way in which other users can write the keyring, or read what opens it."""
    problems: list[str] = []
    if settings.keyring is not None:
        problems += private_files.problems(settings.keyring, owners=None)
    if settings.unseal is not None:
        owners = private_files.owner_of(settings.keyring)
        problems += private_files.problems(settings.unseal, secret=True, owners=owners)
    return problems


def _fingerprint(arguments: argparse.Namespace) -> int:
    try:
        der = pem_to_der(arguments.file.read_bytes())
    except (OSError, ValueError) as error:
        print(f"keyferry-agent: {arguments.file}: {error}", file=sys.stderr)
        return FAILED
    try:
        check_rsa_2048(der)
    except PublicKeyError as rsa:
        try:
            check_sm2(der)
        except PublicKeyError as sm2:
            print(f"keyferry-agent: {arguments.file}: no key to export to: {rsa} {sm2}", file=sys.stderr)
            return FAILED
    print(fingerprint(der))
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own arguments) and give its exit code."""
    arguments = _parser().parse_args(argv)
    code: int = arguments.run(arguments)
    return code
