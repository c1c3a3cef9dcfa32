"""Verbs about what opens a keyring: `init`, `reseal`, and the options that name recipients or a passphrase."""

import argparse
import os
from pathlib import Path
from typing import Any

from keyferry import passphrase
from keyferry.output import DONE
from keyferry.private_files import owner_of

from . import file, recipients, sealing
from .document import Document, KeyringError
from .shown import print_result, warn

__all__ = ["add_sealed_to", "init", "reseal", "unsealer"]


def unsealer(arguments: argparse.Namespace) -> sealing.Unsealer:
    """Return what --unseal names. Raises `KeyringError`."""
    return sealing.Unsealer.read(arguments.unseal, owner_of(arguments.file))


def add_sealed_to(parser: argparse.ArgumentParser) -> Any:
    """Add the options that name recipients or a passphrase; return the group of which at most one may be given."""
    to = parser.add_mutually_exclusive_group()
    to.add_argument("--recipient", action="append", metavar="R", help="age1... or an SSH public key; may be repeated")
    to.add_argument("--passphrase-file", type=Path, metavar="F", help="seal to the passphrase that the file contains")
    parser.add_argument(
        "-R",
        "--recipients-file",
        action="append",
        metavar="F",
        help="seal to the recipients in a file, one on each line; - is standard input; may be repeated",
    )
    parser.add_argument(
        "--generate-passphrase",
        action="store_true",
        help="seal to a new, strong passphrase, and print it; with --passphrase-file, write it to that new file instead",
    )
    parser.set_defaults(new_identity=None, wrong_usage=parser.error)
    return to


def init(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Create an empty keyring. Raises `KeyringError`."""
    if os.path.lexists(arguments.file):
        raise KeyringError(f"{arguments.file} exists; a keyring is never overwritten")
    sealed_to, phrase = _sealed_to(arguments)
    identity = sealing.Identity() if arguments.new_identity else None
    if identity is not None:
        sealed_to = [identity.recipient]
    written: Path | None = None
    try:
        with file.creating(arguments.file, Document(sealed_to), phrase):  # only its name is missing in the block
            if identity is not None:
                identity.write(arguments.new_identity)
                written = arguments.new_identity
            elif arguments.generate_passphrase:
                _hand_over(arguments, phrase)
                written = arguments.passphrase_file
    except BaseException:
        if written and not os.path.lexists(arguments.file):
            written.unlink()  # it opens nothing, and would be in the way of the next attempt
        raise
    return _resealed(arguments, sealed_to)


def reseal(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Seal a keyring to other recipients, or to a passphrase. Raises `KeyringError`."""
    sealed_to, phrase = _sealed_to(arguments)
    with file.reseal(arguments.file, unsealer(arguments), sealed_to, phrase):
        if arguments.generate_passphrase:
            _hand_over(arguments, phrase)
    return _resealed(arguments, sealed_to)


def _resealed(arguments: argparse.Namespace, sealed_to: list[str]) -> dict[str, Any] | None:
    """Return the result of a verb that seals, and None where `_hand_over` printed it with the passphrase."""
    if arguments.generate_passphrase and not arguments.passphrase_file:
        return None
    return {"Keyring": str(arguments.file), "Recipients": sealed_to}


def _sealed_to(arguments: argparse.Namespace) -> tuple[list[str], str | None]:
    """Return recipients and passphrase. Ends the command where the options name none, or two kinds."""
    to_recipients = bool(arguments.recipient or arguments.recipients_file)
    to_identities = to_recipients or arguments.new_identity
    if arguments.generate_passphrase:
        if to_identities:
            arguments.wrong_usage("--generate-passphrase seals to a passphrase, and recipients are given too")
        return [], passphrase.generate()
    if not to_identities and not arguments.passphrase_file:
        arguments.wrong_usage(
            "one of --recipient, --recipients-file, --passphrase-file, --generate-passphrase (or, for init, --new-identity) "
            "is required"
        )
    if arguments.recipients_file and (arguments.passphrase_file or arguments.new_identity):
        arguments.wrong_usage("--recipients-file is not allowed with --passphrase-file or --new-identity")
    owners = owner_of(arguments.file)
    if not arguments.passphrase_file:
        return _recipients(arguments, owners), None
    phrase = sealing.read_passphrase(arguments.passphrase_file, owners)
    if weakness := passphrase.weakness(phrase):
        warn(f"{arguments.passphrase_file}: {weakness}")
    return [], phrase


def _recipients(arguments: argparse.Namespace, owners: tuple[int, ...]) -> list[str]:
    """Return the recipients of all options, each key once."""
    files = arguments.recipients_file or []
    if files.count("-") > 1:
        arguments.wrong_usage("--recipients-file -: standard input can be read only once")
    named = [recipients.parse(text) for text in arguments.recipient or []]
    for path in files:
        named += recipients.read_file(path, owners)
    return recipients.distinct(named)


def _hand_over(arguments: argparse.Namespace, phrase: str | None) -> None:
    """Write a generated passphrase to its new file, or print it with the verb's result, before the keyring is replaced.

    Raises `KeyringError`: a keyring whose passphrase nobody has is lost.
    """
    assert phrase is not None
    path = arguments.passphrase_file
    if path is None:
        if print_result(arguments, {"Keyring": str(arguments.file), "Recipients": [], "Passphrase": phrase}) != DONE:
            raise KeyringError(f"{arguments.file}: nothing was sealed, because the passphrase could not be printed")
        return
    try:
        passphrase.write_new_file(path, phrase)
    except FileExistsError:
        raise KeyringError(f"{path} exists; a generated passphrase needs a new file") from None
    except OSError as error:
        raise KeyringError(f"{path}: {error.strerror}") from None
