"""Verbs about the recipients, passphrase and identities of a keyring, and the options that name them."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keyferry import passphrase
from keyferry.private_files import owner_of
from keyferry.stdout import DONE

from ...keyring import file, recipients, sealing
from ...keyring.document import Document, KeyringError
from .output import print_result, warn

__all__ = [
    "add_recipient",
    "add_recipients",
    "add_sealed_to",
    "init",
    "list_recipients",
    "new_identity",
    "recipient_of",
    "remove_recipient",
    "reseal",
    "unsealer",
]


def unsealer(arguments: argparse.Namespace) -> sealing.Unsealer:
    """Return the unsealer for the file that --unseal names. Raises `KeyringError`."""
    return sealing.Unsealer.read(arguments.unseal, owner_of(arguments.file))


def add_recipients(parser: argparse.ArgumentParser) -> None:
    """Add the options that name recipients."""
    parser.add_argument(
        "--recipient", action="append", metavar="R", help="age1... or an SSH public key; may be repeated"
    )
    parser.add_argument(
        "-R",
        "--recipients-file",
        action="append",
        metavar="F",
        help="the recipients in a file, one on each line; - is standard input; may be repeated",
    )
    parser.set_defaults(new_identity=None, wrong_usage=parser.error)


def add_sealed_to(parser: argparse.ArgumentParser) -> None:
    """Add the options that name recipients or a passphrase."""
    add_recipients(parser)
    parser.add_argument(
        "--passphrase-file", type=Path, metavar="F", help="seal to the passphrase that the file contains"
    )
    parser.add_argument(
        "--generate-passphrase",
        action="store_true",
        help="seal to a new, strong passphrase, and print it; with --passphrase-file, write it to that new file instead",
    )


def init(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Create an empty keyring. Raises `KeyringError`."""
    if os.path.lexists(arguments.file):
        raise KeyringError(f"{arguments.file} exists; a keyring is never overwritten")
    sealed_to, phrase = _sealed_to(arguments)
    identity = sealing.Identity() if arguments.new_identity else None
    if identity is not None:
        sealed_to = [identity.recipient, *sealed_to]
    result = {"Keyring": str(arguments.file), "Recipients": sealed_to}
    new_file: Path | None = None
    try:
        # In the block, the file is complete, but does not have its name yet.
        with file.creating(arguments.file, Document(sealed_to), phrase):
            if identity is not None:
                identity.write(arguments.new_identity)
                new_file = arguments.new_identity
            elif arguments.generate_passphrase:
                _hand_over(arguments, result, phrase)
                new_file = arguments.passphrase_file
    except BaseException:
        if new_file and not os.path.lexists(arguments.file):
            new_file.unlink()  # it belongs to no keyring, and would make the next attempt fail
        raise
    if len(sealed_to) == 1:
        warn(
            f"{arguments.file} is sealed to one recipient: if its identity is lost, with a disk for example, every key is "
            f"lost; `keyring add-recipient {arguments.file} --recipient R` adds the recipient of an offline identity"
        )
    return None if _was_printed(arguments) else result


def reseal(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Seal a keyring to other recipients, or to a passphrase. Raises `KeyringError`."""
    sealed_to, phrase = _sealed_to(arguments)
    confirmed = arguments.yes
    with file.reseal(arguments.file, unsealer(arguments), lambda _: sealed_to, phrase, confirmed=confirmed) as before:
        result = _changed(arguments, before.recipients, sealed_to)
        if arguments.generate_passphrase:
            _hand_over(arguments, result, phrase)
    if before.unnamed > 0:
        warn(
            f"{arguments.file} was sealed by hand to {before.unnamed} more recipients than it named; "
            "the recipients that it did not name can no longer open it"
        )
    return None if _was_printed(arguments) else result


def add_recipient(arguments: argparse.Namespace) -> dict[str, Any]:
    """Add recipients to a keyring. Raises `KeyringError`."""
    return _choose(arguments, recipients.added)


def remove_recipient(arguments: argparse.Namespace) -> dict[str, Any]:
    """Remove recipients from a keyring. Raises `KeyringError`."""
    return _choose(arguments, recipients.without)


def list_recipients(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the recipients that a keyring's content names, and warn if its header has a different number of recipients."""
    sealed_bytes = file.read_sealed(arguments.file)
    names = file.open_sealed(sealed_bytes, unsealer(arguments)).recipients
    count = sealing.count_recipients(sealed_bytes)
    if count != len(names):
        warn(
            f"{arguments.file} was sealed by hand: it is sealed to {count} recipients and names {len(names)}. age does not "
            "reveal the others; run `keyring reseal` once, with all recipients"
        )
    return {
        "Keyring": str(arguments.file),
        "SealedTo": "Recipients" if count else "Passphrase",
        "Recipients": names,
    }


def recipient_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the recipients of the identities in a file. Raises `KeyringError`."""
    return {
        "Identity": str(arguments.identity),
        "Recipients": sealing.recipients_of(arguments.identity, owner_of(arguments.identity)),
    }


def new_identity(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write a new identity, and return its recipient. Raises `KeyringError`."""
    return {"Identity": str(arguments.identity), "Recipients": [sealing.new_identity(arguments.identity)]}


def _choose(
    arguments: argparse.Namespace, choose: Callable[[list[str], list[recipients.Recipient]], list[str]]
) -> dict[str, Any]:
    """Reseal to the recipients that `choose` returns for the current ones and those of the options. Raises `KeyringError`."""
    if not arguments.recipient and not arguments.recipients_file:
        arguments.wrong_usage("one of --recipient, --recipients-file is required")
    recipient_list = _recipients(arguments, owner_of(arguments.file))
    after: list[str] = []

    def chosen(before: list[str]) -> list[str]:
        after.extend(choose(before, recipient_list))
        return after

    with file.reseal(
        arguments.file, unsealer(arguments), chosen, None, confirmed=arguments.yes, keeps_others=True
    ) as before:
        pass
    return _changed(arguments, before.recipients, after)


def _changed(arguments: argparse.Namespace, before: list[str], after: list[str]) -> dict[str, Any]:
    return {
        "Keyring": str(arguments.file),
        "Recipients": after,
        "Removed": recipients.missing(before, after),
        "Added": recipients.missing(after, before),
    }


def _was_printed(arguments: argparse.Namespace) -> bool:
    """Return whether `_hand_over` printed the result, with the passphrase."""
    return arguments.generate_passphrase and not arguments.passphrase_file


def _sealed_to(arguments: argparse.Namespace) -> tuple[list[str], str | None]:
    """Return recipients and passphrase. Ends the command if the options name neither or both. Raises `KeyringError`."""
    to_recipients = bool(arguments.recipient or arguments.recipients_file or arguments.new_identity)
    if not to_recipients and not arguments.generate_passphrase and not arguments.passphrase_file:
        arguments.wrong_usage(
            "one of --recipient, --recipients-file, --passphrase-file, --generate-passphrase (or, for init, --new-identity) "
            "is required"
        )
    if to_recipients and (arguments.generate_passphrase or arguments.passphrase_file):
        arguments.wrong_usage(
            "--passphrase-file and --generate-passphrase seal to a passphrase, and are not allowed with --recipient, "
            "--recipients-file or --new-identity"
        )
    owners = owner_of(arguments.file)
    if to_recipients:
        return recipients.distinct(_recipients(arguments, owners)), None
    if arguments.generate_passphrase:
        return [], passphrase.generate()
    phrase = sealing.read_passphrase(arguments.passphrase_file, owners)
    if weakness := passphrase.weakness(phrase):
        warn(f"{arguments.passphrase_file}: {weakness}")
    return [], phrase


def _recipients(arguments: argparse.Namespace, owners: tuple[int, ...]) -> list[recipients.Recipient]:
    """Return the recipients that all options name. Raises `KeyringError`."""
    files = arguments.recipients_file or []
    if files.count("-") > 1:
        arguments.wrong_usage("--recipients-file -: standard input can be read only once")
    recipient_list = [recipients.parse(text) for text in arguments.recipient or []]
    for path in files:
        recipient_list += recipients.read_file(path, owners)
    return recipient_list


def _hand_over(arguments: argparse.Namespace, result: dict[str, Any], phrase: str | None) -> None:
    """Write a generated passphrase to its new file, or print it with the verb's result, before the keyring is replaced.

    Raises `KeyringError` if that fails, so that the keyring is not sealed to a passphrase that is then lost.
    """
    assert phrase is not None
    path = arguments.passphrase_file
    if path is None:
        if print_result(arguments, {**result, "Passphrase": phrase}) != DONE:
            raise KeyringError(f"{arguments.file}: nothing was sealed, because the passphrase could not be printed")
        return
    try:
        passphrase.write_new_file(path, phrase)
    except FileExistsError:
        raise KeyringError(f"{path} exists; a generated passphrase needs a new file") from None
    except OSError as error:
        raise KeyringError(f"{path}: {error.strerror}") from None
