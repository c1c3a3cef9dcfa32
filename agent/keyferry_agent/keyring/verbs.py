"""What can be done to a keyring: changes to a document, each whole or not at all. No files, no sealing, no printing."""

import os

from ..crypto.seal import KEY_SIZES
from .document import Document, KeyEntry, KeyringError, VersionEntry, check_alias, check_description, new_id, now

__all__ = ["create_alias", "create_key", "delete_alias", "update_alias"]


def create_key(document: Document, *, key_spec: str, alias: str | None = None, description: str = "") -> KeyEntry:
    """Add a key with one fresh version, and an alias if one is given. Raises `KeyringError` if that exists."""
    check_description(description)
    if alias is not None:
        _check_new(document, alias)
    created = now()
    version = VersionEntry(new_id(), created, bytearray(os.urandom(KEY_SIZES[key_spec])))
    key = KeyEntry(
        key_id=new_id(),
        key_spec=key_spec,
        created=created,
        versions=[version],
        primary=version.version_id,
        description=description,
    )
    document.keys.append(key)
    if alias is not None:
        document.aliases[alias] = key.key_id
    return key


def create_alias(document: Document, alias: str, key_id: str) -> KeyEntry:
    """Give a key a further name. Raises `KeyringError` if the name is taken, or the key is about to be deleted."""
    _check_new(document, alias)
    return _point(document, alias, key_id)


def update_alias(document: Document, alias: str, key_id: str) -> KeyEntry:
    """Point an alias to another key. Raises `KeyringError` if there is no such alias."""
    _check_known(document, alias)
    return _point(document, alias, key_id)


def delete_alias(document: Document, alias: str) -> KeyEntry:
    """Take a name away; the key stays. Raises `KeyringError` if there is no such alias."""
    _check_known(document, alias)
    key = document.find(alias)
    del document.aliases[alias]
    return key


def _point(document: Document, alias: str, key_id: str) -> KeyEntry:
    key = document.find(key_id)
    if key.state == "PendingDeletion":
        raise KeyringError(f"{key.key_id} is about to be deleted: it takes no alias")
    document.aliases[alias] = key.key_id
    return key


def _check_new(document: Document, alias: str) -> None:
    check_alias(alias)
    if alias in document.aliases:
        raise KeyringError(f"{alias} exists already: it names {document.aliases[alias]}")


def _check_known(document: Document, alias: str) -> None:
    check_alias(alias)
    if alias not in document.aliases:
        raise KeyringError(f"the keyring has no alias {alias!r}")
