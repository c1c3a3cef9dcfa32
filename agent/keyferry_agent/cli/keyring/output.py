"""The output of the verbs of `keyferry-agent keyring`: one JSON document with the API's names, or readable text."""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from keyferry.stdout import complain, show, show_json

from ...keyring.document import KeyEntry, VersionEntry

__all__ = ["PROGRAM", "metadata", "print_result", "version_of", "versions_of", "warn"]

PROGRAM: Final = "keyferry-agent"


def print_result(arguments: argparse.Namespace, result: dict[str, Any]) -> int:
    """Print a verb's result, and return the exit code."""
    if arguments.json:
        return show_json(PROGRAM, result)
    return show(PROGRAM, "\n".join(_for_people(result)))


def warn(message: str) -> None:
    """Print a warning on standard error."""
    complain(PROGRAM, f"warning: {message}")


def version_of(key: KeyEntry, version: VersionEntry) -> dict[str, Any]:
    """Return a version of a key, without its material."""
    return {
        "KeyId": key.key_id,
        "KeyVersionId": version.version_id,
        "CreationDate": version.created,
        "Staged": version.staged,
        "Disabled": version.disabled,
    }


def versions_of(key: KeyEntry) -> dict[str, Any]:
    """Return all versions of a key."""
    return {"KeyVersions": {"KeyVersion": [version_of(key, version) for version in key.versions]}}


def metadata(key: KeyEntry, aliases: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return a key's metadata, without its versions. `aliases`: the result of `Document.aliases_by_key`."""
    fields = key.describe(aliases.get(key.key_id, ())).to_json()
    versions = fields.pop("KeyVersions")
    fields["DisabledKeyVersions"] = [version["KeyVersionId"] for version in versions if version.get("Disabled")]
    return fields


def _for_people(result: dict[str, Any]) -> Iterator[str]:
    if "Keys" in result:
        keys = result["Keys"]["Key"]
        yield from _table(
            ("KEY ID", "KEY SPEC", "STATE", "ALIASES"),
            ((key["KeyId"], key["KeySpec"], _state(key), ", ".join(key["Aliases"])) for key in keys),
        )
        return
    if "AccessKeys" in result:
        access_keys = result["AccessKeys"]["AccessKey"]
        yield from _table(
            ("ACCESS KEY ID", "STATUS", "CREATED", "DESCRIPTION"),
            ((key["AccessKeyId"], key["Status"], key["CreationDate"], key["Description"]) for key in access_keys),
        )
        return
    if "SealedTo" in result or "Identity" in result:  # lines that --recipients-file reads
        yield from ["# sealed to a passphrase"] if result.get("SealedTo") == "Passphrase" else result["Recipients"]
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
                (version["KeyVersionId"], version["CreationDate"], _role(version, primary))
                for version in result["KeyVersions"]["KeyVersion"]
            ),
        )


def _state(key: dict[str, Any]) -> str:
    disabled_count = len(key["DisabledKeyVersions"])
    return f"{key['KeyState']}" + (
        f" ({disabled_count} disabled version{'s' if disabled_count > 1 else ''})" if disabled_count else ""
    )


def _role(version: dict[str, Any], primary: str) -> str:
    roles = (
        ("primary", version["KeyVersionId"] == primary),
        ("staged", version["Staged"]),
        ("disabled", version["Disabled"]),
    )
    return ", ".join(role for role, applies in roles if applies)


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    lines = [heading, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
