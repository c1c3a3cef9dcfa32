"""A question to the grants, as the agent's handlers ask it."""

from collections.abc import Iterable, Mapping, Sequence

from keyferry_agent.authz.grants import CallerGrants, Grant, first_matching


def allows(
    grants: Sequence[Grant],
    action: str,
    names: Iterable[str],
    *,
    fingerprint: str | None = None,
    context: Mapping[str, str] | None = None,
) -> Grant | None:
    """The grant that allows an action on a key with these names, or None."""
    return first_matching(CallerGrants(tuple(grants)).covering(action, "key", lambda: names), fingerprint, context)


def may_name(
    grants: Sequence[Grant],
    action: str,
    names: Iterable[str] | None,
    *,
    fingerprint: str | None = None,
    context: Mapping[str, str] | None = None,
) -> bool:
    """Whether a caller may learn that a key is missing of which these names are all that is known; None: nothing is."""
    granted = CallerGrants(tuple(grants))
    may = granted.with_action(action) if names is None else granted.would_cover(action, names)
    return first_matching(may, fingerprint, context) is not None
