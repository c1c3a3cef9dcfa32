"""Chooses a token of a PKCS#11 library by label, by serial number, by slot, or by a PKCS#11 URI (RFC 7512).

A token must have every attribute that the caller names. Two tokens that fit are an error, because a guess could put a key
pair into the wrong token. Cryptoki pads its texts with spaces to a fixed size; the spaces are not part of an attribute. This
module does not require python-pkcs11.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self
from urllib.parse import unquote_to_bytes

from .interface import ModuleError

__all__ = ["FoundToken", "TokenChoice", "choose"]

_PADDING: Final = " \0"
"""Characters of padding: Cryptoki pads with spaces, and some libraries pad with zero bytes."""
_MAX_SLOT: Final = 2**64 - 1
_URI_ATTRIBUTES: Final = {
    "token": "label",
    "serial": "serial",
    "slot-id": "slot",
    "model": "model",
    "manufacturer": "manufacturer",
}
_ARGUMENTS_INSTEAD: Final = {
    "object": "key_label",
    "id": "key_label",
    "type": "key_label",
    "pin-value": "pin_file or pin",
    "pin-source": "pin_file or pin",
    "module-path": "the library's path",
    "module-name": "the library's path",
}
"""Attributes of a URI that are not read, and the argument of `Pkcs11Module.open` that a caller uses instead."""


class FoundToken(NamedTuple):
    """A token of a library, with the attributes by which a caller can choose it; `token` is python-pkcs11's object."""

    slot: int
    label: str
    serial: str
    model: str
    manufacturer: str
    is_initialized: bool
    token: Any

    def __str__(self) -> str:
        state = "" if self.is_initialized else ", not initialised"
        return f"{self.label!r} (slot {self.slot}, serial number {self.serial!r}{state})"


class TokenChoice(NamedTuple):
    """The attributes that a caller requires of a token; None means any value."""

    label: str | None = None
    serial: str | None = None
    slot: int | None = None
    model: str | None = None
    manufacturer: str | None = None

    @classmethod
    def of(cls, *, label: str | None, serial: str | None, slot: int | None, uri: str | None) -> Self:
        """Return the choice for the arguments of `Pkcs11Module.open`. Raises ValueError or TypeError."""
        if slot is not None and (isinstance(slot, bool) or not isinstance(slot, int)):
            raise TypeError(f"slot must be an integer, the slot's ID, not {slot!r}")
        if slot is not None and not 0 <= slot <= _MAX_SLOT:
            raise ValueError(f"slot must be an ID from 0 to {_MAX_SLOT}, not {slot}")
        attributes: dict[str, Any] = {}
        if label is not None:
            attributes["label"] = _text("token_label", label)
        if serial is not None:
            attributes["serial"] = _text("token_serial", serial)
        if slot is not None:
            attributes["slot"] = slot
        for name, value in _read_uri(uri).items() if uri is not None else ():
            if attributes.setdefault(name, value) != value:
                raise ValueError(f"token_uri requires the {name} {value!r}, and another argument {attributes[name]!r}")
        if not attributes:
            raise ValueError("no token is chosen; pass token_label, token_serial, slot or token_uri")
        return cls(**attributes)

    def __str__(self) -> str:
        """Return the words after "the token" in a message: 'app' with serial number '0001' in slot 3."""
        texts = [
            None if self.label is None else repr(self.label),
            None if self.serial is None else f"with serial number {self.serial!r}",
            None if self.model is None else f"of model {self.model!r}",
            None if self.manufacturer is None else f"by manufacturer {self.manufacturer!r}",
            None if self.slot is None else f"in slot {self.slot}",
        ]
        return " ".join(filter(None, texts))

    def required(self) -> Iterable[tuple[str, str | int]]:
        """Yield the name and value of each attribute that a token must have."""
        return ((name, value) for name, value in zip(self._fields, self, strict=True) if value is not None)

    def fits(self, token: FoundToken) -> bool:
        """Return whether a token has every required attribute."""
        return all(_has(token, name, value) for name, value in self.required())


def choose(
    choice: TokenChoice, path: str, tokens: Sequence[FoundToken], other_slots: Callable[[], Mapping[int, str]]
) -> Any:
    """Return python-pkcs11's object of the one token that fits. Raises `ModuleError`, which lists the existing tokens.

    `other_slots` returns the slots without one of the tokens, each with the reason; it is called only for a message.
    """
    matches = [token for token in tokens if choice.fits(token)]
    if len(matches) > 1:
        serials = {token.serial for token in matches}
        argument = "token_serial or slot" if len(serials) == len(matches) and "" not in serials else "slot"
        token_list = "; ".join(map(str, matches))
        raise ModuleError(
            f"{path} has {len(matches)} tokens {choice}: {token_list}. Choose one of them with {argument}"
        )
    if not matches:
        raise ModuleError(_nothing_fits(choice, path, tokens, other_slots()))
    [token] = matches
    if not token.is_initialized:
        raise ModuleError(
            f"the token {choice} of {path} is not initialised; initialise it (softhsm2-util --init-token, pkcs11-tool "
            "--init-token, or its vendor's program) or choose another one"
        )
    return token.token


def _nothing_fits(choice: TokenChoice, path: str, tokens: Sequence[FoundToken], other_slots: Mapping[int, str]) -> str:
    token_list = (
        "; ".join([*map(str, tokens), *(f"slot {slot}: {reason}" for slot, reason in other_slots.items())]) or "none"
    )
    if choice.slot is not None and choice.slot in other_slots:
        reason = other_slots[choice.slot]
        return f"{path} has no token in slot {choice.slot} ({reason}): insert one or choose another slot; it has: {token_list}"
    message = f"{path} has no token {choice}; it has: {token_list}"
    if other_slots:
        message += ". Without a token: " + "; ".join(f"slot {slot} ({reason})" for slot, reason in other_slots.items())
    conditions = list(choice.required())
    if len(conditions) > 1 and all(any(_has(token, *condition) for token in tokens) for condition in conditions):
        message += ". The attributes that were required contradict each other: no token has all of them"
    return message


def _has(token: FoundToken, name: str, value: str | int) -> bool:
    attribute = getattr(token, name)
    return bool((attribute.strip(_PADDING) if isinstance(attribute, str) else attribute) == value)


def _text(argument: str, value: str) -> str:
    """Return an attribute without its padding. Raises ValueError for an empty text, which would fit every unnamed token."""
    text = value.strip(_PADDING)
    if not text:
        raise ValueError(f"{argument} must not be empty")
    return text


def _read_uri(uri: str) -> dict[str, str | int]:
    """Return the attributes of a token in a PKCS#11 URI. Raises ValueError, whose text never contains a value of the URI.

    A value can be a PIN: of `pin-value`, or of an attribute with a misspelt name.
    """
    scheme, colon, attributes = uri.partition(":")
    if scheme.lower() != "pkcs11" or not colon:
        raise ValueError("token_uri does not begin with pkcs11: (RFC 7512)")
    path, _, query = attributes.partition("?")
    fields: dict[str, str | int] = {}
    for attribute in [*filter(None, path.split(";")), *filter(None, query.split("&"))]:
        name, equals, value = attribute.partition("=")
        if name in _ARGUMENTS_INSTEAD:
            raise ValueError(f"token_uri has {name}, which is not read; pass {_ARGUMENTS_INSTEAD[name]} as an argument")
        field = _URI_ATTRIBUTES.get(name)
        if field is None or not equals or field in fields:
            names = ", ".join(_URI_ATTRIBUTES)
            raise ValueError(
                f"token_uri has an attribute that is unknown, that occurs twice, or that has no value; expected: {names}"
            )
        fields[field] = _slot(value) if field == "slot" else _text(f"{name} of token_uri", _decode(value))
    return fields


def _decode(value: str) -> str:
    try:
        return unquote_to_bytes(value).decode()
    except UnicodeDecodeError:
        raise ValueError("token_uri has an attribute that is not UTF-8") from None


def _slot(value: str) -> int:
    if not (value.isascii() and value.isdecimal()) or int(value) > _MAX_SLOT:
        raise ValueError("slot-id of token_uri is not a decimal number of a slot")
    return int(value)
