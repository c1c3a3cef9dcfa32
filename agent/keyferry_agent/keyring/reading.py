"""Strict reading of a keyring's JSON: each object field by field, by name and type. Errors never quote a value.

docs/keyring.md specifies the format.
"""

import uuid
from datetime import datetime
from typing import Any, Final

from keyferry.parameters import decode_base64

__all__ = ["DATE_FORMAT", "KeyringError", "ObjectReader", "check_description"]

DATE_FORMAT: Final = "%Y-%m-%dT%H:%M:%SZ"
_MAX_DESCRIPTION_LENGTH: Final = 8_192
_MAX_SHOWN: Final = 24
"""Most unknown fields that a message names, and most characters of each."""


class KeyringError(Exception):
    """The keyring cannot be read, is not valid, or does not allow the change. The message is for the operator."""


class ObjectReader:
    """Reads the fields of one JSON object by name and type; `done` refuses fields that were not read."""

    def __init__(self, path: str, raw: Any) -> None:
        if not isinstance(raw, dict):
            raise KeyringError(f"{path}: an object is expected")
        self.path = path
        self._raw = raw
        self._taken: set[str] = set()

    def _take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        self._taken.add(name)
        value = self._raw.get(name, default)
        if not isinstance(value, kind):
            raise KeyringError(f"{self.path}.{name}: missing, or of the wrong type")
        return value

    def string(self, name: str, *, default: str | None = None) -> str:
        value: str = self._take(name, str, default)
        return value

    def boolean(self, name: str, *, default: bool | None = None) -> bool:
        value: bool = self._take(name, bool, default)
        return value

    def strings(self, name: str) -> list[str]:
        values: list[str] = self._take(name, list)
        if not all(isinstance(value, str) for value in values):
            raise KeyringError(f"{self.path}.{name}: strings are expected")
        return values

    def mapping(self, name: str, *, default: dict[str, str] | None = None) -> dict[str, str]:
        values: dict[str, str] = self._take(name, dict, default)
        if not all(isinstance(value, str) for value in values.values()):
            raise KeyringError(f"{self.path}.{name}: strings are expected")
        return values

    def objects(self, name: str, *, default: list[Any] | None = None) -> list["ObjectReader"]:
        entries = self._take(name, list, default)
        return [ObjectReader(f"{self.path}.{name}[{i}]", entry) for i, entry in enumerate(entries)]

    def base64(self, name: str, sizes: range) -> bytearray:
        """Return the bytes of a Base64 text, whose number is in `sizes`."""
        text = self.string(name)
        try:
            content_bytes = bytearray(decode_base64(text))
        except ValueError:
            content_bytes = bytearray()
        if len(content_bytes) not in sizes:
            expected = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
            raise KeyringError(f"{self.path}.{name}: not the Base64 of {expected} bytes")
        return content_bytes

    def one_of(self, name: str, values: tuple[str, ...]) -> str:
        value = self.string(name)
        if value not in values:
            raise KeyringError(f"{self.path}.{name}: one of {', '.join(values)} is expected")
        return value

    def uuid(self, name: str) -> str:
        value = self.string(name)
        try:
            if str(uuid.UUID(value)) == value:
                return value
        except ValueError:
            pass
        raise KeyringError(f"{self.path}.{name}: a lower-case UUID is expected")

    def date(self, name: str, *, may_be_empty: bool = False) -> str:
        value = self.string(name)
        if may_be_empty and not value:
            return value
        try:
            if datetime.strptime(value, DATE_FORMAT).strftime(DATE_FORMAT) != value:  # noqa: DTZ007
                raise ValueError  # strptime also accepts 2026-1-1
        except ValueError:
            raise KeyringError(f"{self.path}.{name}: a date like 2026-01-31T12:00:00Z is expected") from None
        return value

    def unknown(self, *extra_names: str) -> dict[str, Any]:
        """Return the fields that were not read, except those in `extra_names`."""
        return {name: value for name, value in self._raw.items() if name not in self._taken and name not in extra_names}

    def done(self, *extra_names: str) -> None:
        """Raise `KeyringError` if there are fields that were not read, except those in `extra_names`."""
        unknown_names = self.unknown(*extra_names)
        if unknown_names:
            names = sorted(name[:_MAX_SHOWN] for name in unknown_names)[:_MAX_SHOWN]
            raise KeyringError(f"{self.path}: unknown fields {names}: written by a newer program?")


def check_description(description: str) -> None:
    """Raise `KeyringError` unless a description has at most 8,192 characters, all of them printable."""
    if len(description) > _MAX_DESCRIPTION_LENGTH or not description.isprintable():
        raise KeyringError(f"a description has at most {_MAX_DESCRIPTION_LENGTH} characters, all of them printable")
