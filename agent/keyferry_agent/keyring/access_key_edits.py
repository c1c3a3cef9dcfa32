"""Changes to the access keys of a keyring's document. Each change is complete, or leaves the document unchanged."""

from typing import Final

from .access_keys import (
    AccessKeyEntry,
    check_access_key_id,
    check_secret,
    new_access_key_id,
    new_secret,
    random_text,
)
from .document import Document, KeyringError, check_description, now

__all__ = ["create_access_key", "delete_access_key", "disable_access_key", "enable_access_key", "import_access_key"]

_TOKEN_LENGTH: Final = 64


def create_access_key(document: Document, *, token: bool = False, description: str = "") -> AccessKeyEntry:
    """Add a fresh access key, and with `token` one that also has a SecurityToken. Raises `KeyringError`."""
    token_text = random_text(_TOKEN_LENGTH) if token else bytearray()
    return _add(document, new_access_key_id(temporary=token), new_secret(), token_text, description)


def import_access_key(
    document: Document, access_key_id: str, secret: bytearray, *, description: str = ""
) -> AccessKeyEntry:
    """Add an access key that exists elsewhere. Raises `KeyringError`, which does not quote the secret."""
    check_access_key_id(access_key_id)
    return _add(document, access_key_id, check_secret(secret, "the secret"), bytearray(), description)


def enable_access_key(document: Document, access_key_id: str) -> AccessKeyEntry:
    """Enable an access key. Raises `KeyringError` if the keyring does not have it."""
    return _switch(document, access_key_id, enabled=True)


def disable_access_key(document: Document, access_key_id: str) -> AccessKeyEntry:
    """Disable an access key: gateways refuse it. Raises `KeyringError` if the keyring does not have it."""
    return _switch(document, access_key_id, enabled=False)


def delete_access_key(document: Document, access_key_id: str) -> AccessKeyEntry:
    """Remove an access key, and its secret with it. Raises `KeyringError` if the keyring does not have it."""
    access_key = _find(document, access_key_id)
    document.access_keys.remove(access_key)
    return access_key


def _add(
    document: Document, access_key_id: str, secret: bytearray, token: bytearray, description: str
) -> AccessKeyEntry:
    check_description(description)
    if any(access_key.access_key_id == access_key_id for access_key in document.access_keys):
        raise KeyringError(f"the keyring has an access key {access_key_id!r} already")
    access_key = AccessKeyEntry(access_key_id, now(), secret, token, description=description)
    document.access_keys.append(access_key)
    return access_key


def _switch(document: Document, access_key_id: str, *, enabled: bool) -> AccessKeyEntry:
    access_key = _find(document, access_key_id)
    access_key.enabled = enabled
    return access_key


def _find(document: Document, access_key_id: str) -> AccessKeyEntry:
    for access_key in document.access_keys:
        if access_key.access_key_id == access_key_id:
            return access_key
    raise KeyringError(f"the keyring has no access key {access_key_id!r}; `list-access-keys` prints those that it has")
