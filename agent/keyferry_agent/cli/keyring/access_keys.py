"""Verbs about access keys, by which callers of a gateway sign. A secret is printed once: when the access key is created."""

import argparse
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from keyferry.stdout import DONE

from ...keyring import access_key_edits as edits
from ...keyring import file
from ...keyring.access_keys import ACTIVE, INACTIVE, AccessKeyEntry, check_access_key_id
from ...keyring.document import Document, KeyringError
from . import access
from .output import print_result
from .reading import read_secret

__all__ = ["add_verbs"]

_MAX_SECRET_FILE_BYTES: Final = 256
"""Most bytes of a file with a secret: the longest secret, a line end, and empty lines."""
_Act: TypeAlias = Callable[[argparse.Namespace], dict[str, Any] | None]


def add_verbs(verb: Callable[[str, str, _Act], argparse.ArgumentParser]) -> None:
    """Add the verbs about access keys. `verb` adds a verb from its name, its help text and its function."""
    create = verb(
        "create-access-key", "Add an access key for callers of a gateway, and print its secret once.", _create
    )
    create.add_argument(
        "--token", action="store_true", help="temporary credentials, which have a SecurityToken besides the secret"
    )
    imports = verb("import-access-key", "Add an access key that exists elsewhere.", _import)
    imports.add_argument("--id", required=True, metavar="ID", help="the access key's ID, for example LTAI...")
    imports.add_argument(
        "--secret-file",
        required=True,
        metavar="FILE|-",
        help="a file with the secret: 16 to 128 printable ASCII characters",
    )
    for parser in (create, imports):
        parser.add_argument("--description", default="", metavar="TEXT")
    verb("list-access-keys", "List all access keys, without their secrets.", _list)
    for name, help_text, do in (
        ("enable-access-key", "Enable a disabled access key again.", edits.enable_access_key),
        ("disable-access-key", "Disable an access key: gateways refuse it.", edits.disable_access_key),
        ("delete-access-key", "Delete an access key for good.", edits.delete_access_key),
    ):
        parser = verb(name, help_text, _changing(do))
        parser.add_argument("access_key", metavar="ID", help="the access key's ID")


def _create(arguments: argparse.Namespace) -> None:
    with file.change(arguments.file, access.unsealer(arguments)) as document:
        access_key = edits.create_access_key(document, token=arguments.token, description=arguments.description)
        token = {"SecurityToken": access_key.token.decode()} if access_key.token else {}
        result = {
            "AccessKeyId": access_key.access_key_id,
            "AccessKeySecret": access_key.secret.decode(),
            **token,
            **_metadata(access_key),
        }
        # Printed before the keyring is replaced: an access key whose secret could not be printed is of no use.
        if print_result(arguments, result) != DONE:
            raise KeyringError(f"{arguments.file}: nothing was changed, because the secret could not be printed")


def _import(arguments: argparse.Namespace) -> dict[str, Any]:
    check_access_key_id(arguments.id, "--id: ")
    # Read before the keyring is locked, because an operator may type the secret.
    secret = read_secret(arguments.secret_file, _MAX_SECRET_FILE_BYTES)
    while secret.endswith((b"\n", b"\r")):
        del secret[-1]

    def add(document: Document, access_key_id: str) -> AccessKeyEntry:
        return edits.import_access_key(document, access_key_id, secret, description=arguments.description)

    arguments.access_key = arguments.id
    try:
        return _changing(add)(arguments)
    finally:
        secret[:] = bytes(len(secret))


def _list(arguments: argparse.Namespace) -> dict[str, Any]:
    document = file.read(arguments.file, access.unsealer(arguments))
    access_keys = [_metadata(access_key) for access_key in document.access_keys]
    return {"AccessKeys": {"AccessKey": access_keys}, "TotalCount": len(access_keys)}


def _changing(do: Callable[[Document, str], AccessKeyEntry]) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """Return a verb that changes one access key, and returns its metadata."""

    def act(arguments: argparse.Namespace) -> dict[str, Any]:
        with file.change(arguments.file, access.unsealer(arguments)) as document:
            access_key = do(document, arguments.access_key)
        return _metadata(access_key)

    return act


def _metadata(access_key: AccessKeyEntry) -> dict[str, Any]:
    """Return an access key without its secret and token."""
    return {
        "AccessKeyId": access_key.access_key_id,
        "Status": ACTIVE if access_key.enabled else INACTIVE,
        "Description": access_key.description,
        "CreationDate": access_key.created,
        "HasSecurityToken": bool(access_key.token),
    }
