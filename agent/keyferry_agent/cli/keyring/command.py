"""`keyferry-agent keyring ...`: create and change sealed keyring files. The verbs never print key material.

Only `create-access-key` prints a secret: the credentials of a new caller of a gateway.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeAlias

from keyferry import age_passphrase
from keyferry.arguments import whole_number
from keyferry.stdout import DONE, complain

from ...crypto.ciphertext_blob import KEY_SIZES
from ...keyring import changes, edits, file
from ...keyring.document import Document, KeyEntry, KeyringError
from . import access, access_keys, history
from .output import PROGRAM, metadata, print_result, version_of, versions_of, warn
from .reading import read_secret

__all__ = ["add_parser"]

FAILED: Final = 1

_DEFAULT_SPEC: Final = "Aliyun_AES_256"
_MAX_MATERIAL_BYTES: Final = 65
"""Bytes of material to read: with one more than 64, errors can distinguish a key of 32 bytes in hexadecimal from more."""


_Act: TypeAlias = Callable[[argparse.Namespace], dict[str, Any] | None]
"""Performs a verb. Returns the result to print, with the API's names, or None if it was printed already."""
_Verb: TypeAlias = Callable[[str, str, _Act], argparse.ArgumentParser]
"""Adds and returns the parser of a verb, from its name, its help text and the function that performs it."""


def add_parser(commands: Any) -> None:
    """Add `keyring` and its verbs to the agent's command."""
    keyring = commands.add_parser("keyring", help="create and change sealed keyring files", allow_abbrev=False)
    keyring.set_defaults(run=_main)
    subparsers = keyring.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, help_text: str, handler: _Act) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = subparsers.add_parser(
            name, help=help_text, description=help_text, allow_abbrev=False
        )
        parser.add_argument("file", type=Path, metavar="FILE", help="the keyring")
        parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
        parser.set_defaults(verb_action=handler)
        if name != "init":
            parser.add_argument(
                "--unseal",
                type=Path,
                metavar="FILE",
                required=True,
                help="an age or SSH identity, or a passphrase file",
            )
        return parser

    _add_access_verbs(verb)
    _add_key_verbs(verb)
    history.add_parser(subparsers)
    _add_alias_verbs(verb)
    access_keys.add_verbs(verb)
    _add_identity_verbs(subparsers)


def _add_access_verbs(verb: _Verb) -> None:
    init = verb("init", "Create an empty keyring.", access.init)
    access.add_sealed_to(init)
    init.add_argument(
        "--new-identity",
        type=Path,
        metavar="OUT",
        help="generate an age identity into a new file, and add its recipient",
    )
    reseal = verb("reseal", "Replace the recipients or the passphrase of the keyring.", access.reseal)
    access.add_sealed_to(reseal)
    verb("recipients", "List the keyring's recipients, in the form of --recipients-file.", access.list_recipients)
    add = verb("add-recipient", "Add recipients to the keyring.", access.add_recipient)
    remove = verb("remove-recipient", "Remove recipients from the keyring.", access.remove_recipient)
    for parser in (add, remove):
        access.add_recipients(parser)
    for parser in (reseal, add, remove):
        parser.add_argument(
            "--yes",
            action="store_true",
            help="also if --unseal could then no longer open the keyring, or if one recipient is left",
        )


def _add_identity_verbs(subparsers: Any) -> None:
    act: _Act
    for name, help_text, metavar, act in (
        ("recipient-of", "Print the recipient of an age or SSH identity.", "IDENTITY", access.recipient_of),
        (
            "new-identity",
            "Generate an age identity into a new file, and print its recipient.",
            "OUT",
            access.new_identity,
        ),
    ):
        parser = subparsers.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        parser.add_argument("identity", type=Path, metavar=metavar, help="the file of the identity")
        parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
        parser.set_defaults(verb_action=act, file=None)


def _add_key_verbs(verb: _Verb) -> None:
    create_key = verb("create-key", "Add a key.", _changing(_create_key))
    create_key.add_argument("--key-spec", choices=tuple(KEY_SIZES), default=_DEFAULT_SPEC)
    import_key = verb("import-key", "Add a key with existing key material.", _import_key)
    import_key.add_argument(
        "--material", required=True, metavar="FILE|-", help="32 (Aliyun_AES_256) or 16 (Aliyun_SM4) raw bytes"
    )
    import_key.add_argument("--key-spec", choices=tuple(KEY_SIZES), help="default: by the length of the material")
    for parser in (create_key, import_key):
        parser.add_argument("--alias", metavar="alias/NAME")
        parser.add_argument("--description", default="", metavar="TEXT")

    verb("list", "List all keys.", _list)

    for name, help_text, act in (
        ("show", "Show a key with its versions.", _show),
        ("rotate", "Add a version to a key, and make it the primary version.", _rotate),
        ("promote", "Make a staged version the primary version, once all hosts have loaded it.", _changing(_promote)),
        ("enable", "Enable a disabled key again.", _changing(lambda d, a: edits.enable(d, a.key))),
        ("disable", "Disable a key.", _changing(lambda d, a: edits.disable(d, a.key))),
        ("disable-version", "Disable a key version for decryption, too.", _changing(_disable_version)),
        ("enable-version", "Enable a disabled key version again.", _changing(_enable_version)),
        ("schedule-deletion", "Schedule the deletion of a key.", _changing(_schedule_deletion)),
        (
            "cancel-deletion",
            "Cancel the scheduled deletion of a key.",
            _changing(lambda d, a: edits.cancel_deletion(d, a.key)),
        ),
    ):
        parser = verb(name, help_text, act)
        parser.add_argument("key", metavar="KEY", help="a key ID or an alias")
        if name == "rotate":
            parser.add_argument(
                "--stage", action="store_true", help="the new version only decrypts until it is promoted"
            )
        elif name == "promote":
            parser.add_argument("version", metavar="VERSION", help="the staged version's ID")
        elif name.endswith("-version"):
            parser.add_argument("version", metavar="VERSION", help="the version's ID")
            if name == "disable-version":
                parser.add_argument(
                    "--yes", action="store_true", help="everything that it encrypted was moved, or may be lost"
                )
        elif name == "schedule-deletion":
            days = f"{edits.DAYS[0]}..{edits.DAYS[-1]}"
            parser.add_argument(
                "--days",
                type=whole_number,
                required=True,
                metavar=days,
                help="days until the deletion, which can be cancelled until then",
            )


def _add_alias_verbs(verb: _Verb) -> None:
    for name, help_text, handler in (
        ("create-alias", "Create an alias for a key.", lambda d, a: edits.create_alias(d, a.alias, a.key)),
        ("update-alias", "Point an alias to another key.", lambda d, a: edits.update_alias(d, a.alias, a.key)),
        ("delete-alias", "Delete an alias, but not its key.", lambda d, a: edits.delete_alias(d, a.alias)),
    ):
        parser = verb(name, help_text, _changing(handler))
        parser.add_argument("alias", metavar="alias/NAME")
        if name != "delete-alias":
            parser.add_argument("key", metavar="KEY", help="a key ID or an alias")


def _main(arguments: argparse.Namespace) -> int:
    try:
        with changes.attributed(arguments.verb):
            result = arguments.verb_action(arguments)
        if arguments.file is not None:
            _warn_of_weak_work_factor(arguments.file)
    except KeyringError as error:
        complain(PROGRAM, str(error))
        return FAILED
    return DONE if result is None else print_result(arguments, result)


# --- the verbs: each returns the result to print, with the API's names --------------------------------------------------


def _warn_of_weak_work_factor(path: Path) -> None:
    factor = None
    with suppress(KeyringError):
        factor = age_passphrase.work_factor(file.read_sealed(path))
    if factor is not None and factor < age_passphrase.MIN_STRONG_WORK_FACTOR:
        warn(
            f"{path}: sealed to a passphrase with the low work factor {factor}; run `keyring reseal` with a new passphrase, "
            f"which uses work factor {age_passphrase.WORK_FACTOR}"
        )


def _changing(
    edit: Callable[[Document, argparse.Namespace], KeyEntry],
) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """Return a verb that changes one key, and returns the changed key's metadata and versions."""

    def act(arguments: argparse.Namespace) -> dict[str, Any]:
        with file.change(arguments.file, access.unsealer(arguments)) as document:
            key = edit(document, arguments)
        return {"KeyMetadata": metadata(key, document.aliases_by_key()), **versions_of(key)}

    return act


def _create_key(document: Document, arguments: argparse.Namespace) -> KeyEntry:
    return edits.create_key(
        document, key_spec=arguments.key_spec, alias=arguments.alias, description=arguments.description
    )


def _import_key(arguments: argparse.Namespace) -> dict[str, Any]:
    # Read before the file is locked, because an operator may type the material.
    material = read_secret(arguments.material, _MAX_MATERIAL_BYTES)

    def add(document: Document, arguments: argparse.Namespace) -> KeyEntry:
        return edits.import_key(
            document,
            material,
            key_spec=arguments.key_spec,
            alias=arguments.alias,
            description=arguments.description,
        )

    return _changing(add)(arguments)


def _rotate(arguments: argparse.Namespace) -> dict[str, Any]:
    with file.change(arguments.file, access.unsealer(arguments)) as document:
        key = edits.rotate(document, arguments.key, stage=arguments.stage)
    version = version_of(key, key.versions[-1])
    return {"KeyVersion": version, "KeyMetadata": metadata(key, document.aliases_by_key()), **versions_of(key)}


def _promote(document: Document, arguments: argparse.Namespace) -> KeyEntry:
    return edits.promote(document, arguments.key, arguments.version)


def _disable_version(document: Document, arguments: argparse.Namespace) -> KeyEntry:
    return edits.disable_version(document, arguments.key, arguments.version, confirmed=arguments.yes)


def _enable_version(document: Document, arguments: argparse.Namespace) -> KeyEntry:
    return edits.enable_version(document, arguments.key, arguments.version)


def _schedule_deletion(document: Document, arguments: argparse.Namespace) -> KeyEntry:
    return edits.schedule_deletion(document, arguments.key, arguments.days)


def _list(arguments: argparse.Namespace) -> dict[str, Any]:
    document = file.read(arguments.file, access.unsealer(arguments))
    aliases = document.aliases_by_key()
    keys = [metadata(key, aliases) for key in document.keys]
    return {"Keys": {"Key": keys}, "TotalCount": len(keys)}


def _show(arguments: argparse.Namespace) -> dict[str, Any]:
    document = file.read(arguments.file, access.unsealer(arguments))
    key = document.find(arguments.key)
    return {"KeyMetadata": metadata(key, document.aliases_by_key()), **versions_of(key)}
