"""The names of master keys: the current names from the keyring, and the names at the time of each entry from the audit log."""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

from keyferry.private_files import owner_of

from ..config.settings import Settings
from ..keyring import file
from ..keyring.document import Document, KeyringError
from ..keyring.sealing import Unsealer
from .agent_entries import names_in

__all__ = ["LoggedNames", "Period", "open_keyring", "plain_name"]


_KEY_ID: Final = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


class Period(NamedTuple):
    """The first and the last time at which an entry has a name for a key. None for an entry without a time."""

    first: datetime | None
    last: datetime | None

    def __str__(self) -> str:
        first_time, last_time = (time.isoformat(timespec="seconds") if time else "an unknown time" for time in self)
        return f"at {first_time}" if first_time == last_time else f"from {first_time} to {last_time}"

    def joined(self, other: "Period") -> "Period":
        """Return the shortest period that contains both periods."""
        first_times = [time for time in (self.first, other.first) if time is not None]
        last_times = [time for time in (self.last, other.last) if time is not None]
        return Period(min(first_times, default=None), max(last_times, default=None))


class LoggedNames:
    """The keys that each alias has named, by the `audit.keys` entries of an audit log."""

    def __init__(self) -> None:
        self.aliases: dict[str, dict[str, Period]] = {}
        """For each alias, the IDs of the keys that it has named, with the periods."""
        self.newest: datetime | None = None

    def take(self, fields: Mapping[str, Any], time: datetime | None) -> None:
        """Add the names in an entry, if it contains any."""
        names = names_in(fields)
        if names and time is not None and (self.newest is None or time > self.newest):
            self.newest = time
        for key_id, aliases in names.items():
            for alias in aliases:
                self._add(alias, key_id, Period(time, time))

    def merge(self, others: Iterable["LoggedNames"]) -> None:
        """Add the names from other files."""
        for other in others:
            if other.newest is not None and (self.newest is None or other.newest > self.newest):
                self.newest = other.newest
            for alias, keys in other.aliases.items():
                for key_id, period in keys.items():
                    self._add(alias, key_id, period)

    def current(self, name: str) -> list[str]:
        """Return the ID and all aliases of the key with the ID or alias `name`, by the newest entries. Empty if unknown."""
        key_ids = {
            alias: key_id
            for alias, keys in self.aliases.items()
            for key_id, period in keys.items()
            if self.newest is not None and period.last == self.newest
        }
        key_id = key_ids.get(name, name)
        aliases = [alias for alias, owner in key_ids.items() if owner == key_id]
        return [key_id, *aliases] if aliases else []

    def _add(self, alias: str, key_id: str, period: Period) -> None:
        keys = self.aliases.setdefault(alias, {})
        keys[key_id] = keys[key_id].joined(period) if key_id in keys else period


def plain_name(name: str) -> str:
    """Return the key ID or alias in an ARN, or after `key/`. An ID is in lower case, as the agent writes it."""
    key_name = (name.rpartition(":")[2] if name.startswith("acs:") else name).removeprefix("key/")
    return key_name.lower() if _KEY_ID.fullmatch(key_name) else key_name


def open_keyring(settings: Settings | None) -> Document:
    """Read the current keyring of a configuration. Raises `KeyringError` with the reason if that is impossible."""
    if settings is None:
        raise KeyringError("--config is missing, which names the keyring")
    if settings.keyring is None or settings.unseal is None:
        setting = "keyring" if settings.keyring is None else "unseal"
        if settings.unseal_socket is not None:
            raise KeyringError('an operator has the secret that opens the keyring (unseal = "manual")')
        raise KeyringError(f"the configuration has no {setting}")
    try:
        return file.read(settings.keyring, Unsealer.read(settings.unseal, owner_of(settings.keyring)))
    except OSError as error:
        raise KeyringError(f"{error.filename or settings.keyring}: {error.strerror}") from None
