"""Checks of grants against the rest of the configuration: a grant, or a part of it, that can never match is a mistake."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from ..authz.grants import BESIDE_PROGRAM, NEVER_WITH_RECIPIENTS, Grant, numbered
from ..peer import OVERFLOW_GID, OVERFLOW_UID

__all__ = ["problems", "warnings"]

_MAX_COMPARED: Final = 100_000
"""Limit of pairs of grants. With more, grants are not compared with each other."""

_OVERFLOW: Final = (
    ("uid", "uid", OVERFLOW_UID),
    ("user", "uid", OVERFLOW_UID),
    ("gid", "gid", OVERFLOW_GID),
    ("group", "gid", OVERFLOW_GID),
)
"""Selectors, the kind of their numbers, and the overflow number: the kernel's for users and groups that it cannot map."""


def problems(grants: Sequence[Grant], configuration: Path, listeners: Collection[str], arns: str) -> Iterator[str]:
    """Yield one message, with the file's path, for each error in grants. `arns`: the prefix of the agent's ARNs."""
    _, _, own_region, own_account, _ = arns.split(":", 4)
    places: dict[str, str] = {}
    for place, grant in numbered(grants):
        at = place if grant.file is not None else f"{configuration}: {place}"
        listener = grant.to.get("listener")
        if listener is not None and listener not in listeners:
            yield f"{at}.to.listener: no listener is called {listener!r}"
        if grant.program and not BESIDE_PROGRAM & grant.to.keys():
            yield (
                f"{at}.to: every user can run {' and '.join(sorted(grant.program))}, with a library of their own in it; "
                f"add {', '.join(sorted(BESIDE_PROGRAM - {'listener'}))} or listener"
            )
        for key in grant.keys:
            if key.startswith("acs:"):
                _, _, region, account, _ = key.split(":", 4)
                if not (fnmatchcase(own_region, region) and fnmatchcase(own_account, account)):
                    yield f"{at}.keys: {key!r} is not of this agent, whose ARNs begin with {arns}"
        if grant.name and places.setdefault(grant.name, at) != at:
            yield (
                f"{at}.name: {grant.name!r} is also the name of {places[grant.name]}: two grants have the same name, and the "
                "audit log could not tell them apart"
            )


def warnings(grants: Sequence[Grant]) -> Iterator[str]:
    """Yield one warning for each grant that can never match, or by which a caller can evade the recipients of another grant."""
    for place, grant in numbered(grants):
        for selector, kind, number in _OVERFLOW:
            if grant.to.get(selector) == number:
                yield (
                    f"{place}.to: {number} is the overflow {kind}, which stands for every {kind} that the kernel cannot map; "
                    "the grant matches no caller"
                )
        actions = sorted(NEVER_WITH_RECIPIENTS.intersection(grant.actions))
        if grant.recipients is not None and actions:
            yield (
                f"{place}.actions: a grant with recipients never covers {', '.join(actions)}: the caller would learn or "
                "choose a data key; leave the action out, or give it a grant of its own"
            )
    yield from _ways_round(grants)


def _ways_round(grants: Sequence[Grant]) -> Iterator[str]:
    """Yield one warning for each grant without recipients by which a caller can evade the recipients of another grant."""
    numbered_grants = list(numbered(grants))
    restricted = [(place, grant) for place, grant in numbered_grants if grant.recipients is not None]
    unrestricted = [(place, grant) for place, grant in numbered_grants if grant.recipients is None]
    if len(restricted) * len(unrestricted) > _MAX_COMPARED:
        return
    for place, grant in restricted:
        for way_round, other in unrestricted:
            if not any(other.has_action(action) for action in (*NEVER_WITH_RECIPIENTS, "kms:ReEncryptTo")):
                continue
            if _agree(grant.to, other.to) and _agree(grant.encryption_context, other.encryption_context):
                patterns = sorted({a for a in grant.keys for b in other.keys if fnmatchcase(a, b) or fnmatchcase(b, a)})
                if patterns:
                    yield (
                        f"{place}.recipients: {way_round} has none, and may be to the same caller for {', '.join(patterns)}: "
                        "through it the caller can learn or choose the data keys that the first grant exports"
                    )


def _agree(first_rule: Mapping[str, Any], second_rule: Mapping[str, Any]) -> bool:
    """Return whether no name has different values, so that one caller, or one EncryptionContext, can match both."""
    return all(second_rule.get(name, value) == value for name, value in first_rule.items())
