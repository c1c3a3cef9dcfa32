"""The health of an agent: the conditions that concern an operator, and the state that follows from them.

Every caller may read the conditions. So their messages do not name files or keys, which are in the agent's log.
"""

from typing import Final

from keyferry.operations import Condition

__all__ = [
    "AUDIT_FAILING",
    "DRAINING",
    "KEYRING_STALE",
    "MESSAGES",
    "RELOAD_FAILED",
    "SEALED",
    "UNSEAL_ABSENT",
    "described",
    "is_ready",
    "state",
]

DRAINING: Final = "Draining"
SEALED: Final = "Sealed"
AUDIT_FAILING: Final = "AuditFailing"
RELOAD_FAILED: Final = "ReloadFailed"
KEYRING_STALE: Final = "KeyringStale"
UNSEAL_ABSENT: Final = "UnsealAbsent"

MESSAGES: Final = {
    DRAINING: "the agent answers the requests that have arrived, and stops",
    SEALED: "calls are refused until an operator gives the unseal secret with `keyferry-agent unseal`",
    AUDIT_FAILING: "the audit log cannot be written",
    RELOAD_FAILED: "files could not be read again; the agent's log has the reason",
    KEYRING_STALE: "the keyring's file was replaced and has not been opened; the keyring before it serves",
    UNSEAL_ABSENT: "the unseal secret is absent; the keyring serves from memory",
}
"""All conditions with their messages, the most important first."""


def state(conditions: list[str], *, is_refusing: bool) -> str:
    """Return the state in one word. `is_refusing`: whether the agent refuses calls whose audit entries cannot be written."""
    if DRAINING in conditions:
        return "Draining"
    if SEALED in conditions:
        return "Sealed"
    return "Refusing" if AUDIT_FAILING in conditions and is_refusing else "Serving"


def is_ready(state: str) -> bool:
    """Return whether the agent answers calls in a state."""
    return state == "Serving"


def described(conditions: list[str]) -> tuple[Condition, ...]:
    """Return conditions in the form of a result."""
    return tuple(Condition(name, MESSAGES[name]) for name in conditions)
