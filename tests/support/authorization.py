"""A question to the grants, as the agent's handlers ask it."""

from collections.abc import Iterable, Mapping, Sequence

from keyferry_agent.authz.grants import CallerGrants, Grant, carrying


def allows(
    grants: Sequence[Grant],
    action: str,
    names: Iterable[str],
    *,
    pin: str | None = None,
    context: Mapping[str, str] | None = None,
) -> Grant | None:
    """The grant that allows an action on a key with these names, or None."""
    return carrying(CallerGrants(tuple(grants)).covering(action, "key", lambda: names), pin, context)


def may_name(
    grants: Sequence[Grant],
    action: str,
    names: Iterable[str] | None,
    *,
    pin: str | None = None,
    context: Mapping[str, str] | None = None,
) -> bool:
    """Whether a caller may learn that a key is missing of which these names are all that is known; None: nothing is."""
    granted = CallerGrants(tuple(grants))
    may = granted.with_action(action) if names is None else granted.would_cover(action, names)
    return carrying(may, pin, context) is not None
