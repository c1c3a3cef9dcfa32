"""`keyferry-agent keyring ...`: creates and changes sealed keyring files. No verb ever prints key material."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from ..crypto.seal import KEY_SIZES
from . import file, sealing, verbs
from .document import Document, KeyEntry, KeyringError

__all__ = ["add_parser"]

DONE: Final = 0
FAILED: Final = 1

_DEFAULT_SPEC: Final = "Aliyun_AES_256"


def add_parser(commands: Any) -> None:
    """Add `keyring` and its verbs to the agent's command."""
    keyring = commands.add_parser("keyring", help="create and change sealed keyring files", allow_abbrev=False)
    keyring.set_defaults(action=_main)
    subparsers = keyring.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, help_text: str, do: Callable[[argparse.Namespace], dict[str, Any]]) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = subparsers.add_parser(
            name, help=help_text, description=help_text, allow_abbrev=False
        )
        parser.add_argument("file", type=Path, metavar="FILE", help="the keyring")
        parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
        parser.set_defaults(verb_action=do)
        if name != "init":
            parser.add_argument(
                "--unseal",
                type=Path,
                metavar="FILE",
                required=True,
                help="an age or SSH identity, or a passphrase file",
            )
        return parser

    init = verb("init", "Create an empty keyring.", _init)
    to = init.add_mutually_exclusive_group(required=True)
    to.add_argument("--recipient", action="append", metavar="R", help="age1... or an SSH public key; may be repeated")
    to.add_argument("--passphrase-file", type=Path, metavar="F", help="seal to the passphrase in the file's first line")
    to.add_argument(
        "--new-identity", type=Path, metavar="OUT", help="make an age identity in a new file, and seal to it"
    )

    create_key = verb("create-key", "Add a key.", _create_key)
    create_key.add_argument("--key-spec", choices=tuple(KEY_SIZES), default=_DEFAULT_SPEC)
    create_key.add_argument("--alias", metavar="alias/NAME")
    create_key.add_argument("--description", default="", metavar="TEXT")

    verb("list", "List all keys.", _list)
    verb("show", "Show a key with its versions.", _show).add_argument("key", metavar="KEY", help="a key ID or an alias")

    for name, help_text, do in (
        ("create-alias", "Give a key a further name.", verbs.create_alias),
        ("update-alias", "Point an alias to another key.", verbs.update_alias),
    ):
        parser = verb(name, help_text, _aliasing(do))
        parser.add_argument("alias", metavar="alias/NAME")
        parser.add_argument("key", metavar="KEY", help="a key ID or an alias")
    verb("delete-alias", "Take a name away; the key stays.", _delete_alias).add_argument("alias", metavar="alias/NAME")


def _main(arguments: argparse.Namespace) -> int:
    try:
        result = arguments.verb_action(arguments)
    except KeyringError as error:
        print(f"keyferry-agent: {error}", file=sys.stderr)
        return FAILED
    if arguments.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        _print_for_people(result)
    return DONE


# --- the verbs: arguments -> what to print, as the API's names ---------------------------------------------------------


def _init(arguments: argparse.Namespace) -> dict[str, Any]:
    passphrase = None
    recipients = list(arguments.recipient or [])
    for recipient in recipients:
        sealing.check_recipient(recipient)
    if os.path.lexists(arguments.file):
        raise KeyringError(f"{arguments.file} exists; a keyring is never overwritten")
    if arguments.passphrase_file:
        passphrase = sealing.read_passphrase(arguments.passphrase_file)
    elif arguments.new_identity:
        recipients = [sealing.new_identity(arguments.new_identity)]
    try:
        file.create(arguments.file, Document(recipients), passphrase)
    except KeyringError:
        if arguments.new_identity:
            arguments.new_identity.unlink()  # it opens nothing, and would be in the way of the next try
        raise
    return {"Keyring": str(arguments.file), "Recipients": recipients}


def _create_key(arguments: argparse.Namespace) -> dict[str, Any]:
    with file.change(arguments.file, _unsealer(arguments)) as document:
        key = verbs.create_key(
            document, key_spec=arguments.key_spec, alias=arguments.alias, description=arguments.description
        )
    return {"KeyMetadata": _metadata(document, key)}


def _list(arguments: argparse.Namespace) -> dict[str, Any]:
    document = file.read(arguments.file, _unsealer(arguments))
    keys = [_metadata(document, key) for key in document.keys]
    return {"Keys": {"Key": keys}, "TotalCount": len(keys)}


def _show(arguments: argparse.Namespace) -> dict[str, Any]:
    document = file.read(arguments.file, _unsealer(arguments))
    key = document.find(arguments.key)
    versions = [
        {
            "KeyId": key.key_id,
            "KeyVersionId": version.version_id,
            "CreationDate": version.created,
            "Staged": version.staged,
        }
        for version in key.versions
    ]
    return {"KeyMetadata": _metadata(document, key), "KeyVersions": {"KeyVersion": versions}}


def _aliasing(do: Callable[[Document, str, str], KeyEntry]) -> Callable[[argparse.Namespace], dict[str, Any]]:
    def act(arguments: argparse.Namespace) -> dict[str, Any]:
        with file.change(arguments.file, _unsealer(arguments)) as document:
            key = do(document, arguments.alias, arguments.key)
        return {"KeyMetadata": _metadata(document, key)}

    return act


def _delete_alias(arguments: argparse.Namespace) -> dict[str, Any]:
    with file.change(arguments.file, _unsealer(arguments)) as document:
        key = verbs.delete_alias(document, arguments.alias)
    return {"KeyMetadata": _metadata(document, key)}


def _unsealer(arguments: argparse.Namespace) -> sealing.Unsealer:
    return sealing.Unsealer.read(arguments.unseal)


def _metadata(document: Document, key: KeyEntry) -> dict[str, Any]:
    return {
        "KeyId": key.key_id,
        "KeySpec": key.key_spec,
        "KeyState": key.state,
        "Description": key.description,
        "Origin": key.origin,
        "CreationDate": key.created,
        "DeleteDate": key.delete_date,
        "PrimaryKeyVersion": key.primary,
        "Aliases": document.aliases_of(key.key_id),
    }


# --- the same for people ----------------------------------------------------------------------------------------------


def _print_for_people(result: dict[str, Any]) -> None:
    if "Keys" in result:
        keys = result["Keys"]["Key"]
        _print_table(
            ("KEY ID", "KEY SPEC", "STATE", "ALIASES"),
            ((key["KeyId"], key["KeySpec"], key["KeyState"], ", ".join(key["Aliases"])) for key in keys),
        )
        return
    for name, value in {**result, **result.get("KeyMetadata", {})}.items():
        if isinstance(value, list):
            value = ", ".join(value)  # noqa: PLW2901 - shown, not kept
        if value and not isinstance(value, dict):
            print(f"{name + ':':<19}{value}")
    if "KeyVersions" in result:
        primary = result["KeyMetadata"]["PrimaryKeyVersion"]
        print()
        _print_table(
            ("KEY VERSION ID", "CREATED", ""),
            (
                (
                    version["KeyVersionId"],
                    version["CreationDate"],
                    "staged" if version["Staged"] else "primary" if version["KeyVersionId"] == primary else "",
                )
                for version in result["KeyVersions"]["KeyVersion"]
            ),
        )


def _print_table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    lines = [heading, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
