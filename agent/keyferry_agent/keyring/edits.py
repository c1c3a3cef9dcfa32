"""Changes to a keyring's document. Each change is complete, or leaves the document unchanged. No files, sealing or printing.

The cloud's table defines the operations that each state allows. The cloud's codes (`Rejected.StateModifiedFailed` and others)
begin the messages.
"""

import os
from datetime import UTC, datetime, timedelta
from typing import Final

from ..crypto.ciphertext_blob import KEY_SIZES
from .document import (
    Document,
    KeyEntry,
    KeyringError,
    VersionEntry,
    check_alias,
    check_description,
    iso,
    new_id,
    now,
)

__all__ = [
    "DAYS",
    "cancel_deletion",
    "create_alias",
    "create_key",
    "delete_alias",
    "disable",
    "disable_version",
    "enable",
    "enable_version",
    "import_key",
    "promote",
    "rotate",
    "schedule_deletion",
    "update_alias",
]

DAYS: Final = range(7, 367)
"""Days that a scheduled deletion can wait (the cloud's limits)."""


# --- keys -------------------------------------------------------------------------------------------------------------


def create_key(document: Document, *, key_spec: str, alias: str | None = None, description: str = "") -> KeyEntry:
    """Add a key with one fresh version, and with `alias` unless it is None. Raises `KeyringError` if the alias exists."""
    return _add(document, key_spec, bytearray(os.urandom(KEY_SIZES[key_spec])), "Aliyun_KMS", alias, description)


def import_key(
    document: Document, material: bytearray, *, key_spec: str | None, alias: str | None = None, description: str = ""
) -> KeyEntry:
    """Add a key with imported material: 32 bytes for Aliyun_AES_256, 16 for Aliyun_SM4. Raises `KeyringError`."""
    specs = {size: spec for spec, size in KEY_SIZES.items()}
    spec = specs.get(len(material))
    if spec is None or key_spec not in (None, spec):
        sizes = f"{KEY_SIZES[key_spec]} ({key_spec})" if key_spec else "32 (Aliyun_AES_256) or 16 (Aliyun_SM4)"
        size = f"{len(material)} bytes" if len(material) <= 64 else "more than 64 bytes"
        raise KeyringError(f"the material has {size}; {sizes} raw bytes are expected")
    return _add(document, spec, material, "EXTERNAL", alias, description)


def _add(
    document: Document, key_spec: str, material: bytearray, origin: str, alias: str | None, description: str
) -> KeyEntry:
    check_description(description)
    if alias is not None:
        _check_new(document, alias)
    date = now()
    version = VersionEntry(new_id(), date, material)
    key = KeyEntry(
        key_id=new_id(),
        key_spec=key_spec,
        created=date,
        versions=[version],
        primary=version.version_id,
        description=description,
        origin=origin,
    )
    document.keys.append(key)
    if alias is not None:
        document.aliases[alias] = key.key_id
    return key


# --- versions ---------------------------------------------------------------------------------------------------------


def rotate(document: Document, key_id: str, *, stage: bool = False) -> KeyEntry:
    """Add a fresh version, which becomes the primary version. With `stage`, the version only decrypts until it is promoted.

    Raises `KeyringError` for a key that is not enabled.
    """
    key = _enabled(document.find(key_id))
    version = VersionEntry(new_id(), now(), bytearray(os.urandom(KEY_SIZES[key.key_spec])), staged=stage)
    key.versions.append(version)
    if not stage:
        key.primary = version.version_id
    return key


def promote(document: Document, key_id: str, version_id: str) -> KeyEntry:
    """Make a staged version the primary version. Raises `KeyringError` for a version that is disabled or not staged."""
    key = _enabled(document.find(key_id))
    version = _version(key, version_id)
    if version.disabled:
        raise KeyringError(f"Rejected.Disabled: {version_id} is disabled; run `enable-version` first")
    if not version.staged:
        reason = (
            "is the primary version already" if key.primary == version_id else "was primary before: it is not staged"
        )
        raise KeyringError(f"{version_id} {reason}")
    version.staged = False
    key.primary = version_id
    return key


def disable_version(document: Document, key_id: str, version_id: str, *, confirmed: bool) -> KeyEntry:
    """Disable a version: it no longer decrypts. Raises `KeyringError` for the primary version, and unless `confirmed`."""
    key = _switchable(document.find(key_id))
    version = _version(key, version_id)
    if version_id == key.primary:
        raise KeyringError(f"{version_id} is the primary version, which encrypts; run `rotate` first")
    if not confirmed and not version.disabled:
        raise KeyringError(
            f"nothing was changed: without {version_id}, everything that it encrypted fails with Rejected.Disabled in every "
            f"agent that loads this keyring, until `enable-version`. `keyferry-agent audit who --key {key_id}` counts what "
            "callers still decrypt under it, `keyferry records list` shows the records under it, `keyferry records rewrap` "
            "moves them, and `keyferry reencrypt-file` moves files. Then repeat this with --yes"
        )
    version.disabled = True
    return key


def enable_version(document: Document, key_id: str, version_id: str) -> KeyEntry:
    """Enable a version: it decrypts again. Raises `KeyringError`."""
    key = _switchable(document.find(key_id))
    _version(key, version_id).disabled = False
    return key


def _version(key: KeyEntry, version_id: str) -> VersionEntry:
    for version in key.versions:
        if version.version_id == version_id:
            return version
    raise KeyringError(f"Forbidden.KeyVersionNotFound: {key.key_id} has no version {version_id!r}")


# --- states -----------------------------------------------------------------------------------------------------------


def enable(document: Document, key_id: str) -> KeyEntry:
    """Enable a key. Raises `KeyringError` for a key that is scheduled for deletion or waits for its material."""
    return _switch(document, key_id, "Enabled")


def disable(document: Document, key_id: str) -> KeyEntry:
    """Disable a key. Raises `KeyringError` for a key that is scheduled for deletion or waits for its material."""
    return _switch(document, key_id, "Disabled")


def _switch(document: Document, key_id: str, state: str) -> KeyEntry:
    key = _switchable(document.find(key_id))
    key.state = state
    return key


def schedule_deletion(document: Document, key_id: str, days: int) -> KeyEntry:
    """Disable a key at once, and schedule its deletion in `days` days, 7 to 366. Raises `KeyringError`."""
    if days not in DAYS:
        raise KeyringError(f"{days} days; {DAYS[0]} to {DAYS[-1]} are allowed")
    key = document.find(key_id)
    if key.state == "PendingDeletion":
        raise _state_modified_failed(key)
    key.state, key.delete_date = "PendingDeletion", iso(datetime.now(UTC) + timedelta(days=days))
    return key


def cancel_deletion(document: Document, key_id: str) -> KeyEntry:
    """Cancel the deletion of a key, and enable the key. Raises `KeyringError` for a key that is not scheduled for deletion."""
    key = document.find(key_id)
    if key.state != "PendingDeletion":
        raise _state_modified_failed(key)
    key.state, key.delete_date = "Enabled", ""
    return key


# --- aliases ----------------------------------------------------------------------------------------------------------


def create_alias(document: Document, alias: str, key_id: str) -> KeyEntry:
    """Add an alias to a key. Raises `KeyringError` if the alias exists, or the key is scheduled for deletion."""
    _check_new(document, alias)
    key = document.find(key_id)
    if key.state == "PendingDeletion":
        raise _state_modified_failed(key)
    document.aliases[alias] = key.key_id
    return key


def update_alias(document: Document, alias: str, key_id: str) -> KeyEntry:
    """Point an alias to another key. Raises `KeyringError` if the alias is missing, or that key is scheduled for deletion."""
    _check_existing(document, alias)
    key = document.find(key_id)
    if key.state == "PendingDeletion":
        raise _rejected(key)
    document.aliases[alias] = key.key_id
    return key


def delete_alias(document: Document, alias: str) -> KeyEntry:
    """Delete an alias, but not its key. Raises `KeyringError` if the alias does not exist."""
    _check_existing(document, alias)
    key = document.find(alias)
    del document.aliases[alias]
    return key


def _switchable(key: KeyEntry) -> KeyEntry:
    if key.state not in ("Enabled", "Disabled"):
        raise _state_modified_failed(key)
    return key


def _enabled(key: KeyEntry) -> KeyEntry:
    if key.state != "Enabled":
        raise _rejected(key)
    return key


def _rejected(key: KeyEntry) -> KeyringError:
    return KeyringError(f"Rejected.{key.state}: the state of {key.key_id} is {key.state}")


def _state_modified_failed(key: KeyEntry) -> KeyringError:
    return KeyringError(f"Rejected.StateModifiedFailed: the state of {key.key_id} is {key.state}")


def _check_new(document: Document, alias: str) -> None:
    check_alias(alias)
    if alias in document.aliases:
        raise KeyringError(f"{alias} exists already, for {document.aliases[alias]}")


def _check_existing(document: Document, alias: str) -> None:
    check_alias(alias)
    if alias not in document.aliases:
        raise KeyringError(f"the keyring has no alias {alias!r}")
