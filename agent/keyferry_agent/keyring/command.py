"""`keyferry-agent keyring ...`: creates and changes sealed keyring files. No verb ever prints key material."""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from keyferry import age_passphrase, passphrase
from keyferry.arguments import whole_number
from keyferry.output import DONE, complain, show, show_json
from keyferry.private_files import owner_of

from ..crypto.seal import KEY_SIZES
from . import changes, file, history, recipients, sealing, verbs
from .document import Document, KeyEntry, KeyringError, VersionEntry

__all__ = ["add_parser"]

FAILED: Final = 1

_PROGRAM: Final = "keyferry-agent"
_DEFAULT_SPEC: Final = "Aliyun_AES_256"
_MATERIAL_MOST: Final = 65
"""Bytes of material to read at most: enough to see that hex is not raw bytes."""


def add_parser(commands: Any) -> None:
    """Add `keyring` and its verbs to the agent's command."""
    keyring = commands.add_parser("keyring", help="create and change sealed keyring files", allow_abbrev=False)
    keyring.set_defaults(run=_main)
    subparsers = keyring.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, help_text: str, do: Callable[[argparse.Namespace], dict[str, Any] | None]
    ) -> argparse.ArgumentParser:
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

    _add_sealed_to(verb("init", "Create an empty keyring.", _init)).add_argument(
        "--new-identity", type=Path, metavar="OUT", help="make an age identity in a new file, and seal to it"
    )
    _add_sealed_to(verb("reseal", "Seal to other recipients, or to a passphrase, from now on.", _reseal))

    create_key = verb("create-key", "Add a key.", _changing(_create_key))
    create_key.add_argument("--key-spec", choices=tuple(KEY_SIZES), default=_DEFAULT_SPEC)
    import_key = verb("import-key", "Add a key of material that you have.", _import_key)
    import_key.add_argument(
        "--material", required=True, metavar="FILE|-", help="32 (Aliyun_AES_256) or 16 (Aliyun_SM4) raw bytes"
    )
    import_key.add_argument("--key-spec", choices=tuple(KEY_SIZES), help="default: by the length of the material")
    for parser in (create_key, import_key):
        parser.add_argument("--alias", metavar="alias/NAME")
        parser.add_argument("--description", default="", metavar="TEXT")

    verb("list", "List all keys.", _list)
    history.add_parser(subparsers)

    for name, help_text, act in (
        ("show", "Show a key with its versions.", _show),
        ("rotate", "Give a key a new version, which is its primary one at once.", _rotate),
        ("promote", "Make a staged version the primary one, once every host has it.", _changing(_promote)),
        ("enable", "Let a key be used again.", _changing(lambda d, a: verbs.enable(d, a.key))),
        ("disable", "Let a key be used for nothing.", _changing(lambda d, a: verbs.disable(d, a.key))),
        ("schedule-deletion", "Delete a key, some days from now.", _changing(_schedule_deletion)),
        ("cancel-deletion", "Keep a key after all.", _changing(lambda d, a: verbs.cancel_deletion(d, a.key))),
    ):
        parser = verb(name, help_text, act)
        parser.add_argument("key", metavar="KEY", help="a key ID or an alias")
        if name == "rotate":
            parser.add_argument("--stage", action="store_true", help="it decrypts, and is not primary until promoted")
        elif name == "promote":
            parser.add_argument("version", metavar="VERSION", help="the staged version's ID")
        elif name == "schedule-deletion":
            days = f"{verbs.DAYS[0]}..{verbs.DAYS[-1]}"
            parser.add_argument(
                "--days", type=whole_number, required=True, metavar=days, help="until then it can be cancelled"
            )

    for name, help_text, do in (
        ("create-alias", "Give a key a further name.", lambda d, a: verbs.create_alias(d, a.alias, a.key)),
        ("update-alias", "Point an alias to another key.", lambda d, a: verbs.update_alias(d, a.alias, a.key)),
        ("delete-alias", "Take a name away; the key stays.", lambda d, a: verbs.delete_alias(d, a.alias)),
    ):
        parser = verb(name, help_text, _changing(do))
        parser.add_argument("alias", metavar="alias/NAME")
        if name != "delete-alias":
            parser.add_argument("key", metavar="KEY", help="a key ID or an alias")


def _add_sealed_to(parser: argparse.ArgumentParser) -> Any:
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


def _main(arguments: argparse.Namespace) -> int:
    try:
        with changes.attributed(arguments.verb):
            result = arguments.verb_action(arguments)
        _warn_of_weak_work_factor(arguments.file)
    except KeyringError as error:
        complain(_PROGRAM, str(error))
        return FAILED
    return DONE if result is None else _print(arguments, result)


def _print(arguments: argparse.Namespace, result: dict[str, Any]) -> int:
    if arguments.json:
        return show_json(_PROGRAM, result)
    return show(_PROGRAM, "\n".join(_for_people(result)))


# --- the verbs: arguments -> what to print, as the API's names ---------------------------------------------------------


def _init(arguments: argparse.Namespace) -> dict[str, Any] | None:
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


def _reseal(arguments: argparse.Namespace) -> dict[str, Any] | None:
    sealed_to, phrase = _sealed_to(arguments)
    with file.reseal(arguments.file, _unsealer(arguments), sealed_to, phrase):
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
        _warn(f"{arguments.passphrase_file}: {weakness}")
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
        if _print(arguments, {"Keyring": str(arguments.file), "Recipients": [], "Passphrase": phrase}) != DONE:
            raise KeyringError(f"{arguments.file}: nothing was sealed, because the passphrase could not be printed")
        return
    try:
        passphrase.write_new_file(path, phrase)
    except FileExistsError:
        raise KeyringError(f"{path} exists; a generated passphrase needs a new file") from None
    except OSError as error:
        raise KeyringError(f"{path}: {error.strerror}") from None


def _warn_of_weak_work_factor(path: Path) -> None:
    factor = None
    with suppress(KeyringError):
        factor = age_passphrase.work_factor(file.read_sealed(path))
    if factor is not None and factor < age_passphrase.MIN_STRONG_WORK_FACTOR:
        _warn(
            f"{path}: its passphrase is sealed with work factor {factor}, which is low; "
            f"`keyring reseal` it with a new passphrase: work factor {age_passphrase.WORK_FACTOR} is used then"
        )


def _warn(message: str) -> None:
    complain(_PROGRAM, f"warning: {message}")


def _changing(
    do: Callable[[Document, argparse.Namespace], KeyEntry],
) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """A verb that changes one key, and shows it as it is then."""

    def act(arguments: argparse.Namespace) -> dict[str, Any]:
        with file.change(arguments.file, _unsealer(arguments)) as document:
            key = do(document, arguments)
        return {"KeyMetadata": _metadata(key, document.aliases_by_key()), **_versions(key)}

    return act


def _create_key(document: Document, arguments: argparse.Namespace) -> KeyEntry:
    return verbs.create_key(
        document, key_spec=arguments.key_spec, alias=arguments.alias, description=arguments.description
    )


def _import_key(arguments: argparse.Namespace) -> dict[str, Any]:
    material = _read_material(arguments.material)  # before the file is locked: somebody may have to type it

    def add(document: Document, arguments: argparse.Namespace) -> KeyEntry:
        return verbs.import_key(
            document,
            material,
            key_spec=arguments.key_spec,
            alias=arguments.alias,
            description=arguments.description,
        )

    return _changing(add)(arguments)


def _rotate(arguments: argparse.Namespace) -> dict[str, Any]:
    with file.change(arguments.file, _unsealer(arguments)) as document:
        key = verbs.rotate(document, arguments.key, stage=arguments.stage)
    made = _version(key, key.versions[-1])
    return {"KeyVersion": made, "KeyMetadata": _metadata(key, document.aliases_by_key()), **_versions(key)}


def _promote(document: Document, arguments: argparse.Namespace) -> KeyEntry:
    return verbs.promote(document, arguments.key, arguments.version)


def _schedule_deletion(document: Document, arguments: argparse.Namespace) -> KeyEntry:
    return verbs.schedule_deletion(document, arguments.key, arguments.days)


def _list(arguments: argparse.Namespace) -> dict[str, Any]:
    document = file.read(arguments.file, _unsealer(arguments))
    aliases = document.aliases_by_key()
    keys = [_metadata(key, aliases) for key in document.keys]
    return {"Keys": {"Key": keys}, "TotalCount": len(keys)}


def _show(arguments: argparse.Namespace) -> dict[str, Any]:
    document = file.read(arguments.file, _unsealer(arguments))
    key = document.find(arguments.key)
    return {"KeyMetadata": _metadata(key, document.aliases_by_key()), **_versions(key)}


def _read_material(path: str) -> bytearray:
    """All of a small file, or of standard input. Raises `KeyringError`."""
    material = bytearray()
    try:
        with open(0 if path == "-" else path, "rb", buffering=0, closefd=path != "-") as source:
            while len(material) <= _MATERIAL_MOST and (read := source.read(_MATERIAL_MOST)):
                material += read
    except OSError as error:
        raise KeyringError(f"{path}: {error.strerror}") from None
    return material


def _version(key: KeyEntry, version: VersionEntry) -> dict[str, Any]:
    return {
        "KeyId": key.key_id,
        "KeyVersionId": version.version_id,
        "CreationDate": version.created,
        "Staged": version.staged,
    }


def _versions(key: KeyEntry) -> dict[str, Any]:
    return {"KeyVersions": {"KeyVersion": [_version(key, version) for version in key.versions]}}


def _unsealer(arguments: argparse.Namespace) -> sealing.Unsealer:
    return sealing.Unsealer.read(arguments.unseal, owner_of(arguments.file))


def _metadata(key: KeyEntry, aliases: Mapping[str, list[str]]) -> dict[str, Any]:
    return {
        "KeyId": key.key_id,
        "KeySpec": key.key_spec,
        "KeyState": key.state,
        "Description": key.description,
        "Origin": key.origin,
        "CreationDate": key.created,
        "DeleteDate": key.delete_date,
        "PrimaryKeyVersion": key.primary,
        "Aliases": aliases.get(key.key_id, []),
    }


# --- the same for people ----------------------------------------------------------------------------------------------


def _for_people(result: dict[str, Any]) -> Iterator[str]:
    if "Keys" in result:
        keys = result["Keys"]["Key"]
        yield from _table(
            ("KEY ID", "KEY SPEC", "STATE", "ALIASES"),
            ((key["KeyId"], key["KeySpec"], key["KeyState"], ", ".join(key["Aliases"])) for key in keys),
        )
        return
    for name, value in {**result, **result.get("KeyMetadata", {})}.items():
        if isinstance(value, list):
            value = ", ".join(value)  # noqa: PLW2901 - shown, not kept
        if value and not isinstance(value, dict):
            yield f"{name + ':':<19}{value}"
    if "KeyVersions" in result:
        primary = result["KeyMetadata"]["PrimaryKeyVersion"]
        yield ""
        yield from _table(
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


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    lines = [heading, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
