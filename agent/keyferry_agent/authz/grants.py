"""Authorization: pure functions over the grants of the configuration. A request that no grant allows is refused.

A grant matches when all its parts match: the caller (`to`), the action and the key. If the grant names recipients or pairs of
the EncryptionContext, these must match too. There are no deny rules, and the order of grants does not change a decision.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from keyferry.operations import OPERATIONS

from ..peer import Groups, Peer

__all__ = [
    "ACTIONS",
    "BESIDE_PROGRAM",
    "NEVER_WITH_RECIPIENTS",
    "PLAINTEXT",
    "PROGRAM",
    "SELECTORS",
    "CallerGrants",
    "Grant",
    "Policy",
    "first_matching",
    "numbered",
]

PLAINTEXT: Final = "plaintext"
"""The recipient of a data key that the caller learns or chooses itself. It is never equal to a fingerprint."""

_MAX_CACHED_KEYS: Final = 32_768
"""Cached keys of a `CallerGrants`, of some 200 bytes each. A full cache is emptied."""
_MAX_CALLER_BYTES: Final = 4 * 2**20
"""Bytes of callers' evidence that a `Policy` caches. A full cache is emptied."""
_CALLER_BYTES: Final = 600
"""Measured bytes of one caller's evidence, besides 4 for each of its groups."""
_MAX_CACHED_SETS: Final = 1_024
"""Sets of grants for which a `Policy` caches a `CallerGrants`. A full cache is emptied."""

ACTIONS: Final = frozenset(
    f"kms:{name}"
    for name in (
        # GetAgentHealth needs no grant. ReEncrypt needs two: one on the key that decrypts, one on the key that encrypts.
        *(name for name in OPERATIONS if name not in ("ReEncrypt", "GetAgentHealth")),
        "ReEncryptFrom",
        "ReEncryptTo",
    )
)
"""All actions that a grant can allow."""

NEVER_WITH_RECIPIENTS: Final = frozenset({"kms:Decrypt", "kms:Encrypt", "kms:GenerateDataKey"})
"""Actions by which a caller learns or chooses a data key. A grant with `recipients` never covers them.

This is also true of ReEncrypt, unless it keeps the key and the EncryptionContext.
"""

# The selectors of a grant's `to`. A new selector needs a line here, its evidence in `peer` and its value's check in `settings`.
SELECTORS: Final[Mapping[str, Callable[[Peer, Any], bool]]] = {
    "uid": lambda peer, uid: peer.uid is not None and peer.uid == uid,
    "user": lambda peer, uid: peer.uid is not None and peer.uid == uid,  # looked up when the configuration was read
    "gid": lambda peer, gid: gid in peer.gids,
    "group": lambda peer, gid: gid in peer.gids,
    "listener": lambda peer, name: peer.listener == name,
    "unit": lambda peer, unit: peer.unit is not None and peer.unit == unit,
    "pod": lambda peer, pod: peer.pod is not None and peer.pod == pod,
    "exe": lambda peer, exe: peer.exe is not None and peer.exe == exe,
    "sha256": lambda peer, sha256: peer.sha256 is not None and peer.sha256 == sha256,
    "access_key": lambda peer, access_key_id: bool(peer.access_key) and peer.access_key == access_key_id,
}
PROGRAM: Final = frozenset({"exe", "sha256"})
"""The selectors whose evidence a process can change by running another program."""
BESIDE_PROGRAM: Final = frozenset({"uid", "user", "unit", "pod", "listener", "access_key"})
"""A grant with a selector of `PROGRAM` needs one of these too: any user can run a program with a library of their own in it."""


@dataclass(frozen=True, slots=True)
class Grant:
    """One `[[grant]]` table; the attributes have the names of its keys. `recipients` is None for any recipient."""

    name: str
    to: Mapping[str, Any]
    actions: tuple[str, ...]
    keys: tuple[str, ...]
    recipients: frozenset[str] | None = None
    encryption_context: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = field(default=None, compare=False, repr=False)
    """The grant's file in the folder of grants; None if the configuration has the grant."""
    _names: frozenset[str] = field(init=False, repr=False)
    _keys: re.Pattern[str] = field(init=False, repr=False)
    _actions: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        patterns = tuple(key for key in self.keys if "*" in key)
        object.__setattr__(self, "_names", frozenset(self.keys).difference(patterns))  # most grants name their keys
        object.__setattr__(self, "_keys", _pattern(patterns, part="[^/:]*"))
        object.__setattr__(self, "_actions", _pattern(self.actions, part=".*"))

    def matches_caller(self, peer: Peer) -> bool:
        """Return whether all selectors of `to` match this caller. An empty `to` matches no caller."""
        return self.could_be_to(peer) and all(SELECTORS[name](peer, self.to[name]) for name in self.program)

    def could_be_to(self, peer: Peer) -> bool:
        """Return whether all selectors of `to` match this caller, those of `PROGRAM` aside."""
        return bool(self.to) and all(
            SELECTORS[selector](peer, value) for selector, value in self.to.items() if selector not in PROGRAM
        )

    @property
    def program(self) -> frozenset[str]:
        """Return the selectors in `to` that are about the caller's program."""
        return PROGRAM & self.to.keys()

    def has_action(self, action: str) -> bool:
        """Return whether the grant covers this action."""
        return self._actions.fullmatch(action) is not None

    def has_key(self, names: Iterable[str]) -> bool:
        """Return whether one of a key's names (ID, aliases, ARNs) matches one of the patterns."""
        return any(name in self._names or self._keys.fullmatch(name) for name in names)

    def has_recipient(self, fingerprint: str | None) -> bool:
        """Return whether a data key may go to this recipient.

        `fingerprint` is of the recipient's public key, or `PLAINTEXT`, or None if the operation neither returns nor receives a
        data key. A grant with `recipients` never covers `PLAINTEXT`: by learning or choosing a data key, the caller would evade
        the list.
        """
        return self.recipients is None or fingerprint is None or fingerprint in self.recipients

    def has_context(self, context: Mapping[str, str] | None) -> bool:
        """Return whether an EncryptionContext has the pairs that the grant demands; True if the operation has none (None)."""
        return context is None or self.encryption_context.items() <= context.items()


def first_matching(grants: Iterable[Grant], fingerprint: str | None, context: Mapping[str, str] | None) -> Grant | None:
    """Return the first grant that also covers the recipient and the EncryptionContext, or None."""
    for grant in grants:
        if grant.has_recipient(fingerprint) and grant.has_context(context):
            return grant
    return None


def numbered(grants: Iterable[Grant]) -> Iterator[tuple[str, Grant]]:
    """Yield each grant after its place in messages: `grant[0]`, preceded by the path of its file in the folder of grants."""
    counts: Counter[Path | None] = Counter()
    for grant in grants:
        place = f"grant[{counts[grant.file]}]"
        counts[grant.file] += 1
        yield (f"{grant.file}: {place}" if grant.file is not None else place), grant


@functools.lru_cache(maxsize=1_024)
def _pattern(patterns: tuple[str, ...], *, part: str) -> re.Pattern[str]:
    """Return one expression for all patterns. A sole `*` matches everything; any other `*` matches `part`."""
    alternatives = (".*" if p == "*" else _STARS.sub(functools.partial(_translate, part), p) for p in patterns)
    return re.compile("|".join(f"(?:{alternative})" for alternative in alternatives) or r"(?!)", re.DOTALL)


# Stars, with the text after them if another star follows in the same part of the name; or text.
_STARS: Final = re.compile(r"\*+(?:([^*/:]+)(?=\*))?|[^*]+")


def _translate(part: str, match: re.Match[str]) -> str:
    if not match[0].startswith("*"):
        return re.escape(match[0])
    if match[1] is None:
        return part
    # Atomic group: take the first match of the text, and never backtrack. A later match only leaves less text for the stars
    # after it. The caller chooses the name. With backtracking, a name that nearly matches would be tried in as many ways as its
    # length to the power of the number of stars.
    return f"(?>{part}?{re.escape(match[1])})"


class _ActionIndex:
    """The grants that cover one action, indexed by names of keys: most grants name their keys, and few have patterns."""

    def __init__(self, grants: Sequence[Grant]) -> None:
        self.grants = tuple(grants)
        self._by_name: dict[str, list[int]] = {}
        self._by_prefix: dict[str, list[int]] = {}  # patterns, by their text before the first `*`
        for index, grant in enumerate(grants):
            for key in grant.keys:
                prefix, star, _ = key.partition("*")
                (self._by_prefix if star else self._by_name).setdefault(prefix, []).append(index)
        self._prefix_lengths = sorted({len(prefix) for prefix in self._by_prefix})

    def with_key(self, names: Sequence[str]) -> tuple[Grant, ...]:
        """Return the grants that cover a key with these names, in the configuration's order."""
        matches = {index for name in names for index in self._by_name.get(name, ())}
        candidates = {
            index
            for name in names
            for length in self._prefix_lengths
            for index in self._by_prefix.get(name[:length], ())
        }
        matches.update(index for index in candidates - matches if self.grants[index].has_key(names))
        return tuple(self.grants[index] for index in sorted(matches))


class CallerGrants:
    """The grants to one kind of caller, with a cache of the grants that cover a key, so that a request costs one look-up.

    `asks`: the selectors of `PROGRAM` in all grants whose other selectors match this caller.
    """

    __slots__ = ("_actions", "_by_key", "asks", "grants", "on_program")

    def __init__(self, grants: tuple[Grant, ...], asks: frozenset[str] = frozenset()) -> None:
        self.grants = grants
        self.asks = asks
        self.on_program = any(grant.program for grant in grants)
        self._actions: dict[str, _ActionIndex] = {}
        self._by_key: dict[tuple[str, str], tuple[Grant, ...]] = {}

    def with_action(self, action: str) -> tuple[Grant, ...]:
        """Return the grants that cover an action."""
        return self._index(action).grants

    def covering(self, action: str, name: str, names: Callable[[], Iterable[str]] | None) -> tuple[Grant, ...]:
        """Return the grants that cover an action on the key that is cached as `name`; `names` returns all names of the key.

        `names` is None if the key does not exist. The result is then empty, after the same look-up.
        """
        grants = self._by_key.get((action, name))
        if grants is None:
            if names is None:
                return ()
            if len(self._by_key) >= _MAX_CACHED_KEYS:
                self._by_key.clear()
            grants = self._by_key[action, name] = self._index(action).with_key(tuple(names()))
        return grants

    def would_cover(self, action: str, names: Iterable[str]) -> tuple[Grant, ...]:
        """Return the grants that would cover an action on a key with these names, whether such a key exists or not.

        The result is not cached, because callers can invent any number of names.
        """
        return self._index(action).with_key(tuple(names))

    def _index(self, action: str) -> _ActionIndex:
        index = self._actions.get(action)
        if index is None:
            # Many grants have equal lists of actions, so match each list once.
            has_action = {
                grant.actions: grant.has_action(action) for grant in {g.actions: g for g in self.grants}.values()
            }
            index = self._actions[action] = _ActionIndex([grant for grant in self.grants if has_action[grant.actions]])
        return index


class Policy:
    """All grants of a configuration, indexed by the user that they are to."""

    def __init__(self, grants: Sequence[Grant]) -> None:
        self._by_uid: dict[int, list[tuple[int, Grant]]] = {}
        self._without_uid: list[tuple[int, Grant]] = []
        for index, grant in enumerate(grants):
            uid = _user_of(grant)
            (self._without_uid if uid is None else self._by_uid.setdefault(uid, [])).append((index, grant))
        self.users_by_program = frozenset(
            uid for grant in grants if grant.program and (uid := _user_of(grant)) is not None
        )
        """The users of all grants that name a user and a program."""
        self._by_peer: dict[Peer, CallerGrants] = {}
        self._free_bytes = _MAX_CALLER_BYTES
        self._sets: dict[tuple[tuple[int, ...], frozenset[str]], CallerGrants] = {}

    def granted(self, peer: Peer) -> CallerGrants:
        """Return the grants to this caller. Callers with the same grants share one object, and its cache."""
        evidence = peer._replace(pid=None)
        granted = self._by_peer.get(evidence)
        if granted is None:
            granted = self._look_up(peer)
            size = _CALLER_BYTES + (peer.gids.size if isinstance(peer.gids, Groups) else 0)
            self._free_bytes -= size
            if self._free_bytes < 0:
                self._by_peer.clear()
                self._free_bytes = _MAX_CALLER_BYTES - size
            self._by_peer[evidence] = granted
        return granted

    def _look_up(self, peer: Peer) -> CallerGrants:
        user_grants = self._by_uid.get(peer.uid, []) if peer.uid is not None else []
        candidates = sorted([*user_grants, *self._without_uid], key=lambda pair: pair[0])
        candidates_of_peer = [(index, grant) for index, grant in candidates if grant.could_be_to(peer)]
        evidence = frozenset[str]().union(*(grant.program for _, grant in candidates_of_peer))
        peer_grants = [(index, grant) for index, grant in candidates_of_peer if grant.matches_caller(peer)]
        key = tuple(index for index, _ in peer_grants), evidence
        granted = self._sets.get(key)
        if granted is None:
            if len(self._sets) >= _MAX_CACHED_SETS:
                self._sets.clear()
            granted = self._sets[key] = CallerGrants(tuple(grant for _, grant in peer_grants), evidence)
        return granted


def _user_of(grant: Grant) -> int | None:
    uid: int | None = grant.to.get("uid", grant.to.get("user"))
    return uid
