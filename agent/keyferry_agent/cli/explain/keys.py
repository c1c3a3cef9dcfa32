"""Find all names by which a grant can refer to a key, in the keyring or else in the audit log."""

from typing import NamedTuple

from ...audit.key_names import LoggedNames, open_keyring, plain_name
from ...audit.query import NamesOnly, names_of
from ...chained_log.chain import ChainError
from ...config.settings import Settings
from ...keyring.document import KeyringError
from ..audit.opening import open_history

__all__ = ["Keys", "find_keys"]


class Keys(NamedTuple):
    """The names of a key.

    `shown`: the text to print. `missing`: a name that the keyring does not have, or empty. `state`: the key's state. `notes`:
    messages about the source of the names.
    """

    names: tuple[str, ...]
    shown: str
    missing: str = ""
    state: str = "Enabled"
    notes: tuple[str, ...] = ()


def find_keys(key_names: list[str], settings: Settings, audit_names: LoggedNames | None = None) -> Keys:
    """Return all names of the key with these IDs, ARNs or aliases. Raises `ChainError` if they belong to different keys.

    `audit_names`: the names in an audit log, if it was read already.
    """
    plain_names = list(dict.fromkeys(map(plain_name, key_names)))
    label = ", ".join(key_names)
    try:
        document = open_keyring(settings)
    except KeyringError as error:
        why = f"the keyring was not read: {error}"
        names = audit_names if audit_names is not None else _logged(settings)
        current_names = [name for plain_text in plain_names for name in names.current(plain_text)]
        source = (
            "the key's other names are from the audit log"
            if current_names
            else "only the names on the command line are judged"
        )
        return Keys(_names([*plain_names, *current_names], settings), label, notes=(f"{why}; {source}",))
    aliases = document.aliases_by_key()
    entries = {}
    for name in plain_names:
        try:
            entry = document.find(name)
        except KeyringError:
            return Keys(_names(plain_names, settings), label, missing=name)
        entries[entry.key_id] = entry
    if len(entries) > 1:
        raise ChainError(f"--key names {len(entries)} different keys: {', '.join(entries)}")
    (entry,) = entries.values()
    entry_names = [entry.key_id, *aliases.get(entry.key_id, [])]
    other_names = [name for name in entry_names if name not in plain_names]
    if other_names:
        label += f" ({', '.join(other_names)})"
    return Keys(_names([*plain_names, *entry_names], settings), label, state=entry.state)


def _logged(settings: Settings) -> LoggedNames:
    if settings.audit.path == "stderr":
        return LoggedNames()
    try:
        history = open_history([], settings, NamesOnly)
    except (ChainError, OSError):
        return LoggedNames()
    return names_of(tally for tally in history.tallies if isinstance(tally, NamesOnly))


def _names(plain_names: list[str], settings: Settings) -> tuple[str, ...]:
    """Return each name and its ARN, as the agent compares them with grants."""
    return tuple(dict.fromkeys(full_name for name in plain_names for full_name in settings.names_of(name)))
