"""May this caller do this? Pure functions over the grants of the configuration. What no grant allows is refused.

A grant matches when all of it matches: whom it is `to`, the action, the key, and where it names them, the recipient's pin and
the pairs of the EncryptionContext. There are no deny rules and no order.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from keyferry.operations import OPERATIONS

from .peer import Peer

__all__ = ["ACTIONS", "PLAINTEXT", "SELECTORS", "Grant", "allows", "may_name", "to_caller"]

PLAINTEXT: Final = "plaintext"
"""The recipient of an answer that is not wrapped for anybody: the caller itself. No pin is equal to it."""

ACTIONS: Final = frozenset(
    f"kms:{name}"
    for name in (
        *(name for name in OPERATIONS if name != "ReEncrypt"),
        "ReEncryptFrom",  # ReEncrypt needs two: one on the key that opens, one on the key that seals
        "ReEncryptTo",
    )
)
"""What can be granted."""

# Who a grant is to. To add a selector: a line here, its evidence in `peer`, its value's check in `settings`.
SELECTORS: Final[Mapping[str, Callable[[Peer, Any], bool]]] = {
    "uid": lambda peer, uid: peer.uid is not None and peer.uid == uid,
    "user": lambda peer, uid: peer.uid is not None and peer.uid == uid,  # looked up when the configuration was read
    "gid": lambda peer, gid: gid in peer.gids,
    "group": lambda peer, gid: gid in peer.gids,
    "listener": lambda peer, name: peer.listener == name,
}


@dataclass(frozen=True, slots=True)
class Grant:
    """One `[[grant]]`: the same names. `recipients` None means any recipient."""

    name: str
    to: Mapping[str, Any]
    actions: tuple[str, ...]
    keys: tuple[str, ...]
    recipients: frozenset[str] | None = None
    encryption_context: Mapping[str, str] = field(default_factory=dict)
    _keys: re.Pattern[str] = field(init=False, repr=False)
    _actions: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_keys", _pattern(self.keys, part="[^/:]*"))
        object.__setattr__(self, "_actions", _pattern(self.actions, part=".*"))

    def is_to(self, peer: Peer) -> bool:
        """Whether all that `to` names matches this caller. An empty `to` is to nobody."""
        return bool(self.to) and all(SELECTORS[selector](peer, value) for selector, value in self.to.items())

    def has_action(self, action: str) -> bool:
        """Whether it covers this action."""
        return self._actions.fullmatch(action) is not None

    def has_key(self, names: Iterable[str]) -> bool:
        """Whether one of a key's names (ID, aliases, ARNs) is one of the patterns."""
        return any(self._keys.fullmatch(name) for name in names)

    def has_recipient(self, pin: str | None) -> bool:
        """Whether what leaves may go to this recipient: a pin, `PLAINTEXT`, or None when nothing secret leaves.

        A grant with pins never covers an answer in plaintext: that would be the way round them.
        """
        return self.recipients is None or pin is None or pin in self.recipients

    def has_context(self, context: Mapping[str, str] | None) -> bool:
        """Whether the pairs it demands are there; None: the operation has no context, and nothing to demand of it."""
        return context is None or all(context.get(key) == value for key, value in self.encryption_context.items())


def to_caller(grants: Iterable[Grant], peer: Peer) -> tuple[Grant, ...]:
    """The grants that are to this caller: once per connection, so that a request looks at few."""
    return tuple(grant for grant in grants if grant.is_to(peer))


def allows(
    grants: Sequence[Grant],
    action: str,
    names: Iterable[str],
    *,
    pin: str | None = None,
    context: Mapping[str, str] | None = None,
) -> Grant | None:
    """The first grant that allows the action on a key with these names, or None."""
    for grant in grants:
        if grant.has_action(action) and grant.has_key(names) and _carries(grant, pin, context):
            return grant
    return None


def may_name(
    grants: Sequence[Grant],
    action: str,
    names: Iterable[str] | None,
    *,
    pin: str | None = None,
    context: Mapping[str, str] | None = None,
) -> bool:
    """Whether some grant could allow the action on a key that does not exist, of which these names are all that is known.

    None: nothing is known. Only such a caller may learn that the key is missing.
    """
    return any(
        grant.has_action(action) and (names is None or grant.has_key(names)) and _carries(grant, pin, context)
        for grant in grants
    )


def _carries(grant: Grant, pin: str | None, context: Mapping[str, str] | None) -> bool:
    return grant.has_recipient(pin) and grant.has_context(context)


def _pattern(patterns: Iterable[str], *, part: str) -> re.Pattern[str]:
    """One expression for all patterns: a sole `*` is everything, else `*` is `part`."""
    alternatives = (".*" if p == "*" else re.escape(p).replace(r"\*", part) for p in patterns)
    return re.compile("|".join(f"(?:{alternative})" for alternative in alternatives) or r"(?!)", re.DOTALL)
