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


def find_keys(given: list[str], settings: Settings, logged: LoggedNames | None = None) -> Keys:
    """Return all names of the key with these IDs, ARNs or aliases. Raises `ChainError` if they belong to different keys.

    `logged`: the names in an audit log, if it was read already.
    """
    plain = list(dict.fromkeys(map(plain_name, given)))
    shown = ", ".join(given)
    try:
        document = open_keyring(settings)
    except KeyringError as error:
        why = f"the keyring was not read: {error}"
        names = logged if logged is not None else _logged(settings)
        found = [name for each in plain for name in names.current(each)]
        source = (
            "the key's other names are from the audit log" if found else "only the names on the command line are judged"
        )
        return Keys(_names([*plain, *found], settings), shown, notes=(f"{why}; {source}",))
    aliases = document.aliases_by_key()
    entries = {}
    for name in plain:
        try:
            entry = document.find(name)
        except KeyringError:
            return Keys(_names(plain, settings), shown, missing=name)
        entries[entry.key_id] = entry
    if len(entries) > 1:
        raise ChainError(f"--key names {len(entries)} different keys: {', '.join(entries)}")
    (entry,) = entries.values()
    names_now = [entry.key_id, *aliases.get(entry.key_id, [])]
    also = [name for name in names_now if name not in plain]
    if also:
        shown += f" ({', '.join(also)})"
    return Keys(_names([*plain, *names_now], settings), shown, state=entry.state)


def _logged(settings: Settings) -> LoggedNames:
    if settings.audit.path == "stderr":
        return LoggedNames()
    try:
        history = open_history([], settings, NamesOnly)
    except (ChainError, OSError):
        return LoggedNames()
    return names_of(each for each in history.tallies if isinstance(each, NamesOnly))


def _names(plain: list[str], settings: Settings) -> tuple[str, ...]:
    """Return each name and its ARN, as the agent compares them with grants."""
    return tuple(dict.fromkeys(each for name in plain for each in settings.names_of(name)))
