"""The names of master keys: from the keyring as it is now, and from the audit log as they were when it was written."""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

from keyferry.private_files import owner_of

from ..config.settings import Settings
from ..keyring import file
from ..keyring.document import Document, KeyringError
from ..keyring.sealing import Unsealer
from .announcements import names_in

__all__ = ["LoggedNames", "Period", "open_keyring", "plain_name"]


_KEY_ID: Final = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


class Period(NamedTuple):
    """The first and the last time at which an entry has a name for a key; None where an entry has no time."""

    first: datetime | None
    last: datetime | None

    def __str__(self) -> str:
        first, last = (time.isoformat(timespec="seconds") if time else "an unknown time" for time in self)
        return f"at {first}" if first == last else f"from {first} to {last}"

    def joined(self, other: "Period") -> "Period":
        """Return the period that has both."""
        firsts = [time for time in (self.first, other.first) if time is not None]
        lasts = [time for time in (self.last, other.last) if time is not None]
        return Period(min(firsts, default=None), max(lasts, default=None))


class LoggedNames:
    """Which alias named which key, by the `audit.keys` entries of an audit log."""

    def __init__(self) -> None:
        self.aliases: dict[str, dict[str, Period]] = {}
        """For each alias the IDs of the keys that it has named, and when."""
        self._newest: datetime | None = None

    def take(self, fields: Mapping[str, Any], time: datetime | None) -> None:
        """Take the names in an entry, if it has any."""
        names = names_in(fields)
        if names and time is not None and (self._newest is None or time > self._newest):
            self._newest = time
        for key_id, aliases in names.items():
            for alias in aliases:
                self._add(alias, key_id, Period(time, time))

    def merge(self, others: Iterable["LoggedNames"]) -> None:
        """Take the names in other files."""
        for other in others:
            if other._newest is not None and (self._newest is None or other._newest > self._newest):
                self._newest = other._newest
            for alias, keys in other.aliases.items():
                for key_id, period in keys.items():
                    self._add(alias, key_id, period)

    def current(self, name: str) -> list[str]:
        """Return the ID and the aliases of a key by one of them, as the newest entries have them; none for another name."""
        now = {
            alias: key_id
            for alias, keys in self.aliases.items()
            for key_id, period in keys.items()
            if self._newest is not None and period.last == self._newest
        }
        key_id = now.get(name, name)
        aliases = [alias for alias, owner in now.items() if owner == key_id]
        return [key_id, *aliases] if aliases else []

    def _add(self, alias: str, key_id: str, period: Period) -> None:
        keys = self.aliases.setdefault(alias, {})
        keys[key_id] = keys[key_id].joined(period) if key_id in keys else period


def plain_name(name: str) -> str:
    """Return the key ID or alias in an ARN, or behind `key/`; an ID in lower case, as the agent writes it."""
    plain = (name.rpartition(":")[2] if name.startswith("acs:") else name).removeprefix("key/")
    return plain.lower() if _KEY_ID.fullmatch(plain) else plain


def open_keyring(settings: Settings | None) -> Document:
    """Read the keyring of a configuration, as it is now. Raises `KeyringError`, with the reason, where that is impossible."""
    if settings is None:
        raise KeyringError("no configuration is given: --config leads to the keyring")
    if settings.keyring is None or settings.unseal is None:
        missing = "keyring" if settings.keyring is None else "unseal"
        if settings.unseal_socket is not None:
            raise KeyringError('an operator has the secret that opens the keyring (unseal = "manual")')
        raise KeyringError(f"the configuration has no {missing}")
    try:
        return file.read(settings.keyring, Unsealer.read(settings.unseal, owner_of(settings.keyring)))
    except OSError as error:
        raise KeyringError(f"{error.filename or settings.keyring}: {error.strerror}") from None
